"""Connections that break again and again while Redis itself stays: no job is lost, failed or parked for it."""

from __future__ import annotations

import json
from base64 import b64decode
from pathlib import Path
from typing import Any

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


def test_remote_control_is_heard_after_every_loss(redis_url: str, tmp_path: Path) -> None:
    """The sockets on which commands come are replaced, some of them under numbers that were in use before."""

    def answers() -> Any:
        with Celery("plain", broker=redis_url, backend=redis_url, set_as_current=False) as app:
            try:
                return app.control.ping(timeout=0.5)
            except redis.ConnectionError:
                # One of kombu's own pool, which was killed as well.
                return None

    with redis.Redis.from_url(redis_url) as client, WorkerProcess(redis_url, tmp_path / "worker.log", queues="slow"):
        for kind in ("normal", "pubsub", "pubsub", "normal", "pubsub"):
            poll_until(answers, f"an answer to a ping before the loss of {kind} connections", 60)
            client.execute_command("CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")
        poll_until(answers, "an answer to a ping", 60)


def test_a_monitor_that_comes_after_a_loss_hears_of_jobs_at_once(redis_url: str, tmp_path: Path) -> None:
    app = Celery("plain", broker=redis_url, backend=redis_url, set_as_current=False)

    def answered() -> str:
        job = app.send_task("cortex.embed", kwargs={"inputs": ["a text"], "model": "slow"}, queue="slow")
        poll_until(lambda: client.exists(result_key(job.id)), "the answer", 60)
        return str(job.id)

    def tells_of(job_id: str, message: Any) -> bool:
        if message is None or message["type"] != "pmessage":
            return False
        sent = json.loads(message["data"])
        told = json.loads(b64decode(sent["body"]) if sent["properties"]["body_encoding"] == "base64" else sent["body"])
        return any(event.get("uuid") == job_id for event in (told if isinstance(told, list) else [told]))

    with redis.Redis.from_url(redis_url) as client, WorkerProcess(redis_url, tmp_path / "worker.log", queues="slow"):
        answered()
        client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        for _ in range(2):
            answered()
        with client.pubsub() as monitor:
            monitor.psubscribe("/0.celeryev/*")
            monitor.get_message(timeout=5)
            job_id = answered()
            poll_until(lambda: tells_of(job_id, monitor.get_message(timeout=0.1)), "an event of the job")
    app.close()
