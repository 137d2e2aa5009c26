"""The card and the watchdog."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from cortex_tasks.presence import WORKERS_KEY, read_cards, worker_key
from tests.support.stub_models import PATIENCE_S, StubAdapter, fleet_of, ready, registry_of
from tests.support.worker_process import poll_until
from workers import heartbeat
from workers.children import START_LIMIT_S
from workers.health import HUNG_EXIT_CODE, Health, RateMeter
from workers.registry import Registry
from workers.runner import Running

# ------------------------------------------------------------------------------------------------- rates


def test_a_rate_is_that_of_the_window() -> None:
    meter = RateMeter(window_s=10.0)
    assert meter.update(0.0, 100) == 0.0
    assert meter.update(2.0, 120) == pytest.approx(10.0)
    assert meter.update(4.0, 120) == pytest.approx(5.0)
    for second in range(5, 40):
        rate = meter.update(float(second), 120)
    assert rate == 0.0


def test_a_clock_that_stands_still_gives_no_rate() -> None:
    meter = RateMeter()
    meter.update(1.0, 5)
    assert meter.update(1.0, 50) == 0.0


@given(st.lists(st.tuples(st.floats(0.001, 60), st.integers(0, 1000)), min_size=1, max_size=50))
def test_a_growing_total_never_gives_a_negative_rate(steps: list[tuple[float, int]]) -> None:
    meter, now_s, total = RateMeter(), 0.0, 0
    for wait_s, more in steps:
        now_s, total = now_s + wait_s, total + more
        assert meter.update(now_s, total) >= 0.0


# ------------------------------------------------------------------------------------------------- cards


class Bench:
    def __init__(self, connect: Any = None, beats_in: Path = Path("/nonexistent"), **models: dict[str, Any]) -> None:
        self.registry: Registry = registry_of(fleet_of(**(models or {"m": {"limits": {"time_limit_s": 10}}})))
        self.runner = SimpleNamespace(running=())
        self.queues = ["m"]
        self.exits: list[int] = []
        self.held, self.settled, self.held_up = 3, 0, False
        self.health = Health(
            node="node@host",
            image="nlp",
            host="host",
            queues=lambda: self.queues,
            registry=self.registry,
            runners=lambda: [self.runner],  # type: ignore[list-item]
            in_flight=lambda: {"m": self.held},
            connect=connect or (lambda: None),
            settled=lambda: self.settled,
            held_up=lambda: self.held_up,
            beats_in=beats_in,
            exit_process=self.exits.append,
        )


def test_a_card_tells_what_is() -> None:
    bench = Bench()
    ready(bench.registry, "m", StubAdapter())
    model = bench.registry.model("m")
    model.jobs, model.items, bench.health.errors = 4, 9, 2
    bench.queues.append("added")
    card = bench.health.card()
    assert (card.node, card.image, card.host, card.pid) == ("node@host", "nlp", "host", os.getpid())
    assert (card.state, card.queues) == ("starting", ("m", "added"))
    assert (card.jobs, card.items, card.errors, card.in_flight) == (4, 9, 2, {"m": 3})
    assert card.models[0].state == "ready"


def test_the_card_is_written_with_a_time_to_live_and_taken_away(redis_url: str) -> None:
    bench = Bench(lambda: redis.Redis.from_url(redis_url))
    with redis.Redis.from_url(redis_url) as client:
        bench.health.publish()
        (card,) = read_cards(client)
        assert card.node == "node@host"
        assert 0 < client.ttl(worker_key("node@host")) <= 15
        client.zadd(WORKERS_KEY, {"long gone": 1.0})
        bench.health.start()
        bench.health.announce("ready")
        bench.health.stop()
        assert client.keys("cortex:worker*") == []
    assert not bench.health.is_alive()


def test_a_redis_that_is_away_does_not_end_the_thread() -> None:
    tried = threading.Semaphore(0)

    def connect() -> Any:
        tried.release()
        raise redis.ConnectionError("away")

    bench = Bench(connect)
    bench.health.start()
    for _ in range(3):
        assert tried.acquire(timeout=PATIENCE_S)
        bench.health.announce("ready")
    bench.health.stop()
    assert not bench.health.is_alive()


# ----------------------------------------------------------------------------------------------- watchdog


@pytest.mark.parametrize(
    ("running", "hung"),
    [
        ((), False),
        ((Running("m", 100.0),), True),
        ((Running("m", 190.5),), False),
        ((Running("m", 190.5), Running("m", 100.0)), True),
    ],
)
def test_only_a_pass_over_its_limit_ends_the_process(running: tuple[Running, ...], hung: bool) -> None:
    bench = Bench()
    bench.runner.running = running
    bench.health.check_progress(200.0)
    assert bench.exits == ([HUNG_EXIT_CODE] if hung else [])


@pytest.mark.parametrize(("time_limit_s", "step_s"), [(10, START_LIMIT_S), (200, 200)])
def test_a_host_of_children_gets_twice_the_time_from_its_last_step_on(time_limit_s: int, step_s: float) -> None:
    bench = Bench(m={"limits": {"time_limit_s": time_limit_s}, "children": 1})
    bench.runner.running = (Running("m", 1_000.0),)
    bench.health.check_progress(999.0 + 2 * step_s)
    bench.registry.model("m").adapter = adapter = StubAdapter()
    bench.health.check_progress(999.0 + 2 * step_s)
    adapter.progressed_s = 2_000.0
    bench.health.check_progress(1_999.0 + 2 * step_s)
    assert bench.exits == []
    bench.health.check_progress(2_001.0 + 2 * step_s)
    assert bench.exits == [HUNG_EXIT_CODE]


# --------------------------------------------------------------------------------------------- heartbeats


def alive(bench: Bench, *, redis_answers: bool = True) -> None:
    bench.health._answered_at_s = float("inf") if redis_answers else float("-inf")


def test_jobs_held_without_an_answer_make_a_worker_dead() -> None:
    bench = Bench()
    alive(bench)
    assert bench.health.beat(100.0).why_dead(100.0) == ""
    assert bench.health.beat(219.0).why_dead(219.0) == ""
    assert "finished nothing for 121 s" in bench.health.beat(221.0).why_dead(221.0)
    bench.settled += 1
    assert bench.health.beat(222.0).why_dead(222.0) == ""


def test_a_batch_is_progress_even_if_its_job_is_not_through() -> None:
    bench = Bench()
    alive(bench)
    bench.health.beat(0.0)
    bench.registry.model("m").batches += 1
    assert bench.health.beat(171.0).stalled_s == 0.0


def test_a_worker_whose_redis_is_away_is_not_to_blame() -> None:
    bench = Bench()
    alive(bench)
    bench.health.beat(0.0)
    alive(bench, redis_answers=False)
    assert bench.health.beat(1_000.0).why_dead(1_000.0) == ""
    alive(bench)
    assert bench.health.beat(1_001.0).stalled_s == pytest.approx(1.0)


def test_an_idle_worker_may_idle() -> None:
    bench = Bench()
    alive(bench)
    bench.held = 0
    bench.health.beat(0.0)
    assert bench.health.beat(1e6).stalled_s == 0.0


@pytest.mark.parametrize("excuse", ["a pass runs", "a model is loaded", "answers wait for Redis"])
def test_what_ends_by_itself_is_no_standstill(excuse: str) -> None:
    bench = Bench()
    alive(bench)
    bench.health.beat(0.0)
    bench.runner.running = (Running("m", 0.0),) if excuse == "a pass runs" else ()
    bench.registry.model("m").state = "loading" if excuse == "a model is loaded" else "ready"
    bench.held_up = excuse == "answers wait for Redis"
    assert bench.health.beat(1_000.0).stalled_s == 0.0


def test_a_heartbeat_names_the_pinned_models() -> None:
    bench = Bench(m={"load": "pinned"}, other={})
    ready(bench.registry, "m", StubAdapter())
    assert bench.health.beat(0.0).pinned == {"m": "ready"}


def test_the_thread_leaves_a_heartbeat_while_redis_is_away_and_takes_it_along(tmp_path: Path) -> None:
    told = threading.Event()

    def connect() -> Any:
        # Nobody answers, not even with a no: for as long as the test takes.
        told.wait(PATIENCE_S)
        raise redis.ConnectionError("away")

    bench = Bench(connect, beats_in=tmp_path)
    bench.health.start()
    bench.health.announce("ready")
    poll_until(lambda: any(beat.state == "ready" for beat in heartbeat.beats(tmp_path)), "it beats")
    (beat,) = heartbeat.beats(tmp_path)
    assert (beat.pid, beat.node, beat.state) == (os.getpid(), "node@host", "ready")
    told.set()
    bench.health.stop()
    assert heartbeat.beats(tmp_path) == []


def test_a_directory_that_cannot_be_written_is_told_once(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    bench = Bench(beats_in=tmp_path / "file" / "below")
    for _ in range(2):
        bench.health._leave_beat()
    assert [record.levelname for record in caplog.records] == ["WARNING"]


# ------------------------------------------------------------------------------------------------- models


def test_a_card_tells_the_memory_of_models_and_what_each_tier_did(redis_url: str) -> None:
    bench = Bench(connect=lambda: redis.Redis.from_url(redis_url), m={})
    bench.registry.load("m")
    assert bench.registry.hold(bench.registry.model("m"))
    store = bench.health.card().store
    assert store.memory_bytes == 7
    assert store.memory_limit_bytes == bench.registry.memory.budget_bytes
    assert store.tiers["memory"].hits == 1
    assert (store.evictions, store.reloads) == (0, 0)


def test_the_jobs_that_wait_in_a_queue_are_its_models_demand(redis_url: str) -> None:
    bench = Bench(connect=lambda: redis.Redis.from_url(redis_url), m={})
    bench.registry.load("m")
    with redis.Redis.from_url(redis_url) as client:
        client.lpush("m", "one", "two")
        client.lpush("m\x06\x169", "bulk")
    bench.health.publish()
    resident = bench.registry.memory._residency.residents["m"]
    assert resident.waiting == 3.0
