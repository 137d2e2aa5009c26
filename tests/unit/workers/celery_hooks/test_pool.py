"""The pool between Celery's requests and the runners: the test's thread is the hub's."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from billiard.einfo import ExceptionInfo
from celery.worker import state as worker_state

from cortex_tasks.errors import CortexError, InvalidInput, UnknownModel
from tests.support.pooled import PoolBench, PoolRequest
from tests.support.stub_models import PATIENCE_S
from workers import app as app_module
from workers.celery_hooks import pool as pool_module
from workers.celery_hooks.backend import BatchedRedisBackend
from workers.celery_hooks.leases import LeasedQoS
from workers.celery_hooks.pool import Ticket


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[PoolBench]:
    health = SimpleNamespace(start=lambda: None, stop=lambda: None, announce=lambda state: None, errors=0)
    monkeypatch.setattr(app_module, "Health", lambda **_: health)
    worker_state.reset_state()
    made = PoolBench()
    yield made
    made.adapter.gate.set()
    made.pool.on_stop(patience_s=0)
    worker_state.reset_state()


def said(request: PoolRequest) -> Any:
    failed, returned, _ = request.returned
    assert not failed, returned
    return [item["value"]["said"] for item in returned.items]


# ------------------------------------------------------------------------------------------------ answers


def test_each_job_gets_its_own_answer_and_its_own_number(bench: PoolBench) -> None:
    requests = [bench.send(f"job {n}", f"text {n}") for n in range(10)]
    bench.turn_until(lambda: len(bench.answered) == 10)
    assert [said(request) for request in requests] == [[f"text {n}"] for n in range(10)]
    assert all(request.log == ["accepted", "success", "acknowledged"] for request in requests)
    assert len({request.pid for request in requests}) == 10
    assert bench.pool.in_flight() == {}


def test_the_runtime_includes_the_models_time(bench: PoolBench) -> None:
    held = bench.hold("held")
    time.sleep(0.01)
    bench.adapter.gate.set()
    bench.turn_until(lambda: held.returned)
    assert held.returned[2] >= 0.01


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"model": "nowhere"}, UnknownModel),
        ({"zzz": 1}, CortexError),
        ({"payload": ([], {}, None)}, InvalidInput),
    ],
)
def test_a_wrong_job_fails_at_once_and_is_counted(
    bench: PoolBench, given: dict[str, Any], expected: type[CortexError]
) -> None:
    request = bench.send("wrong", "x", **given)
    assert request.returned[0] == 1
    assert isinstance(request.returned[1], expected)
    assert request.acknowledged
    assert bench.app.cortex.health.errors == 1


def test_a_job_that_breaks_its_reading_is_answered(bench: PoolBench, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RecursionError("too deep")

    monkeypatch.setattr(pool_module, "to_job", fail)
    request = bench.send("deep", "x")
    assert isinstance(request.returned[1], InvalidInput)
    assert "RecursionError" in str(request.returned[1])


@pytest.mark.parametrize(
    ("job_id", "payload"),
    [
        (5, ([], {"inputs": ["x"]}, {})),
        (["a"], ([], {"inputs": ["x"]}, {})),
        ("a", ("x", {}, {})),
        ("a", ([], [1], {})),
        ("a", ([], {"inputs": ["x"]}, [1])),
        ("a", ([], {"inputs": ["x"]}, 5)),
        ("\ud800", ([], {"inputs": ["x"]}, {})),
    ],
)
def test_what_celery_could_not_settle_is_left_to_the_transport(bench: PoolBench, job_id: Any, payload: Any) -> None:
    """It parks what raises here."""
    with pytest.raises((TypeError, UnicodeEncodeError)):
        bench.send(job_id, payload=payload)
    assert bench.pool.in_flight() == {}


def test_errors_of_inputs_are_counted(bench: PoolBench) -> None:
    bench.adapter.refuse = {"bad"}
    request = bench.send("mixed", "bad", "good", "")
    bench.turn_until(lambda: request.returned)
    assert bench.app.cortex.health.errors == 2


def test_a_users_own_task_runs_at_once(bench: PoolBench) -> None:
    def own() -> int:
        return 7

    bench.app.task(own, name="own", shared=False)
    request = bench.send("own", task="own", payload=([], {}, {}))
    assert request.log == ["accepted", "success", "acknowledged"]
    assert request.returned[1] == 7


def test_a_tracer_that_raises_fails_its_job_alone(bench: PoolBench) -> None:
    bench.trace_failure = LookupError("a defect of the tracer")
    request = bench.send("a", "x")
    bench.turn_until(lambda: request.returned)
    assert isinstance(request.returned, ExceptionInfo)
    assert request.log == ["accepted", "failure"]
    bench.trace_failure = None
    after = bench.send("b", "y")
    bench.turn_until(lambda: after.returned)
    assert said(after) == ["y"]


# --------------------------------------------------------------------------------------------- Redis away


def test_results_wait_for_redis_and_no_job_is_acknowledged_before(
    bench: PoolBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(BatchedRedisBackend, "flush", lambda self: raise_(redis.ConnectionError("away")))
        requests = [bench.send(f"job {n}", "x") for n in range(3)]
        bench.turn_until(lambda: len(bench.traced) == 3)
        assert not any(request.acknowledged for request in requests)
        assert bench.pool.in_flight() == {"m": 3}
    (timer,) = bench.timers
    timer()
    assert bench.answered == ["job 0", "job 1", "job 2"]
    assert all(request.acknowledged for request in requests)
    assert len(bench.traced) == 3, "traced once"


def test_a_callback_that_finds_redis_away_leaves_the_job_to_its_lease(bench: PoolBench) -> None:
    request = PoolRequest(bench, "a", "x")
    qos = LeasedQoS.__new__(LeasedQoS)
    qos.in_hand = set()
    let_go: list[str] = []
    qos.let_go = let_go.append  # type: ignore[method-assign]
    request.message.channel.qos = qos
    request.on_callback = lambda: raise_(redis.ConnectionError("away"))
    bench.apply(request)
    after = bench.send("b", "y")
    bench.turn_until(lambda: after.acknowledged)
    assert not request.acknowledged
    assert let_go == ["tag-a"]
    assert bench.pool.in_flight() == {}


def test_a_users_callback_that_fails_does_not_bring_the_job_back(bench: PoolBench) -> None:
    request = PoolRequest(bench, "a", "x")
    request.on_callback = lambda: raise_(ValueError("a user's errback"))
    bench.apply(request)
    bench.turn_until(lambda: request.acknowledged)


def test_a_start_that_cannot_be_told_does_not_lose_the_job(bench: PoolBench) -> None:
    request = PoolRequest(bench, "a", "x")
    request.on_start = lambda: raise_(redis.ConnectionError("away"))
    bench.apply(request)
    bench.turn_until(lambda: request.acknowledged)
    assert said(request) == ["x"]


def test_a_suspect_is_not_failed_because_redis_is_away(bench: PoolBench) -> None:
    """Nobody answers at the broker's address: its attempts cannot be counted."""
    request = bench.send("suspect", "x", redelivered=True)
    bench.turn_until(lambda: request.returned)
    assert said(request) == ["x"]


# ----------------------------------------------------------------------------------- revoked and terminated


def test_a_revoked_job_is_dropped_before_its_pass(bench: PoolBench) -> None:
    held = bench.hold("held")
    waits = bench.send("waits", "never")
    worker_state.revoked.add("waits")
    waits.is_revoked = lambda: True
    bench.adapter.gate.set()
    bench.turn_until(lambda: held.returned and not bench.pool.in_flight())
    assert waits.log == []
    assert bench.adapter.passes == [["warm"], ["held"]]


@pytest.mark.parametrize(
    ("stamps", "is_revoked"),
    [
        ({"tenant": "a"}, True),
        ({"tenant": ["b", "a"]}, True),
        ({"tenant": "b"}, False),
        ({"tenant": None}, False),
        ({}, False),
    ],
)
def test_a_job_that_waits_is_revoked_by_its_stamp(bench: PoolBench, stamps: dict[str, Any], is_revoked: bool) -> None:
    held = bench.hold("held")
    waits = bench.send("waits", "y", stamps=stamps)
    worker_state.revoked_stamps.update({"tenant": ["a", "c"], "other": "b"})
    waits.is_revoked = lambda: is_revoked
    bench.adapter.gate.set()
    bench.turn_until(lambda: held.returned and not bench.pool.in_flight())
    assert bench.adapter.passes == [["warm"], ["held"], *([] if is_revoked else [["y"]])]


def test_a_drop_that_fails_costs_the_neighbours_nothing(bench: PoolBench) -> None:
    held = bench.hold("held")
    waits, neighbour = bench.send("waits", "never"), bench.send("neighbour", "y")
    worker_state.revoked.add("waits")
    waits.is_revoked = lambda: raise_(ValueError("a defect"))
    bench.adapter.gate.set()
    bench.turn_until(lambda: held.returned and neighbour.returned)
    assert said(neighbour) == ["y"]


def test_terminate_drops_a_waiting_job_and_lets_a_started_one_finish(bench: PoolBench) -> None:
    held = bench.hold("held")
    waits = PoolRequest(bench, "waits", "never")
    ticket = bench.apply(waits)
    assert isinstance(ticket, Ticket)
    # Nobody is woken to tell of a start; the timer does, if nothing else comes.
    (timer,) = bench.timers
    timer()
    assert held.log == ["accepted"]
    ticket.terminate("SIGTERM")
    assert held.pid is not None
    bench.pool.terminate_job(held.pid)
    bench.pool.terminate_job(999_999)
    bench.adapter.gate.set()
    bench.turn_until(lambda: held.returned and not bench.pool.in_flight())
    assert waits.log == ["given back"]
    assert said(held) == ["held"]


def test_a_job_that_was_revoked_while_it_ran_is_not_answered(bench: PoolBench) -> None:
    held = bench.hold("held")
    held._already_revoked = True
    bench.adapter.gate.set()
    bench.turn_until(lambda: not bench.pool.in_flight())
    assert held.log == ["accepted"]
    assert bench.traced == []


def test_a_job_that_is_terminated_while_it_runs_is_not_answered(bench: PoolBench) -> None:
    bench.adapter.gate.clear()
    bench.adapter.entered.clear()
    runs = PoolRequest(bench, "runs", "x")
    ticket = bench.apply(runs)
    assert bench.adapter.entered.wait(PATIENCE_S)
    runs.terminate(ticket)
    assert runs.log == []
    bench.adapter.gate.set()
    bench.turn_until(lambda: not bench.pool.in_flight())
    assert runs.log == ["accepted", "terminated", "acknowledged"]
    assert bench.traced == []


@pytest.mark.parametrize("runs", [True, False])
def test_terminate_comes_too_late_while_the_answer_waits_for_redis(
    bench: PoolBench, monkeypatch: pytest.MonkeyPatch, runs: bool
) -> None:
    request = PoolRequest(bench, "late", "x", **({} if runs else {"model": "nowhere"}))
    with monkeypatch.context() as patched:
        patched.setattr(BatchedRedisBackend, "flush", lambda self: raise_(redis.ConnectionError("away")))
        ticket = bench.apply(request)
        bench.turn_until(lambda: bench.traced)
        request.terminate(ticket)
    (timer,) = bench.timers
    timer()
    assert request.log == ["accepted", "success", "acknowledged"]


def test_an_expired_job_is_dropped(bench: PoolBench) -> None:
    request = PoolRequest(bench, "late", "x")
    request.is_revoked = lambda: True
    bench.apply(request, {"expires": "2001-01-01T00:00:00+00:00"})
    bench.turn_until(lambda: not bench.pool.in_flight())
    assert bench.traced == []


# ------------------------------------------------------------------------------------------------ stopping


def test_a_stop_answers_what_has_started_and_gives_back_the_rest_in_order(bench: PoolBench) -> None:
    held = bench.hold("held")
    waits = [bench.send(f"waits {n}", "x") for n in range(3)]
    bench.app.cortex.stop_runners()
    bench.adapter.gate.set()
    bench.pool.on_stop()
    assert held.log == ["accepted", "success", "acknowledged"]
    # The one given back last is next in line.
    assert bench.given_back == ["waits 2", "waits 1", "waits 0"]
    assert all(request.log == ["given back"] for request in waits)
    assert bench.pool.in_flight() == {}


def test_a_stop_does_not_wait_for_ever_for_redis(bench: PoolBench, monkeypatch: pytest.MonkeyPatch) -> None:
    request = bench.send("a", "x")
    with monkeypatch.context() as patched:
        patched.setattr(BatchedRedisBackend, "flush", lambda self: raise_(redis.ConnectionError("away")))
        bench.turn_until(lambda: len(bench.traced) == 1)
        bench.pool.on_terminate()
    assert not request.acknowledged


@pytest.mark.parametrize("exit_code", [True, 0])
def test_a_cold_shutdown_does_nothing_within_the_signals_handler(
    bench: PoolBench, monkeypatch: pytest.MonkeyPatch, exit_code: object
) -> None:
    """Celery stops the pool there, perhaps in the middle of what a stop would wait for."""
    request = bench.send("a", "x")
    monkeypatch.setattr(worker_state, "should_terminate", exit_code)
    with monkeypatch.context() as patched:
        patched.setattr(BatchedRedisBackend, "flush", lambda self: raise_(AssertionError("it would deadlock")))
        bench.pool.on_stop()
        assert request.log == []
    bench.pool.on_terminate()
    assert request.log in (["accepted", "success", "acknowledged"], ["given back"])


def test_a_terminate_that_cannot_be_told_leaves_the_job_to_its_lease(
    bench: PoolBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = bench.hold("held")
    waits = PoolRequest(bench, "waits", "never")
    ticket = bench.apply(waits)
    let_go: list[Any] = []
    monkeypatch.setattr(pool_module.leases, "let_go", let_go.append)
    waits.on_start = lambda: raise_(redis.ResponseError("OOM"))
    waits.terminate(ticket)
    bench.adapter.gate.set()
    bench.turn_until(lambda: held.returned and not bench.pool.in_flight())
    assert (waits.log, let_go) == ([], [waits.message])


# --------------------------------------------------------------------------------------------------- shown


def test_the_info_page_tells_of_batches(bench: PoolBench) -> None:
    for n in range(3):
        request = bench.send(str(n), "x")
        bench.turn_until(lambda request=request: request.acknowledged)
    info = bench.pool._get_info()
    assert info["jobs-in-flight"] == 0
    assert info["model-m"] == "ready, 3 jobs, 3 items in 3 batches (mean 1.0)"


def raise_(error: Exception) -> Any:
    raise error


def test_an_answer_comes_before_the_news_of_its_start(bench: PoolBench, monkeypatch: pytest.MonkeyPatch) -> None:
    held = bench.hold("held")
    traced: list[int] = []
    ticket = next(iter(bench.pool._tickets.values()))
    monkeypatch.setattr(ticket, "accept", lambda *_: traced.append(len(bench.traced)))
    bench.adapter.gate.set()
    bench.turn_until(lambda: held.returned)
    assert traced == [1]


def test_a_start_is_told_though_another_jobs_answer_breaks(bench: PoolBench, monkeypatch: pytest.MonkeyPatch) -> None:
    held = bench.hold("held")
    with monkeypatch.context() as patched:
        patched.setattr(bench.pool._answers, "complete", lambda _: raise_(RuntimeError("a defect")))
        (timer,) = bench.timers
        with pytest.raises(RuntimeError, match="a defect"):
            timer()
    assert held.log == ["accepted"]
    bench.adapter.gate.set()
    bench.turn_until(lambda: held.returned)


def test_a_start_is_told_before_the_drop_of_its_job(bench: PoolBench, monkeypatch: pytest.MonkeyPatch) -> None:
    held = bench.hold("held")
    told: list[str] = []
    ticket = next(iter(bench.pool._tickets.values()))
    monkeypatch.setattr(ticket, "accept", lambda *_: told.append("start"))
    monkeypatch.setattr(bench.pool, "_drop", lambda _: told.append("drop"))
    bench.pool.dropped([ticket.job])
    bench.turn_until(lambda: "drop" in told)
    assert told == ["start", "drop"]
    bench.adapter.gate.set()
    bench.turn_until(lambda: held.returned)
