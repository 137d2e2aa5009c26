"""Results in a Redis of their own, which goes away while the broker's stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import redis
from celery import Celery

from cortex_tasks.codec import queue_keys, result_key
from tests.support.redis_server import RedisServer
from tests.support.worker_process import WorkerProcess, poll_until

pytestmark = pytest.mark.fleet

JOBS = 20


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
