"""The only job of an idle worker is answered by the thread that computed it, once; any other by the hub."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from celery.worker import state as worker_state

from tests.support.pooled import PoolBench, PoolRequest
from tests.support.stub_models import PATIENCE_S
from workers import app as app_module
from workers.celery_hooks.backend import BatchedRedisBackend
from workers.celery_hooks.leases import LeasedQoS

HUB = threading.current_thread().name


class Stored:
    """What went to Redis: the thread that sent it, and the jobs. ``away``: errors that it meets first."""

    def __init__(self, bench: PoolBench, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bench = bench
        self.sent: list[tuple[str, list[str]]] = []
        self.away: list[Exception] = []
        monkeypatch.setattr(BatchedRedisBackend, "_flush_small", self._flush_small)

    def _flush_small(self, stored: Sequence[Any]) -> set[str]:
        if self.away:
            raise self.away.pop()
        self.sent.append((threading.current_thread().name, [entry.task_id for entry in stored]))
        return {entry.tag for entry in stored if entry.tag}

    @property
    def by(self) -> list[str]:
        return ["hub" if name == HUB else "runner" if name.startswith("runner") else name for name, _ in self.sent]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[PoolBench]:
    health = SimpleNamespace(start=lambda: None, stop=lambda: None, announce=lambda state: None, errors=0)
    monkeypatch.setattr(app_module, "Health", lambda **_: health)
    worker_state.reset_state()
    made = PoolBench(tracer="cortex")
    yield made
    made.adapter.gate.set()
    made.pool.on_stop(patience_s=0)
    worker_state.reset_state()


@pytest.fixture
def stored(bench: PoolBench, monkeypatch: pytest.MonkeyPatch) -> Stored:
    return Stored(bench, monkeypatch)


def send_leased(bench: PoolBench, job_id: str, *inputs: str) -> tuple[PoolRequest, set[str]]:
    """A job whose message may be acknowledged in Redis; and the tags that were."""
    request = PoolRequest(bench, job_id, *inputs)
    request.message.channel.qos = qos = LeasedQoS.__new__(LeasedQoS)
    qos.in_hand = set()
    qos.settled = set()
    bench.apply(request)
    return request, qos.settled


def test_a_lone_job_is_answered_by_its_runner_and_celery_hears_of_it(bench: PoolBench, stored: Stored) -> None:
    for n in range(3):
        request, settled = send_leased(bench, f"job {n}", "x")
        bench.turn_until(lambda: request.returned)  # noqa: B023
        assert request.log == ["accepted", "success", "acknowledged"]
        assert settled == {f"tag-job {n}"}, "Celery's own acknowledgement sends nothing"
    assert stored.by == ["runner"] * 3
    assert bench.traced == []
    assert (bench.pool.in_flight(), bench.pool.settled) == ({}, 3)


def test_jobs_together_are_answered_together_by_the_hub(bench: PoolBench, stored: Stored) -> None:
    bench.hold("held")
    others = [bench.send(f"job {n}", "x") for n in range(5)]
    bench.adapter.gate.set()
    bench.turn_until(lambda: all(one.acknowledged for one in others))
    assert "hub" in stored.by
    assert sorted(job_id for _, ids in stored.sent for job_id in ids) == ["held", *(f"job {n}" for n in range(5))]
    # At most the last one was alone.
    assert stored.by.count("runner") <= 1


def test_an_answer_that_could_not_be_stored_at_once_is_left_to_the_hub(bench: PoolBench, stored: Stored) -> None:
    stored.away = [redis.ConnectionError("away"), redis.TimeoutError("away")]
    request, _ = send_leased(bench, "a", "x")
    bench.turn_until(lambda: not stored.away)
    assert (request.log, stored.sent) == ([], [])
    (timer,) = bench.timers
    timer()
    assert request.log == ["accepted", "success", "acknowledged"]
    assert stored.by == ["hub"]
    later = bench.send("b", "y")
    bench.turn_until(lambda: later.acknowledged)
    assert stored.by == ["hub", "runner"]


def test_while_others_are_being_sent_the_hub_does_it(bench: PoolBench, stored: Stored) -> None:
    backend = bench.app.backend
    assert isinstance(backend, BatchedRedisBackend)
    bench.hold("a")
    with backend._sending:
        bench.adapter.gate.set()
        bench.runner_idle()
    bench.turn_until(lambda: bench.answered)
    assert stored.by == ["hub"]


def test_failures_are_the_hubs(bench: PoolBench, stored: Stored) -> None:
    bench.adapter.refuse = {"bad"}
    request = bench.send("mixed", "bad", "good")
    bench.turn_until(lambda: request.returned)
    assert stored.by == ["hub"]
    assert bench.app.cortex.health.errors == 1


@pytest.mark.parametrize("how", ["revoked", "terminated", "stopping"])
def test_what_came_while_it_ran_is_the_hubs_business(bench: PoolBench, stored: Stored, how: str) -> None:
    bench.adapter.gate.clear()
    bench.adapter.entered.clear()
    request = PoolRequest(bench, "a", "x")
    ticket = bench.apply(request)
    assert bench.adapter.entered.wait(PATIENCE_S)
    if how == "revoked":
        request._already_revoked = True
    elif how == "terminated":
        request.terminate(ticket)
    else:
        bench.pool._answers.draining = True
    bench.adapter.gate.set()
    bench.turn_until(lambda: not bench.pool.in_flight())
    assert stored.by == (["hub"] if how == "stopping" else [])


def test_terminate_comes_too_late_once_the_answer_is_stored(bench: PoolBench, stored: Stored) -> None:
    bench.adapter.gate.clear()
    bench.adapter.entered.clear()
    request = PoolRequest(bench, "a", "x")
    ticket = bench.apply(request)
    assert bench.adapter.entered.wait(PATIENCE_S)
    bench.adapter.gate.set()
    bench.runner_idle()
    assert stored.by == ["runner"]
    # The hub has heard of neither.
    request.terminate(ticket)
    bench.turn_until(lambda: request.acknowledged)
    assert request.log == ["accepted", "success", "acknowledged"]
    assert request._terminate_on_ack is None


def test_a_stop_hears_of_what_was_stored(bench: PoolBench, stored: Stored) -> None:
    request, settled = send_leased(bench, "a", "x")
    bench.runner_idle()
    assert request.log == []
    bench.pool.on_stop(patience_s=0)
    assert request.log == ["accepted", "success", "acknowledged"]
    assert settled == {"tag-a"}
    assert bench.given_back == []


def test_a_users_listener_gets_the_stock_tracer(bench: PoolBench, stored: Stored) -> None:
    from celery import signals

    def listener(**_: Any) -> None: ...

    signals.task_success.connect(listener)
    try:
        request = bench.send("a", "x")
        bench.turn_until(lambda: request.acknowledged)
    finally:
        signals.task_success.disconnect(listener)
    assert bench.traced == [("cortex.embed", "a")]
