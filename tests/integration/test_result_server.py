"""Results in a Redis of their own: it goes away while the broker's stays, and the other way round."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import redis
from celery import Celery

from cortex_tasks.codec import queue_keys, result_key
from tests.support.redis_server import RedisServer
from tests.support.worker_process import WorkerProcess, poll_until

pytestmark = pytest.mark.fleet

JOBS = 20


@pytest.mark.parametrize("is_silent", [False, True], ids=["broker down", "broker silent"])
def test_answers_do_not_wait_for_the_broker(tmp_path: Path, is_silent: bool) -> None:
    gate = tmp_path / "gate"
    gate.touch()
    options = ("--appendonly", "yes", "--appendfsync", "always", "--dir", str(tmp_path))
    env = {"CORTEX_TEST_GATE": str(gate)}
    with RedisServer(*options, directory=tmp_path) as broker, RedisServer(directory=tmp_path) as results:
        env["CORTEX_RESULT_URL"] = results.url
        with (
            redis.Redis.from_url(broker.url) as client,
            redis.Redis.from_url(results.url) as stored,
            WorkerProcess(broker.url, tmp_path / "worker.log", queues="gated", env=env) as worker,
            Celery("plain", broker=broker.url, set_as_current=False) as app,
        ):
            kwargs = [{"inputs": [f"text {n}"], "model": "gated"} for n in range(4)]
            ids = [app.send_task("cortex.embed", kwargs=given, queue="gated").id for given in kwargs]
            poll_until(lambda: client.hlen("unacked") == len(ids), "every job taken")
            poll_until(gate.with_suffix(".entered").exists, "a batch at the gate")
            if is_silent:
                os.kill(broker.pid, signal.SIGSTOP)
                try:
                    poll_until(lambda: "not be renewed: TimeoutError" in worker.tail(), "a worker that notices")
                    gate.unlink()
                    poll_until(lambda: stored.exists(*map(result_key, ids)) == len(ids), "every answer")
                finally:
                    os.kill(broker.pid, signal.SIGCONT)
            else:
                broker.kill()
                poll_until(lambda: "Cannot connect" in worker.tail(), "a worker that notices")
                gate.unlink()
                poll_until(lambda: stored.exists(*map(result_key, ids)) == len(ids), "every answer")
                broker.start()
            poll_until(lambda: client.hlen("unacked") == 0, "every job acknowledged")
            assert not any(client.llen(key) for key in queue_keys("gated"))


def test_answers_wait_for_their_server_beyond_the_lease_and_no_job_runs_twice(tmp_path: Path) -> None:
    """The lease of the test fleet is 3 s. Computed answers are kept, their claims renewed, until they can be stored."""
    with (
        RedisServer(directory=tmp_path) as broker,
        RedisServer(directory=tmp_path) as results,
        redis.Redis.from_url(broker.url) as client,
        WorkerProcess(
            broker.url, tmp_path / "worker.log", queues="echo", env={"CORTEX_RESULT_URL": results.url}
        ) as worker,
    ):
        app = Celery("plain", broker=broker.url, set_as_current=False)
        results.kill()
        ids = [
            app.send_task("cortex.embed", kwargs={"inputs": [f"text {n}"], "model": "echo"}, queue="echo").id
            for n in range(JOBS)
        ]
        poll_until(lambda: client.hlen("unacked") == JOBS, "every job taken")
        first_s = client.zrange("unacked_index", 0, 0, withscores=True)[0][1]
        poll_until(
            lambda: client.zrange("unacked_index", 0, 0, withscores=True)[0][1] > first_s + 4, "renewals of the leases"
        )
        assert client.hlen("unacked") == JOBS
        results.start()
        with redis.Redis.from_url(results.url) as stored:
            poll_until(lambda: stored.exists(*map(result_key, ids)) == JOBS, worker.tail(), 60)
        poll_until(lambda: client.hlen("unacked") == 0, "every job acknowledged")
        assert not any(client.llen(key) for key in queue_keys("echo"))
        poll_until(lambda: (card := worker.card()) is not None and card.jobs >= JOBS, "a new card")
        card = worker.card()
        assert card is not None
        assert card.jobs == JOBS
        app.close()
