"""Warming: when, what, by whom, and where it ends. Redis is real; the desk and the clocks are the test's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from cortex_tasks.cache.counters import Counters
from cortex_tasks.cache.names import entry_prefix
from cortex_tasks.cache.popular import Samples, tell_samples
from cortex_tasks.config import CacheWarming
from cortex_tasks.errors import ModelUnavailable
from cortex_tasks.keys import Address
from cortex_tasks.payloads import EmbedParams
from tests.support.stub_models import Listener, StubAdapter, fleet_of, job, ready, registry_of
from workers.runtime import Job
from workers.warming import JOB_INPUTS, Gate, Warmer

CANONICAL = EmbedParams().canonical()


class Bench:
    """One worker that serves ``m`` (loaded) and ``lazy`` (not). A job that is submitted is computed at once."""

    def __init__(self, raw: Any, **config: Any) -> None:
        self.raw = raw
        self.at_s = float(raw.time()[0] // 3_600 * 3_600 + 1_800)
        self.now_s = 50.0
        self.registry = registry_of(fleet_of(m={}, lazy={}, never={"cache": "never"}), lambda: self.now_s)
        ready(self.registry, "m", StubAdapter())
        self.listener = Listener()
        self.gate = Gate(self.listener)
        self.counters = Counters()
        self.jobs: list[Job] = []
        self.busy: Callable[[], bool] = bool
        self.compute: Callable[[Job], None] = self.answered
        self.warmer = Warmer(
            CacheWarming.model_validate({"schedule": "0 * * * *", **config}), self.registry, raw, self.submit,
            lambda: self.busy(), self.counters, clock=lambda: self.now_s, wall_clock=lambda: self.at_s, start_s=0.0,
        )  # fmt: skip

    def submit(self, job: Job) -> None:
        self.jobs.append(job)
        self.compute(job)

    def answered(self, job: Job) -> None:
        """As desk and runner do: the first job of a model loads it; answers are stored."""
        if self.registry.model(job.model).state != "ready":
            ready(self.registry, job.model, StubAdapter())
        for index, value in job.good_inputs():
            self.store(value, job.model)
            job.settle(index, {"data": b"", "truncated": False})
        self.gate.finished([job])

    def ask(self, *texts: str, alias: str = "m", weight: float = 1.0, canonical: str = CANONICAL) -> None:
        """So often each of these was asked for, the first the most."""
        quoted = canonical.replace('"', '\\"')
        weights = {f'["embed","{quoted}","{text}"]'.encode(): weight + 1 / (at + 2) for at, text in enumerate(texts)}
        with self.raw.pipeline(transaction=False) as pipe:
            tell_samples(pipe, Samples(self.at_s, 10_000, {alias: weights}))
            pipe.execute()

    def store(self, text: str, alias: str = "m") -> None:
        key = Address("embed", alias, "rev", CANONICAL).key(text)
        self.raw.set(entry_prefix(alias) + key, b"known")

    def hour(self) -> None:
        """The next scheduled moment comes."""
        self.at_s += 3_600 - self.at_s % 3_600
        self.warmer.turn()

    @property
    def warmed(self) -> list[Any]:
        return [value for job in self.jobs for value in job.inputs]

    def counts(self, alias: str = "m") -> dict[str, int]:
        return self.counters.take().get(alias, {})


@pytest.fixture
def raw(redis_url: str) -> Iterator[Any]:
    with redis.Redis.from_url(redis_url) as raw:
        yield raw


@pytest.fixture
def bench(raw: Any) -> Bench:
    return Bench(raw)


def test_at_the_scheduled_moment_what_is_not_stored_is_computed_the_most_frequent_first(bench: Bench) -> None:
    bench.ask("a", "b", "c")
    bench.store("b")
    bench.warmer.turn()
    bench.at_s += 1_799
    bench.warmer.turn()
    assert bench.jobs == []
    bench.at_s += 1
    bench.warmer.turn()
    assert bench.warmed == ["a", "c"]
    assert [(job.lane, job.cache, job.params) for job in bench.jobs] == [("bulk", "use", EmbedParams())]
    assert bench.counts() == {"warmings": 1, "warmed": 2}
    bench.at_s += 60
    bench.warmer.turn()
    assert len(bench.jobs) == 1


def test_one_worker_of_a_model_does_it_at_each_moment(bench: Bench, raw: Any) -> None:
    other = Bench(raw)
    bench.ask("a")
    bench.hour()
    other.hour()
    assert (len(bench.jobs), len(other.jobs)) == (1, 0)
    [lease] = raw.keys("cortex:cache:warm:m:*")
    assert 600 < raw.ttl(lease) <= 660
    bench.ask("b")
    other.at_s = bench.at_s
    other.hour()
    bench.hour()
    assert (bench.warmed, other.warmed) == (["a"], ["b"])


def test_only_so_many_inputs_of_only_so_many_models(raw: Any) -> None:
    bench = Bench(raw, models=1, inputs=2)
    bench.ask("a", "b", "c", weight=5)
    bench.ask("x", alias="lazy")
    bench.hour()
    assert bench.warmed == ["a", "b"]


def test_a_popular_model_that_is_not_in_memory_is_loaded_where_there_is_room(bench: Bench) -> None:
    bench.ask("a", "c", "d", alias="lazy", weight=9)
    bench.ask("b")
    bench.hour()
    # Loaded models first: workers that have the other one loaded get the start of it. Its own first job loads it.
    assert [(job.model, job.inputs) for job in bench.jobs] == [("m", ["b"]), ("lazy", ["a"]), ("lazy", ["c", "d"])]
    assert bench.counts("lazy") == {"warmings": 1, "warmed": 3}


def test_nobody_in_memory_has_to_go(bench: Bench) -> None:
    bench.registry.model("lazy").size_bytes = bench.registry.memory.budget_bytes - 6
    bench.ask("a", alias="lazy")
    bench.hour()
    assert bench.jobs == []
    assert bench.registry.model("lazy").state == "idle"


def test_a_model_that_cannot_be_had_does_not_keep_the_next_from_being_warmed(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    def compute(job: Job) -> None:
        if job.model == "m":
            job.failure = ModelUnavailable("gone")
            bench.gate.finished([job])
        else:
            bench.answered(job)

    bench.registry.model("m").state = "idle"
    bench.compute = compute
    bench.ask("a", weight=9)
    bench.ask("b", alias="lazy")
    bench.hour()
    assert [(job.model, job.inputs) for job in bench.jobs] == [("m", ["a"]), ("lazy", ["b"])]
    assert "model m is not warmed" in caplog.text


def test_the_thread_that_warms_loads_nothing_itself(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A load of its own would leave jobs parked that came meanwhile: they wait for the load of a job."""
    monkeypatch.setattr(bench.registry, "load", None)
    bench.ask("a", alias="lazy")
    bench.hour()
    assert bench.warmed == ["a"]


def test_a_model_stays_in_memory_while_it_is_warmed(bench: Bench) -> None:
    held: list[int] = []

    def compute(job: Job) -> None:
        held.append(bench.registry.memory._residency.residents["m"].holds)
        bench.answered(job)

    bench.compute = compute
    bench.ask("a")
    bench.hour()
    assert held == [1]
    assert bench.registry.memory._residency.residents["m"].holds == 0


def test_what_this_worker_would_refuse_or_does_not_cache_is_left_out(bench: Bench) -> None:
    bench.ask("a", " ", "x" * 10_001)
    bench.ask("b", canonical='{"normalise":1}')
    bench.ask("c", canonical="[]")
    bench.ask("d", canonical="{")
    # Written in another way than this version does: its entry would be looked for elsewhere.
    bench.ask("e", canonical="{}")
    bench.ask("f", alias="never")
    bench.ask("g", alias="unknown")
    bench.hour()
    assert bench.warmed == ["a"]


def test_jobs_are_small_and_one_at_a_time(bench: Bench) -> None:
    texts = [f"text {number:03}" for number in range(2 * JOB_INPUTS + 5)]
    bench.ask(*texts)
    bench.hour()
    assert [len(job.inputs) for job in bench.jobs] == [JOB_INPUTS, JOB_INPUTS, 5]
    assert sorted(bench.warmed) == texts


def test_nothing_begins_after_the_time_limit_and_what_waits_is_given_up(raw: Any) -> None:
    bench = Bench(raw, time_limit_s=10)

    def slow(job: Job) -> None:
        bench.now_s += 6
        if len(bench.jobs) < 2:
            bench.answered(job)

    bench.compute = slow
    bench.ask(*(f"text {number}" for number in range(5 * JOB_INPUTS)))
    bench.hour()
    assert len(bench.jobs) == 2
    assert [bench.gate.unwanted(job) for job in bench.jobs] == [False, True]
    assert bench.counts() == {"warmings": 1, "warmed": JOB_INPUTS, "warmings_cut": 1}


def test_interactive_work_goes_first(raw: Any) -> None:
    bench = Bench(raw, time_limit_s=10)
    turns = iter([True, True, False])

    def busy() -> bool:
        bench.now_s += 1
        return next(turns)

    bench.busy = busy
    bench.ask("a")
    bench.hour()
    assert bench.warmed == ["a"]
    assert next(turns, None) is None


def test_interactive_work_that_stays_leaves_no_time(raw: Any) -> None:
    bench = Bench(raw, time_limit_s=2)

    def busy() -> bool:
        bench.now_s += 1
        return True

    bench.busy = busy
    bench.ask("a")
    bench.hour()
    assert bench.jobs == []
    assert bench.counts() == {"warmings": 1, "warmings_cut": 1}


def test_a_worker_that_ends_warms_nothing_more(bench: Bench) -> None:
    bench.compute = lambda job: (bench.answered(job), bench.warmer.stop())[0]
    bench.ask(*(f"text {number}" for number in range(5 * JOB_INPUTS)))
    bench.hour()
    assert len(bench.jobs) == 1


def test_a_redis_that_is_away_is_no_harm(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.ask("a")
    bench.warmer._redis = redis.Redis.from_url("redis://127.0.0.1:1/0")
    bench.hour()
    assert bench.jobs == []
    assert "warming is left out" in caplog.text


def test_the_gate_keeps_warming_jobs_from_those_who_are_told_of_jobs(bench: Bench) -> None:
    bench.ask("a")
    bench.hour()
    [warming] = bench.jobs
    mine = job("1", "x")
    for told in (bench.gate.started, bench.gate.finished, bench.gate.dropped):
        told([warming, mine])
        told([warming])
    assert bench.listener.told == [("started", "1"), ("finished", "1"), ("dropped", "1")]
    assert warming.ticket.done.is_set()
