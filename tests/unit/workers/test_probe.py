"""The probes' answers and exit codes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.markdown import ROOT
from workers import heartbeat, probe
from workers.heartbeat import Beat


@pytest.fixture
def where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(heartbeat, "directory", lambda: tmp_path)
    return tmp_path


def leave(where: Path, pid: int, node: str = "nlp@host", **changes: object) -> None:
    born = heartbeat.born_ticks(pid)
    assert born is not None
    said = {"state": "ready", "beat_at_s": time.monotonic(), **changes}
    heartbeat.write(Beat(pid=pid, born_ticks=born, node=node, **said), where)  # type: ignore[arg-type]


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[str]]:
    """A process that ends at SIGTERM, as a worker does."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


@pytest.mark.parametrize("question", ["started", "ready", "live"])
def test_a_good_worker(where: Path, capsys: pytest.CaptureFixture[str], question: str) -> None:
    leave(where, os.getpid())
    assert probe.main([question]) == 0
    assert capsys.readouterr().out == f"nlp@host: {question}\n"


def test_no_worker_is_a_no(where: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert probe.main(["live"]) == 1
    assert "no worker's heartbeat" in capsys.readouterr().out


def test_one_bad_worker_of_two_is_named(
    where: Path, capsys: pytest.CaptureFixture[str], sleeper: subprocess.Popen[str]
) -> None:
    leave(where, os.getpid())
    leave(where, sleeper.pid, "ml@host", stalled_s=700.0)
    assert probe.main(["live"]) == 1
    assert capsys.readouterr().out == "ml@host: it holds jobs and has finished nothing for 700 s\n"
    assert probe.main(["live", "--pid", str(os.getpid())]) == 0


def test_stop_asks_once_and_waits(where: Path, sleeper: subprocess.Popen[str]) -> None:
    leave(where, sleeper.pid)
    assert probe.main(["stop", "--timeout-s", "20"]) == 0
    assert sleeper.wait(20) == -signal.SIGTERM


def test_a_worker_that_stops_already_is_only_waited_for(
    where: Path, capsys: pytest.CaptureFixture[str], sleeper: subprocess.Popen[str]
) -> None:
    leave(where, sleeper.pid, state="stopping")
    assert probe.main(["stop", "--timeout-s", "0"]) == 1
    assert "has not ended" in capsys.readouterr().out
    assert sleeper.poll() is None


def test_it_runs_as_a_module_and_imports_nothing_heavy(tmp_path: Path) -> None:
    script = (
        "import sys, workers.probe\n"
        "assert workers.probe.main(['live']) == 1\n"
        "print(sorted(name for name in ('torch', 'redis', 'celery', 'pydantic', 'numpy') if name in sys.modules))"
    )
    env = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    done = subprocess.run([sys.executable, "-m", "workers.probe", "ready"], env=env, capture_output=True, check=False)
    assert done.returncode == 1
