"""Twenty client processes at once, each with threads: everyone gets the answers to their own inputs, once."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.echo_client import LIST_INPUTS, LISTS, MAP_INPUTS
from tests.support.worker_process import QUEUES_FILE, ROOT, WorkerProcess, poll_until

pytestmark = pytest.mark.fleet

CLIENTS = 20
#: Texts that each client embeds one by one, from several threads.
SINGLES = 120
#: All that a client asks for.
INPUTS = SINGLES + LISTS * LIST_INPUTS + MAP_INPUTS


def start(url: str, name: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.support.echo_client", url, str(QUEUES_FILE), name, str(SINGLES)]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def run_clients(url: str) -> None:
    """Start all, let them begin together, and look at what each found."""
    with ExitStack() as stack:
        clients = {f"client {n}": stack.enter_context(start(url, f"client {n}")) for n in range(CLIENTS)}
        for client in clients.values():
            stack.callback(client.kill)
        for name, client in clients.items():
            assert client.stdout is not None
            assert client.stdout.readline() == "ready\n", name
        for client in clients.values():
            assert client.stdin is not None
            client.stdin.write("go\n")
            client.stdin.flush()
        for name, client in clients.items():
            output, _ = client.communicate(timeout=90)
            assert json.loads(output) == {"answers": INPUTS, "crossed": []}, name
            assert client.returncode == 0, name


def items_done(*workers: WorkerProcess) -> list[int]:
    return [card.items for worker in workers if (card := worker.card()) is not None]


#: One more for each client: the text with which it got ready.
EXPECTED_ITEMS = CLIENTS * (1 + INPUTS)


def test_no_answer_is_crossed(echo_worker: WorkerProcess) -> None:
    before = sum(items_done(echo_worker))
    run_clients(echo_worker.url)
    poll_until(lambda: sum(items_done(echo_worker)) == before + EXPECTED_ITEMS, "each input computed once")


def test_nor_with_two_workers(echo_worker: WorkerProcess, tmp_path: Path) -> None:
    before = sum(items_done(echo_worker))
    with WorkerProcess(echo_worker.url, tmp_path / "second.log") as second:
        run_clients(echo_worker.url)
        both = (echo_worker, second)
        poll_until(lambda: sum(items_done(*both)) == before + EXPECTED_ITEMS, "each input computed once, by either")
        assert items_done(second)[0] > EXPECTED_ITEMS // 10, "the second worker had next to nothing to do"
