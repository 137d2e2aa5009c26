"""Breaking things: nothing that was accepted is lost, nothing is answered wrongly, poison is parked."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery

import cortex_tasks.errors
from cortex_tasks.codec import loads, queue_keys, result_key
from cortex_tasks.echo import DIMENSIONS, echo_vector
from tests.support.poison import KILL
from tests.support.redis_server import RedisServer
from tests.support.worker_process import WorkerProcess, poll_until

pytestmark = pytest.mark.fleet


@contextmanager
def plain_client(url: str) -> Iterator[Celery]:
    app = Celery("plain", broker=url, backend=url, set_as_current=False)
    try:
        yield app
    finally:
        app.close()


def send_many(app: Celery, count: int, queue: str = "slow") -> dict[str, str]:
    """job id -> its text."""
    with app.connection() as connection, app.amqp.Producer(connection) as producer:
        return {
            app.send_task(
                "cortex.embed",
                kwargs={"inputs": [f"text {n}"], "model": queue},
                queue=queue,
                producer=producer,
            ).id: f"text {n}"
            for n in range(count)
        }


def answers(client: Any, jobs: dict[str, str]) -> dict[str, dict[str, Any]]:
    """job id -> result meta, of those that are there."""
    found: dict[str, dict[str, Any]] = {}
    for job_id, raw in zip(jobs, client.mget([result_key(job_id) for job_id in jobs]), strict=True):
        if raw is not None:
            found[job_id] = loads(raw)
    return found


def assert_all_own(metas: dict[str, dict[str, Any]], jobs: dict[str, str]) -> None:
    for job_id, text in jobs.items():
        meta = metas[job_id]
        assert meta["status"] == "SUCCESS", meta
        vector = struct.unpack(f"<{DIMENSIONS}f", meta["result"]["items"][0]["value"]["data"])
        assert vector == pytest.approx(echo_vector(text), abs=1e-6)


def at_rest(client: Any, queue: str) -> bool:
    return client.hlen("unacked") == 0 and all(client.llen(key) == 0 for key in queue_keys(queue))


def test_sigkill_in_the_middle_of_1000_jobs_loses_none(redis_url: str, tmp_path: Path) -> None:
    client = redis.Redis.from_url(redis_url)
    with plain_client(redis_url) as app:
        first = WorkerProcess(redis_url, tmp_path / "first.log")
        try:
            with first.halted():
                jobs = send_many(app, 1_000)
            poll_until(lambda: len(answers(client, jobs)) >= 50, "the first answers")
        finally:
            first.kill()
        before = len(answers(client, jobs))
        assert before < 1_000, "the worker was done before it was killed"
        with WorkerProcess(redis_url, tmp_path / "second.log"):
            poll_until(lambda: len(answers(client, jobs)) == 1_000, "every answer", 60)
            poll_until(lambda: at_rest(client, "slow"), "nothing left behind")
    assert_all_own(answers(client, jobs), jobs)


def test_sigterm_under_load_loses_and_repeats_nothing(redis_url: str, tmp_path: Path) -> None:
    client = redis.Redis.from_url(redis_url)
    with plain_client(redis_url) as app, client.pubsub() as announcements:
        with WorkerProcess(redis_url, tmp_path / "first.log") as first:
            announcements.psubscribe("celery-task-meta-*")
            with first.halted():
                jobs = send_many(app, 2_000)
            poll_until(lambda: len(answers(client, jobs)) >= 50, "the first answers")
            assert first.terminate() == 0
        left = 2_000 - len(answers(client, jobs))
        assert left > 0, "the worker was done before it was stopped"
        # What it did not answer is back in its queue, not waiting for a lease to end.
        assert client.hlen("unacked") == 0
        assert sum(client.llen(key) for key in queue_keys("slow")) == left
        with WorkerProcess(redis_url, tmp_path / "second.log"):
            poll_until(lambda: len(answers(client, jobs)) == 2_000, "every answer", 60)
        told: dict[bytes, int] = {}
        while (message := announcements.get_message(timeout=0.2)) is not None:
            if message["type"] == "pmessage":
                told[message["channel"]] = told.get(message["channel"], 0) + 1
    assert_all_own(answers(client, jobs), jobs)
    assert len(told) == 2_000
    assert set(told.values()) == {1}, "some job was answered twice"


def test_a_slow_worker_keeps_its_jobs_beyond_the_lease(redis_url: str, tmp_path: Path) -> None:
    """The lease is 3 s in the test fleet; the job at the gate is held longer and still runs once."""
    client = redis.Redis.from_url(redis_url)
    gate = tmp_path / "gate"
    gate.touch()
    with (
        plain_client(redis_url) as app,
        WorkerProcess(redis_url, tmp_path / "first.log", env={"CORTEX_TEST_GATE": str(gate)}),
        WorkerProcess(redis_url, tmp_path / "second.log", queues="echo"),
    ):
        held = app.send_task("cortex.embed", kwargs={"inputs": ["held"], "model": "gated"}, queue="gated")
        poll_until(lambda: gate.with_suffix(".entered").exists(), "the job at the gate")
        delivered_s = client.zscore("unacked_index", client.zrange("unacked_index", 0, 0)[0])
        poll_until(
            lambda: client.zscore("unacked_index", client.zrange("unacked_index", 0, 0)[0]) > delivered_s + 4,
            "several renewals of the lease",
        )
        assert client.hlen("unacked") == 1
        assert client.llen("gated") == 0
        gate.unlink()
        assert held.get(timeout=20)["items"]


def test_poison_is_parked_and_its_neighbours_are_answered(redis_url: str, tmp_path: Path) -> None:
    client = redis.Redis.from_url(redis_url)
    with plain_client(redis_url) as app:
        good = [
            app.send_task("cortex.embed", kwargs={"inputs": [f"good {n}"], "model": "poison"}, queue="poison")
            for n in range(10)
        ]
        bad = app.send_task("cortex.embed", kwargs={"inputs": [f"bad {KILL}"], "model": "poison"}, queue="poison")
        inputs = ["fine", f"mixed {KILL}", "fine too"]
        mixed = app.send_task("cortex.embed", kwargs={"inputs": inputs, "model": "poison"}, queue="poison")
        deaths = 0
        worker = WorkerProcess(redis_url, tmp_path / "worker.log", wait=False)
        try:
            # A supervisor: starts the worker again each time the poison kills it.
            def answered() -> bool:
                nonlocal worker, deaths
                if worker.process.poll() is not None:
                    deaths += 1
                    worker = WorkerProcess(redis_url, tmp_path / "worker.log", wait=False)
                return all(result.ready() for result in (bad, mixed, *good))

            poll_until(answered, "an answer for each", 120)
        finally:
            worker.terminate()
    with pytest.raises(cortex_tasks.errors.PoisonJob, match="parked"):
        bad.get(timeout=1)
    assert all(result.successful() for result in good)
    # Only the guilty input of a job fails.
    kinds = [item.get("error", {}).get("code", "value") for item in mixed.get(timeout=1)["items"]]
    assert kinds == ["value", "poison_job", "value"]
    # One death with all of them in a batch, then two more for each of the two that did it, alone.
    assert deaths == 5
    parked = {entry["id"]: entry for entry in map(json.loads, client.lrange("cortex:dead:poison", 0, -1))}
    assert parked.keys() == {bad.id, mixed.id}
    assert "died" in parked[bad.id]["reason"]
    assert "input 1" in parked[mixed.id]["reason"]
    assert parked[bad.id]["message"]["headers"]["id"] == bad.id


def test_a_redis_that_restarts_is_found_again(tmp_path: Path) -> None:
    """A broker that comes back with its data: what was accepted is answered."""
    options = ("--appendonly", "yes", "--appendfsync", "always", "--dir", str(tmp_path))
    with RedisServer(*options, directory=tmp_path) as server:
        client = redis.Redis.from_url(server.url)
        with plain_client(server.url) as app, WorkerProcess(server.url, tmp_path / "worker.log") as worker:
            with worker.halted():
                jobs = send_many(app, 400)
            poll_until(lambda: len(answers(client, jobs)) >= 40, "the first answers")
            server.restart()
            poll_until(lambda: len(answers(client, jobs)) == 400, "every answer", 60)
            poll_until(lambda: at_rest(client, "slow"), "nothing left behind")
        assert_all_own(answers(client, jobs), jobs)


def test_a_worker_full_of_bulk_still_takes_interactive_work(redis_url: str, tmp_path: Path) -> None:
    client = redis.Redis.from_url(redis_url)
    gate = tmp_path / "gate"
    gate.touch()
    interactive, bulk = queue_keys("gated")[0], queue_keys("gated")[-1]
    with (
        plain_client(redis_url) as app,
        WorkerProcess(redis_url, tmp_path / "worker.log", env={"CORTEX_TEST_GATE": str(gate)}),
    ):
        jobs = [
            app.send_task("cortex.embed", kwargs={"inputs": [f"b {n}"], "model": "gated"}, queue="gated", priority=9)
            for n in range(300)
        ]
        poll_until(lambda: gate.with_suffix(".entered").exists(), "a bulk batch at the gate")
        # The test fleet's workers hold 128 messages, of which 96 may be bulk.
        poll_until(lambda: client.llen(bulk) == 300 - 96, "a worker full of bulk")
        urgent = app.send_task("cortex.embed", kwargs={"inputs": ["now"], "model": "gated"}, queue="gated")
        poll_until(lambda: client.llen(interactive) == 0, "the interactive job taken while the gate is shut")
        assert client.llen(bulk) == 300 - 96
        gate.unlink()
        assert urgent.get(timeout=20)["items"]
        assert all(job.get(timeout=60)["items"] for job in jobs)


def test_a_job_dropped_at_once_holds_up_nobody(redis_url: str, tmp_path: Path) -> None:
    """Jobs that end in the very step that fetched them leave no wake-up behind: the next ones must not wait for one."""
    with plain_client(redis_url) as app, WorkerProcess(redis_url, tmp_path / "worker.log"):
        kwargs = {"inputs": ["text"], "model": "echo"}
        waits_ms = []
        for _ in range(10):
            app.send_task("cortex.embed", kwargs=kwargs, queue="echo", expires=-1)
            answer = app.send_task("cortex.embed", kwargs=kwargs, queue="echo", headers=sent_now()).get(timeout=20)
            waits_ms.append(answer["timings"]["queue_ms"])
    # The timer that would end the stall ticks every 500 ms; a busy machine delays some, not most.
    assert sorted(waits_ms)[4] < 250


def sent_now() -> dict[str, Any]:
    return {"cortex": {"sent_at": time.time()}}
