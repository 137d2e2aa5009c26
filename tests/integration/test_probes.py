"""Probes of a real worker: while it starts, serves, loses Redis, and ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.markdown import ROOT
from tests.support.redis_server import RedisServer
from tests.support.worker_process import WorkerProcess, poll_until
from workers import heartbeat

pytestmark = pytest.mark.fleet


class Pod:
    """A Redis, a worker, and a directory for temporary files of their own."""

    def __init__(self, directory: Path) -> None:
        self.env = {**os.environ, "TMPDIR": str(directory), "PYTHONPATH": str(ROOT)}
        self.beats = directory / f"cortex-{os.getuid()}"
        self.server = RedisServer(directory=directory)
        self.worker = WorkerProcess(
            self.server.url, directory / "worker.log", queues="echo", env={"TMPDIR": str(directory)}, wait=False
        )

    def probe(self, *arguments: str) -> int:
        command = [sys.executable, "-m", "workers.probe", *arguments]
        return subprocess.run(command, env=self.env, cwd=ROOT, check=False, timeout=60).returncode

    def beat(self) -> heartbeat.Beat | None:
        return next(iter(heartbeat.beats(self.beats)), None)


@pytest.fixture
def pod(tmp_path: Path) -> Iterator[Pod]:
    pod = Pod(tmp_path)
    try:
        yield pod
    finally:
        pod.worker.kill()
        pod.server.kill()


def test_a_workers_life_as_its_probes_see_it(pod: Pod) -> None:
    assert pod.probe("ready") == 1
    pod.worker.wait_ready()
    poll_until(lambda: pod.probe("ready") == 0, "the worker says that it is ready")
    assert pod.probe("started") == pod.probe("live") == 0
    pod.server.kill()
    last = pod.beat()
    assert last is not None
    # Two more heartbeats, the last of which knows that Redis is away.
    poll_until(lambda: (now := pod.beat()) and now.beat_at_s > last.beat_at_s + 3, "it beats on")
    assert pod.probe("live") == 0
    pod.server.start()
    assert pod.probe("stop", "--timeout-s", "60") == 0
    assert pod.worker.process.wait(10) == 0
    assert pod.probe("live") == 1


def test_a_worker_that_was_killed_is_not_live(pod: Pod) -> None:
    pod.worker.wait_ready()
    assert pod.probe("live") == 0
    os.killpg(pod.worker.pid, signal.SIGKILL)
    pod.worker.process.wait(10)
    assert pod.probe("live") == 1
