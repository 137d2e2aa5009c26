"""What Celery's timers hand on, and what is done while the broker is away."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import redis
from celery import Celery
from celery.exceptions import WorkerShutdown
from celery.worker import state as worker_state
from kombu.utils.limits import TokenBucket

from workers.celery_hooks.consumer import CortexConsumer
from workers.celery_hooks.pool import BatchingPool


class Request:
    """What the consumer touches of it. ``error``: what its handing on raises."""

    def __init__(self, bench: Bench, tag: str, error: Exception | None = None) -> None:
        self.id = tag
        self.message = SimpleNamespace(delivery_tag=tag, channel=bench)
        self.error = error


class Bench:
    """A consumer without a worker; its channel as well."""

    def __init__(self, pool: Any = None) -> None:
        self.handed_on: list[Request] = []
        self.refused: list[tuple[str, Exception]] = []
        app = Celery("bench", set_as_current=False)
        self.consumer = CortexConsumer(
            self.hand_on,
            app=app,
            pool=pool or Mock(),
            timer=Mock(),
            controller=Mock(),
            hostname="bench",
            initial_prefetch_count=1,
        )
        self.consumer.qos = Mock()

    def hand_on(self, request: Request) -> None:
        if request.error is not None:
            raise request.error
        self.handed_on.append(request)

    def refuse(self, tag: str, error: Exception) -> None:
        if isinstance(error, redis.ConnectionError):
            raise error
        self.refused.append((tag, error))


@pytest.fixture
def bench() -> Iterator[Bench]:
    worker_state.reset_state()
    yield Bench()
    worker_state.reset_state()


@pytest.mark.parametrize("error", [None, TypeError("no job")])
def test_a_countdown_that_is_over_frees_its_place_whatever_comes_of_it(bench: Bench, error: Exception | None) -> None:
    request = Request(bench, "a", error)
    bench.consumer.apply_eta_task(request)
    assert bench.handed_on == ([] if error else [request])
    assert bench.refused == ([("a", error)] if error else [])
    bench.consumer.qos.decrement_eventually.assert_called_once_with()


def test_a_rate_limit_goes_on_behind_a_message_that_is_refused(bench: Bench) -> None:
    error = ValueError("no job")
    first, bad, last = Request(bench, "a"), Request(bench, "b", error), Request(bench, "c")
    bucket = TokenBucket(1, capacity=3)
    for request in (first, bad):
        bucket.add((request, 1))
    bench.consumer._limit_task(last, bucket, 1)
    assert (bench.handed_on, bench.refused) == ([first, last], [("b", error)])


def test_a_lost_connection_is_told_to_the_hub(bench: Bench) -> None:
    with pytest.raises(redis.ConnectionError):
        bench.consumer.apply_eta_task(Request(bench, "a", redis.ConnectionError("gone")))


class Broker:
    """A connection that is made at the fourth second."""

    def ensure_connection(self, on_error: Any, max_retries: Any, callback: Any) -> Broker:
        for _ in range(3):
            callback()
        return self


@pytest.mark.parametrize(("kind", "flushes"), [(BatchingPool, 3), (Mock, 0)])
def test_answers_leave_while_the_broker_is_away(kind: type, flushes: int) -> None:
    """A pool of Celery's own is left alone: what its ``flush`` does is for once a connection."""
    pool = Mock(spec=kind) if kind is BatchingPool else Mock()
    consumer, broker = Bench(pool).consumer, Broker()
    assert consumer.ensure_connected(broker) is broker
    assert pool.flush.call_count == flushes
    assert "ensure_connection" not in vars(broker)


def test_a_worker_that_is_to_stop_waits_for_no_broker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_state, "should_stop", 0)
    broker = Broker()
    with pytest.raises(WorkerShutdown):
        Bench(Mock(spec=BatchingPool)).consumer.ensure_connected(broker)
    assert "ensure_connection" not in vars(broker)
