"""Probes of a real worker: while it starts, serves, loses Redis, and ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from celery import Celery

from cortex_tasks.codec import loads, result_key
from tests.support.markdown import ROOT
from tests.support.redis_server import RedisServer
from tests.support.worker_process import WorkerProcess, poll_until
from workers import heartbeat

pytestmark = pytest.mark.fleet

#: The slow model takes 20 ms for eight of them.
LONG = [f"text {number}" for number in range(1_000)]


class Pod:
    """A Redis, a worker, and a directory for temporary files of their own."""

    def __init__(self, directory: Path) -> None:
        self.env = {**os.environ, "TMPDIR": str(directory), "PYTHONPATH": str(ROOT)}
        self.beats = directory / f"cortex-{os.getuid()}"
        self.server = RedisServer(directory=directory)
        self.worker = WorkerProcess(
            self.server.url, directory / "worker.log", queues="echo,slow", env={"TMPDIR": str(directory)}, wait=False
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


def test_stop_finishes_what_has_started(pod: Pod) -> None:
    pod.worker.wait_ready()
    poll_until(pod.beat, "it beats")
    with Celery("plain", broker=pod.server.url, backend=pod.server.url, set_as_current=False) as app:
        sent = app.send_task("cortex.embed", kwargs={"inputs": LONG, "model": "slow"}, queue="slow")
        poll_until(lambda: (card := pod.worker.card()) and any(m.batches for m in card.models), "the job has started")
        assert pod.probe("stop", "--timeout-s", "60") == 0
    assert pod.worker.process.wait(10) == 0
    with redis.Redis.from_url(pod.server.url) as client:
        answer = client.get(result_key(sent.id))
        assert answer is not None, "it was given back, not finished"
        assert loads(answer)["status"] == "SUCCESS"
        assert client.hlen("unacked") == 0


def test_a_worker_that_stood_still_goes_on(pod: Pod) -> None:
    pod.worker.wait_ready()
    beat = poll_until(pod.beat, "it beats")
    os.kill(pod.worker.pid, signal.SIGSTOP)
    # What the probe would find a minute later, told from here: its clock is the machine's.
    assert "no heartbeat for" in beat.why_dead(beat.beat_at_s + heartbeat.LATE_S + 1)
    last = pod.beat()
    os.kill(pod.worker.pid, signal.SIGCONT)
    assert last is not None
    poll_until(lambda: (now := pod.beat()) and now.beat_at_s > last.beat_at_s, "it goes on")
    assert pod.probe("live") == 0
