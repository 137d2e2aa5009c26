"""The local fleet: starting in order, saying what fails, and leaving nothing behind; with stand-ins for workers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from cortex_tasks.embedded_redis import answers
from cortex_tasks.errors import ConfigError, DeliveryError, ResultTimeout
from cortex_tasks.local_fleet import LocalFleet, session_members
from cortex_tasks.procfile import child_environment, default_procfile, read_procfile

pytestmark = pytest.mark.fleet

WORKER = '''
"""A stand-in for a worker: a card in Redis, a child process, a slow or deaf end."""
import os, signal, subprocess, sys, time
import redis
from cortex_tasks.presence import WORKERS_KEY, WorkerCard, worker_key

mode = sys.argv[1]
client = redis.Redis.from_url(os.environ["CORTEX_BROKER_URL"])
child = subprocess.Popen(["sleep", "600"])
def leave(*_):
    client.set("finished", mode)
    sys.exit(0)
signal.signal(signal.SIGTERM, signal.SIG_IGN if mode == "deaf" else leave)
if mode == "broken":
    print("it cannot work"); sys.exit(7)
state = "starting" if mode == "slow" else "ready"
card = WorkerCard(node=mode, image=mode, host="h", pid=os.getpid(), state=state, queues=(), models=(), started_at=0,
                  seen_at=0)
client.set(worker_key(mode), card.model_dump_json()); client.zadd(WORKERS_KEY, {mode: 0})
print("working")
while True:
    time.sleep(600)
'''


@pytest.fixture
def procfile(tmp_path: Path) -> Path:
    """Redis, and a stand-in worker of each mode."""
    script = tmp_path / "worker.py"
    script.write_text(textwrap.dedent(WORKER))
    lines = [f"{mode}: {sys.executable} {script} {mode}" for mode in ("good", "broken", "slow", "deaf")]
    file = tmp_path / "Procfile"
    file.write_text("\n".join(["# a comment", "redis: cortex redis", *lines]) + "\n")
    return file


def test_it_starts_waits_and_leaves_nothing(procfile: Path) -> None:
    seen: list[Mapping[str, str]] = []
    with LocalFleet(
        procfile=procfile, only=["redis", "good"], progress=lambda _waited_s, states: seen.append(dict(states))
    ) as fleet:
        sessions = {process.pid for process in fleet.processes.values()}
        assert [card.node for card in fleet.cards()] == ["good"]
        assert fleet.states() == {"redis": "ready", "good": "ready"}
        # The supervisor and its server, the worker and its child.
        assert len(session_members(sessions)) == 4
        log = fleet.log_dir
        assert "working" in fleet.tail("good")
    assert {"redis": "ready", "good": "starting"} in seen
    assert fleet.killed == []
    assert not session_members(sessions)
    assert not answers(fleet.url)
    assert not log.exists()
    fleet.stop()


def test_redis_is_there_until_the_workers_have_finished(procfile: Path) -> None:
    # The stand-in writes to Redis when it ends; without Redis it would end with an error and be seen here.
    with LocalFleet(procfile=procfile, only=["redis", "good"]) as fleet:
        worker = fleet.processes["good"]
    assert worker.returncode == 0


def test_a_process_that_ends_fails_the_start_with_the_end_of_its_log(procfile: Path) -> None:
    fleet = LocalFleet(procfile=procfile, only=["redis", "broken"])
    with pytest.raises(DeliveryError, match=r"(?s)'broken' ended with code 7.*it cannot work"):
        fleet.__enter__()
    assert not answers(fleet.url)
    assert fleet.processes == {}


def test_a_process_that_is_never_ready_fails_the_start(procfile: Path) -> None:
    fleet = LocalFleet(procfile=procfile, only=["redis", "slow"], start_timeout_s=1.0)
    with pytest.raises(ResultTimeout, match=r"(?s)not ready after 1 s: slow \((starting)\)"):
        fleet.__enter__()
    assert not answers(fleet.url)


def test_a_process_that_does_not_listen_is_killed(procfile: Path) -> None:
    with LocalFleet(procfile=procfile, only=["redis", "deaf"], stop_timeout_s=0.5) as fleet:
        sessions = {process.pid for process in fleet.processes.values()}
    assert fleet.killed == ["deaf"]
    assert not session_members(sessions)


def test_an_error_inside_stops_the_fleet(procfile: Path) -> None:
    with pytest.raises(KeyboardInterrupt), LocalFleet(procfile=procfile, only=["redis", "good"]) as fleet:
        raise KeyboardInterrupt
    assert not answers(fleet.url)


def test_a_process_can_be_killed_and_started_again(procfile: Path) -> None:
    with LocalFleet(procfile=procfile, only=["redis", "good"]) as fleet:
        first = fleet.processes["good"]
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        second = fleet.spawn("good")
        fleet.wait_ready()
        assert second.pid != first.pid
        sessions = {first.pid, second.pid}
    # The first one's child outlived it, until now.
    assert not session_members(sessions)


def test_the_fleet_goes_when_its_owner_is_killed(procfile: Path, tmp_path: Path) -> None:
    code = f"""
import time
from pathlib import Path
from cortex_tasks.local_fleet import LocalFleet
with LocalFleet(procfile=Path({str(procfile)!r}), only=["redis", "good"]) as fleet:
    print(*(process.pid for process in fleet.processes.values()), flush=True)
    time.sleep(600)
"""
    owner = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(tmp_path)}
    )
    assert owner.stdout is not None
    sessions = {int(pid) for pid in owner.stdout.readline().split()}
    assert len(sessions) == 2
    owner.kill()
    owner.communicate()
    end = time.monotonic() + 20
    # SIGTERM reaches each process itself; the stand-in has no way to end its `sleep` with it.
    while any("sleep" not in _command(pid) for pid in session_members(sessions)):
        assert time.monotonic() < end, "the fleet outlived its owner"
        time.sleep(0.05)
    for pid in session_members(sessions):
        os.kill(pid, signal.SIGKILL)


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return "sleep"


# ------------------------------------------------------------------------------------------------- the Procfile


def test_the_default_procfile() -> None:
    commands = read_procfile(default_procfile())
    assert list(commands) == ["redis", "nlp", "ml", "flower"]
    assert commands["nlp"] == "celery -A workers.app worker -Q $(cortex queues nlp)"
    assert "--address=127.0.0.1" in commands["flower"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("web x\n", r":1: expected 'name: command'"),
        ("a: b\n\na: c\n", r":3: a: a second process of this name"),
        ("# nothing\n", "no process in it"),
    ],
)
def test_a_wrong_procfile(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "Procfile").write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_procfile(tmp_path / "Procfile")


def test_an_absent_procfile(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        LocalFleet(procfile=tmp_path / "none")


def test_an_unknown_process(procfile: Path) -> None:
    with pytest.raises(ConfigError, match="unknown process 'goot'; did you mean 'good'"):
        LocalFleet(procfile=procfile, only=["goot"])


def test_commands_find_this_environments_programs_first() -> None:
    here = str(Path(sys.executable).parent)
    assert child_environment({"PATH": "/usr/bin"})["PATH"] == f"{here}{os.pathsep}/usr/bin"
    assert child_environment({})["PATH"] == here
