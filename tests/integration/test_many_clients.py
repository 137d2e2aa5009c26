"""Twenty client processes at once, each with threads: everyone gets the answers to their own inputs, once."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.support.echo_client import LIST_INPUTS, LISTS, MAP_INPUTS, TIMEOUT_S
from tests.support.redis_server import RedisServer
from tests.support.worker_process import QUEUES_FILE, ROOT, WorkerProcess, poll_until

pytestmark = pytest.mark.fleet

CLIENTS = 20
#: Texts that each client embeds one by one, from several threads.
SINGLES = 120
#: All that a client asks for.
INPUTS = SINGLES + LISTS * LIST_INPUTS + MAP_INPUTS


@pytest.fixture(scope="module")
def queues_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fleet of echo models with a lease that lasts however busy this machine is: a job whose worker is not heard of
    in time is given to another one and computed twice, as it should be."""
    file = tmp_path_factory.mktemp("fleet") / "queues.yaml"
    text = QUEUES_FILE.read_text()
    assert "lease_s: 3\n" in text
    file.write_text(text.replace("lease_s: 3\n", "lease_s: 120\n"))
    return file


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory, queues_file: Path) -> Iterator[WorkerProcess]:
    directory = tmp_path_factory.mktemp("worker")
    with (
        RedisServer(directory=directory) as server,
        WorkerProcess(server.url, directory / "worker.log", queues_file=queues_file) as worker,
    ):
        yield worker


def start(url: str, name: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.support.echo_client", url, str(QUEUES_FILE), name, str(SINGLES)]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def run_clients(url: str, of: str) -> None:
    """Start all, let them begin together, and look at what each found. ``of`` makes their texts this run's own."""
    with ExitStack() as stack:
        names = [f"client {n} of {of}" for n in range(CLIENTS)]
        clients = {name: stack.enter_context(start(url, name)) for name in names}
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
            output, _ = client.communicate(timeout=2 * TIMEOUT_S)
            assert json.loads(output) == {"answers": INPUTS, "crossed": []}, name
            assert client.returncode == 0, name


def items_done(*workers: WorkerProcess) -> list[int]:
    return [card.items for worker in workers if (card := worker.card()) is not None]


#: One more for each client: the text with which it got ready.
EXPECTED_ITEMS = CLIENTS * (1 + INPUTS)


def assert_computed_once(before: int, *workers: WorkerProcess) -> list[int]:
    """Every input was computed by one of them, once; how many by each."""
    with suppress(AssertionError):
        poll_until(lambda: sum(items_done(*workers)) >= before + EXPECTED_ITEMS, "all computed")
    done = items_done(*workers)
    assert sum(done) - before == EXPECTED_ITEMS, f"computed {done}, {before} of them before"
    return done


def test_no_answer_is_crossed(worker: WorkerProcess) -> None:
    before = sum(items_done(worker))
    run_clients(worker.url, of="one worker")
    assert_computed_once(before, worker)


def test_nor_with_two_workers(worker: WorkerProcess, queues_file: Path, tmp_path: Path) -> None:
    before = sum(items_done(worker))
    with WorkerProcess(worker.url, tmp_path / "second.log", queues_file=queues_file) as second:
        run_clients(worker.url, of="two workers")
        done = assert_computed_once(before, worker, second)
        assert done[1] > EXPECTED_ITEMS // 10, "the second worker had next to nothing to do"
