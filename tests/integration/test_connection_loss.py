"""Connections that break again and again while Redis itself stays: no job is lost, failed or parked for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import redis
from celery import Celery

from cortex_tasks.codec import loads, queue_keys, result_key
from tests.support.worker_process import WorkerProcess, poll_until

pytestmark = pytest.mark.fleet

JOBS = 300
LOSSES = 6


def test_every_job_is_answered_though_connections_break(redis_url: str, tmp_path: Path) -> None:
    app = Celery("plain", broker=redis_url, backend=redis_url, set_as_current=False)
    with (
        redis.Redis.from_url(redis_url) as client,
        WorkerProcess(redis_url, tmp_path / "worker.log", queues="slow") as worker,
    ):
        with app.connection() as connection, app.amqp.Producer(connection) as producer:
            kwargs = [{"inputs": [f"text {n}"], "model": "slow"} for n in range(JOBS)]
            keys = [
                result_key(app.send_task("cortex.embed", kwargs=given, queue="slow", producer=producer).id)
                for given in kwargs
            ]
        for loss in range(LOSSES):
            there = client.exists(*keys)
            poll_until(
                lambda there=there: client.exists(*keys) >= min(JOBS, there + 10), f"answers after loss {loss}", 60
            )
            client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        poll_until(lambda: client.exists(*keys) == JOBS, "every answer", 60)
        poll_until(
            lambda: client.hlen("unacked") == 0 and not any(client.llen(key) for key in queue_keys("slow")),
            "nothing left behind",
        )
        assert {loads(raw)["status"] for raw in client.mget(keys)} == {"SUCCESS"}
        assert client.keys("cortex:dead:*") == []
        assert worker.process.poll() is None
    app.close()
