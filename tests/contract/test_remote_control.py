"""Celery's remote control over the cortex pool and transport: terminate, consumers, limits, ETA, shut-down."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery
from celery.exceptions import TaskRevokedError

from cortex_tasks.presence import WorkerCard
from tests.support.redis_server import RedisServer
from tests.support.worker_process import WorkerProcess, forget_answers, poll_until

pytestmark = pytest.mark.fleet


class Bench:
    def __init__(self, worker: WorkerProcess, app: Celery, client: Any, gate: Path) -> None:
        self.worker, self.app, self.redis, self.gate = worker, app, client, gate

    def send(self, text: str, model: str = "echo", task: str = "embed", **options: Any) -> Any:
        kwargs = {"inputs": [text], "model": model}
        return self.app.send_task(f"cortex.{task}", kwargs=kwargs, queue=options.pop("queue", model), **options)

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """The worker's reply to a control command."""

        def reply() -> Any:
            return self.app.control.broadcast(command, arguments=arguments, reply=True, timeout=1)

        (replied,) = poll_until(reply, f"a reply to {command}")
        return next(iter(replied.values()))

    def card(self) -> WorkerCard:
        card = self.worker.card()
        assert card is not None
        return card

    def hold_the_gate(self) -> Any:
        """A job that stays in its forward pass until the gate is unlinked."""
        self.gate.touch()
        self.gate.with_suffix(".entered").unlink(missing_ok=True)
        held = self.send("held", "gated")
        poll_until(self.gate.with_suffix(".entered").exists, "a forward pass at the gate")
        return held


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    directory = tmp_path_factory.mktemp("control")
    gate = directory / "gate"
    with (
        RedisServer(directory=directory) as server,
        WorkerProcess(
            server.url, directory / "worker.log", queues="echo,gated", env={"CORTEX_TEST_GATE": str(gate)}
        ) as worker,
        redis.Redis.from_url(server.url) as client,
    ):
        app = Celery("plain", broker=server.url, backend=server.url, set_as_current=False)
        yield Bench(worker, app, client, gate)
        gate.unlink(missing_ok=True)
        app.close()


@pytest.fixture(autouse=True)
def at_rest(bench: Bench) -> Iterator[None]:
    forget_answers(bench.worker.url)
    yield
    bench.gate.unlink(missing_ok=True)
    poll_until(lambda: bench.redis.hlen("unacked") == 0, "nothing left unacknowledged")
    assert bench.worker.process.poll() is None


def test_terminate_drops_a_job_that_waits(bench: Bench) -> None:
    held = bench.hold_the_gate()
    waits = bench.send("waits", "gated")
    poll_until(lambda: bench.redis.hlen("unacked") == 2, "both jobs taken")
    bench.ask("revoke", task_id=[waits.id], terminate=True, signal="SIGTERM")
    bench.gate.unlink()
    with pytest.raises(TaskRevokedError):
        waits.get(timeout=20)
    assert held.get(timeout=20)["items"]


def test_terminate_of_a_started_job_ends_its_job_and_not_its_neighbours(bench: Bench) -> None:
    """A forward pass cannot be interrupted: its other jobs are answered, the terminated one is revoked."""
    held = bench.hold_the_gate()
    neighbour = bench.send("neighbour", "gated")
    poll_until(lambda: any(job["id"] == held.id for job in active(bench)), "the held job active")
    bench.ask("revoke", task_id=[held.id], terminate=True, signal="SIGKILL")
    with pytest.raises(TaskRevokedError, match="terminated"):
        held.get(timeout=20)
    bench.gate.unlink()
    assert neighbour.get(timeout=20)["items"]
    assert held.state == "REVOKED"


def started(bench: Bench, task: str) -> int:
    """Jobs of a task that were started since the worker began, as far as it has been told: it is after their answers,
    a moment later."""
    return int(bench.ask("stats")["total"].get(f"cortex.{task}", 0))


def active(bench: Bench) -> list[dict[str, Any]]:
    return list(bench.ask("active"))


def test_inspect_tells_who_is_active_reserved_and_scheduled(bench: Bench) -> None:
    held = bench.hold_the_gate()
    waits = bench.send("waits", "gated")
    later = bench.send("later", countdown=10)
    poll_until(lambda: [job["id"] for job in active(bench)] == [held.id], "one active job")
    poll_until(lambda: waits.id in {job["id"] for job in bench.ask("reserved")}, "one reserved job")
    poll_until(lambda: later.id in {job["request"]["id"] for job in bench.ask("scheduled")}, "one scheduled job")
    bench.gate.unlink()
    assert all(job.get(timeout=30) for job in (held, waits, later))


def test_a_job_for_later_than_the_lease_runs_once(bench: Bench) -> None:
    """The lease of the test fleet is 3 s: a scheduled job's claim is renewed, nobody takes it over."""
    started_s = time.time()
    result = bench.send("later", task="annotate", countdown=5)
    assert result.get(timeout=20)["items"]
    assert time.time() - started_s >= 5
    assert poll_until(lambda: started(bench, "annotate"), "a job that was started") == 1


def test_a_time_limit_given_with_a_call_breaks_nothing(bench: Bench) -> None:
    """The pool's passes are limited by the model's own ``time_limit_s``; per-call limits are not enforced."""
    assert bench.send("limited", time_limit=1, soft_time_limit=1).get(timeout=20)["items"]


def test_a_cancelled_queue_is_left_alone_until_it_is_consumed_again(bench: Bench) -> None:
    bench.ask("cancel_consumer", queue="echo")
    poll_until(lambda: "echo" not in bench.card().queues, "a card without the queue")
    waits = bench.send("waits")
    assert bench.send("served", "gated").get(timeout=20)["items"]
    assert bench.redis.llen("echo") == 1
    assert not waits.ready()
    bench.ask("add_consumer", queue="echo")
    assert waits.get(timeout=20)["items"]
    poll_until(lambda: "echo" in bench.card().queues, "a card with the queue")


def test_jobs_are_acknowledged_by_a_worker_that_consumes_nothing_any_more(bench: Bench) -> None:
    held = bench.hold_the_gate()
    for queue in ("echo", "gated"):
        bench.ask("cancel_consumer", queue=queue)
    try:
        bench.gate.unlink()
        assert held.get(timeout=20)["items"]
        poll_until(lambda: bench.redis.hlen("unacked") == 0, "the acknowledgement")
    finally:
        for queue in ("echo", "gated"):
            bench.ask("add_consumer", queue=queue)
    assert bench.send("again").get(timeout=20)["items"]


def test_a_queue_that_is_added_brings_its_models(bench: Bench) -> None:
    assert "slow" not in bench.card().queues
    bench.ask("add_consumer", queue="slow")
    assert bench.send("new here", "slow").get(timeout=20)["items"]
    poll_until(lambda: "slow" in {model.alias for model in bench.card().models}, "the model on the card")
    bench.ask("cancel_consumer", queue="slow")


def test_a_job_in_another_models_queue_says_so(bench: Bench) -> None:
    with pytest.raises(Exception, match="wrong queue"):
        bench.send("astray", "poison", queue="echo").get(timeout=20)


def test_a_rate_limit_slows_and_loses_nothing(bench: Bench) -> None:
    assert "ok" in bench.ask("rate_limit", task_name="cortex.embed", rate_limit="5/s")
    try:
        results = [bench.send(f"limited {n}") for n in range(6)]
        assert all(result.get(timeout=20)["items"] for result in results)
    finally:
        bench.ask("rate_limit", task_name="cortex.embed", rate_limit="0")


@pytest.mark.parametrize("command", ["pool_restart", "pool_grow", "autoscale"])
def test_what_the_pool_cannot_do_is_an_error_and_no_more(bench: Bench, command: str) -> None:
    arguments = {"pool_restart": {}, "pool_grow": {"n": 1}, "autoscale": {"max": 2, "min": 1}}[command]
    assert "error" in bench.ask(command, **arguments)
    assert bench.send("after").get(timeout=20)["items"]


def test_shutdown_ends_the_worker(tmp_path: Path, redis_url: str) -> None:
    with WorkerProcess(redis_url, tmp_path / "worker.log", queues="echo") as worker:
        app = Celery("plain", broker=redis_url, backend=redis_url, set_as_current=False)
        app.control.shutdown()
        assert worker.process.wait(30) == 0
        app.close()
