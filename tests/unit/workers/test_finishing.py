"""How batches end: in place or beside the next pass, in order, one at a time, and with an answer for every job."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import pytest

from cortex_tasks.errors import InferenceFailed
from cortex_tasks.payloads import Params
from tests.support.stub_models import (
    PATIENCE_S,
    Listener,
    Panic,
    StubAdapter,
    fleet_of,
    job,
    ready,
    registry_of,
    started,
)
from tests.support.worker_process import poll_until
from workers.adapters import Item
from workers.adapters.base import WireValue
from workers.runner import Runner
from workers.runtime import Job

BESIDE = "finisher-test_0"
IN_PLACE = "runner-test"


class Finishes(StubAdapter):
    """Notes what it does and on which thread; a finish waits while ``may_finish`` is not set."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[str, str]] = []
        self.threads: dict[str, str] = {}
        self.finishing, self.may_finish = threading.Event(), threading.Event()
        self.passed: dict[str, threading.Event] = {text: threading.Event() for text in "abcd"}
        self.may_finish.set()

    def forward(self, task: str, items: Sequence[Item], params: Params) -> Sequence[Any]:
        self.log.append(("pass", items[0].data))
        if items[0].data in self.passed:
            self.passed[items[0].data].set()
        return super().forward(task, items, params)

    def finish(self, task: str, items: Sequence[Item], raw: Sequence[Any], params: Params) -> list[WireValue]:
        self.finishing.set()
        assert self.may_finish.wait(PATIENCE_S), "nobody let it finish"
        self.log.append(("finish", items[0].data))
        self.threads[items[0].data] = threading.current_thread().name
        return list(raw)


class Bench:
    """A model with batches of one, which usually takes long to finish them."""

    def __init__(self, adapter: Finishes | None = None, usual_s: float = 1.0) -> None:
        self.registry = registry_of(fleet_of(m={"batching": {"max_items": 1, "max_padded_tokens": 100}}))
        self.adapter = adapter or Finishes()
        ready(self.registry, "m", self.adapter)
        self.events = Listener()
        self.runner = Runner("test", self.registry, self.events)
        # As it would be known after some batches.
        self.runner._finishing._usual_s["m", "embed"] = usual_s

    def submit(self, *jobs: Job) -> None:
        for one in jobs:
            self.runner.submit(one)

    def running(self) -> AbstractContextManager[None]:
        return started(self.runner, self.let_go)

    def let_go(self) -> None:
        self.adapter.gate.set()
        self.adapter.may_finish.set()

    @property
    def holds(self) -> int:
        return self.registry.memory._residency.residents["m"].holds


def test_the_next_pass_runs_while_a_batch_is_finished() -> None:
    bench = Bench()
    bench.adapter.may_finish.clear()
    bench.submit(job("first", "a"), job("second", "b"))
    with bench.running():
        assert bench.adapter.finishing.wait(PATIENCE_S)
        assert bench.adapter.passed["b"].wait(PATIENCE_S), "the second pass waited for the end of the first batch"
        assert bench.events.ids("finished") == []
        bench.adapter.may_finish.set()
        bench.events.wait("finished", "first", "second")
    assert bench.events.ids("finished") == ["first", "second"]
    assert bench.adapter.threads == {"a": BESIDE, "b": IN_PLACE}, "nothing waits for the runner after the second"


def test_a_batch_that_nobody_waits_behind_is_finished_in_place() -> None:
    bench = Bench()
    with bench.running():
        for text in "abc":
            bench.submit(job(text, text))
            bench.events.wait("finished", text)
    assert set(bench.adapter.threads.values()) == {IN_PLACE}


def test_what_is_sooner_finished_than_handed_over_is_finished_in_place() -> None:
    bench = Bench(usual_s=0.0)
    bench.submit(*(job(text, text) for text in "abcd"))
    with bench.running():
        bench.events.wait("finished", *"abcd")
    assert set(bench.adapter.threads.values()) == {IN_PLACE}


class Takes(Finishes):
    """``took_s``: what it takes to finish each text."""

    def __init__(self, took_s: dict[str, float]) -> None:
        super().__init__()
        self.took_s, self.now_s = took_s, 0.0

    def finish(self, task: str, items: Sequence[Item], raw: Sequence[Any], params: Params) -> list[WireValue]:
        self.now_s += self.took_s.get(items[0].data, 0.0)
        return super().finish(task, items, raw, params)


def test_what_finishing_takes_is_learned_and_told() -> None:
    adapter = Takes(dict.fromkeys("abcd", 0.25))
    bench = Bench(adapter, usual_s=0.0)
    bench.runner._finishing._clock = lambda: adapter.now_s
    jobs = [job("abc", *"abc"), job("d", "d")]
    bench.submit(*jobs)
    with bench.running():
        bench.events.wait("finished", "abc", "d")
    assert adapter.threads == {"a": IN_PLACE, "b": BESIDE, "c": BESIDE, "d": IN_PLACE}
    assert [one.watch.finish_ms for one in jobs] == [750.0, 250.0]
    assert jobs[1].watch.model_s == pytest.approx(0.25 + (jobs[1].watch.prepare_ms + jobs[1].watch.forward_ms) / 1e3)


def test_one_long_finish_among_short_ones_is_soon_forgotten() -> None:
    adapter = Takes({"a": 0.008})
    bench = Bench(adapter, usual_s=0.0)
    bench.runner._finishing._clock = lambda: adapter.now_s
    bench.submit(*(job(text, text) for text in "abcd"))
    with bench.running():
        bench.events.wait("finished", *"abcd")
    assert adapter.threads == {"a": IN_PLACE, "b": BESIDE, "c": IN_PLACE, "d": IN_PLACE}


def test_no_pass_begins_while_a_batch_waits_for_the_end_of_the_one_before() -> None:
    bench = Bench()
    bench.adapter.may_finish.clear()
    bench.submit(*(job(text, text) for text in "abcd"))
    with bench.running():
        assert bench.adapter.passed["b"].wait(PATIENCE_S)
        assert not bench.adapter.passed["c"].wait(0.1)
        bench.adapter.may_finish.set()
        bench.events.wait("finished", *"abcd")
    assert bench.adapter.log.index(("finish", "a")) < bench.adapter.log.index(("pass", "c"))
    assert bench.events.ids("finished") == list("abcd")


def test_a_job_of_several_batches_keeps_the_order_of_its_answers() -> None:
    bench = Bench()
    long = job("long", *(f"text {n:02}" for n in range(20)))
    bench.submit(long)
    with bench.running():
        bench.events.wait("finished", "long")
    assert [outcome["said"] for outcome in long.outcomes] == [f"text {n:02}" for n in range(20)]
    assert bench.events.told == [("started", "long"), ("finished", "long")]
    assert set(bench.adapter.threads.values()) == {BESIDE, IN_PLACE}
    model = bench.registry.model("m")
    assert (model.jobs, model.items, model.batches) == (1, 20, 20)


def test_a_model_stays_in_memory_until_its_last_batch_is_finished() -> None:
    bench = Bench()
    bench.adapter.may_finish.clear()
    bench.submit(job("first", "a"), job("second", "b"))
    with bench.running():
        assert bench.adapter.passed["b"].wait(PATIENCE_S)
        assert bench.holds == 2
        bench.adapter.may_finish.set()
        bench.events.wait("finished", "first", "second")
        poll_until(lambda: bench.holds == 0, "both batches have released their model")


def test_the_watchdog_sees_who_finishes_and_not_who_waits_for_it() -> None:
    bench = Bench()
    bench.adapter.may_finish.clear()
    bench.submit(job("first", "a"), job("second", "b"))
    with bench.running():
        assert bench.adapter.passed["b"].wait(PATIENCE_S)
        poll_until(lambda: bench.runner.ident not in bench.runner._passes, "the second pass has ended")
        [running] = bench.runner.running
        assert running.model == "m"
        bench.adapter.may_finish.set()
        bench.events.wait("finished", "second")
    assert bench.runner.running == ()


def test_a_suspect_begins_when_the_others_have_their_answers() -> None:
    """It may kill the worker."""
    bench = Bench()
    bench.adapter.may_finish.clear()
    bench.adapter.gate.clear()
    bench.submit(job("first", "a"))
    with bench.running():
        assert bench.adapter.passed["a"].wait(PATIENCE_S)
        bench.submit(job("suspect", "b", suspect=True), job("last", "c"))
        bench.adapter.gate.set()
        assert bench.adapter.finishing.wait(PATIENCE_S)
        assert not bench.adapter.passed["b"].wait(0.1)
        bench.adapter.may_finish.set()
        bench.events.wait("finished", "first", "suspect", "last")
    told = bench.events.told
    assert told.index(("finished", "first")) < told.index(("started", "suspect")) < told.index(("survived", "suspect"))
    assert told.index(("finished", "suspect")) < told.index(("started", "last"))
    assert bench.adapter.threads == {"a": BESIDE, "b": IN_PLACE, "c": IN_PLACE}


@pytest.mark.parametrize("error", [RuntimeError("cannot say it"), Panic("cannot say it")])
def test_an_input_that_cannot_be_finished_beside_fails_alone(error: BaseException) -> None:
    class Breaks(Finishes):
        def finish(self, task: str, items: Sequence[Item], raw: Sequence[Any], params: Params) -> list[WireValue]:
            values = super().finish(task, items, raw, params)
            if items[0].data == "a":
                raise error
            return values

    bench = Bench(Breaks())
    first, second = job("first", "a"), job("second", "b")
    bench.submit(first, second)
    with bench.running():
        bench.events.wait("finished", "first", "second")
    assert bench.adapter.threads["a"] == BESIDE
    assert isinstance(first.outcomes[0], InferenceFailed)
    assert second.outcomes == [{"said": "b"}]


def test_a_defect_beside_gives_an_answer_and_the_thread_lives_on() -> None:
    class Ends(Finishes):
        def finish(self, task: str, items: Sequence[Item], raw: Sequence[Any], params: Params) -> list[WireValue]:
            values = super().finish(task, items, raw, params)
            if items[0].data == "a":
                raise SystemExit(1)
            return values

    bench = Bench(Ends())
    jobs = [job(text, text) for text in "abc"]
    bench.submit(*jobs)
    with bench.running():
        bench.events.wait("finished", *"abc")
        poll_until(lambda: bench.holds == 0, "all have released their model")
    assert bench.adapter.threads == {"a": BESIDE, "b": BESIDE, "c": IN_PLACE}
    assert "SystemExit" in str(jobs[0].failure)
    assert [one.outcomes for one in jobs[1:]] == [[{"said": "b"}], [{"said": "c"}]]


def test_a_stop_waits_until_what_was_handed_over_is_finished() -> None:
    bench = Bench()
    bench.adapter.may_finish.clear()
    bench.adapter.gate.clear()
    bench.submit(job("first", "a"), job("second", "b"), job("third", "c"))
    with bench.running():
        assert bench.adapter.passed["a"].wait(PATIENCE_S)
        bench.runner.stop()
        bench.adapter.gate.set()
        assert bench.adapter.finishing.wait(PATIENCE_S)
        poll_until(lambda: len(bench.events.ids("dropped")) == 2, "the others are given back")
        assert bench.runner.is_alive()
        bench.adapter.may_finish.set()
        bench.runner.join(PATIENCE_S)
        assert bench.events.ids("finished") == ["first"]
    assert bench.adapter.threads == {"a": BESIDE}
    assert BESIDE not in [thread.name for thread in threading.enumerate()]
