"""The runner's threads: order, overlap, stopping, and an answer for every job whatever fails."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import pytest

from cortex_tasks.errors import CortexError, InferenceFailed, PoisonJob
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
from workers.runner import Runner
from workers.runtime import Job


class Bench:
    def __init__(self, adapter: StubAdapter | None = None, **models: dict[str, Any]) -> None:
        self.registry = registry_of(fleet_of(**(models or {"m": {}})))
        self.adapter = adapter or StubAdapter()
        ready(self.registry, "m", self.adapter)
        self.events = Listener()
        self.runner = Runner("test", self.registry, self.events)

    def submit(self, *jobs: Job) -> None:
        for one in jobs:
            self.runner.submit(one)

    def running(self) -> AbstractContextManager[None]:
        return started(self.runner, self.adapter.gate.set)


def test_jobs_that_wait_share_a_pass_and_get_their_own_answers() -> None:
    bench = Bench()
    jobs = [job(str(n), f"text {n}", sent_at_s=0.0) for n in range(5)]
    bench.submit(*jobs)
    with bench.running():
        bench.events.wait("finished", *(one.id for one in jobs))
    assert [sorted(texts) for texts in bench.adapter.passes] == [[f"text {n}" for n in range(5)]]
    assert [one.outcomes for one in jobs] == [[{"said": f"text {n}"}] for n in range(5)]
    assert bench.events.told[:5] == [("started", str(n)) for n in range(5)]
    assert all(one.watch.batch_items == 5 and one.watch.queue_ms > 0 for one in jobs)
    model = bench.registry.model("m")
    assert (model.jobs, model.items, model.batches) == (5, 5, 1)


def test_a_job_larger_than_a_batch_starts_once_and_finishes_once() -> None:
    bench = Bench()
    large = job("large", *(f"text {n:02}" for n in range(20)))
    bench.submit(large)
    with bench.running():
        bench.events.wait("finished", "large")
    assert len(bench.adapter.passes) == 3
    assert bench.events.told == [("started", "large"), ("finished", "large")]
    assert [outcome["said"] for outcome in large.outcomes] == [f"text {n:02}" for n in range(20)]


def test_a_long_pass_overlaps_the_preparation_of_what_comes_meanwhile() -> None:
    bench = Bench()
    # As it would be known after some passes of a slow model.
    bench.runner._usual_pass_s = 1.0
    bench.adapter.gate.clear()
    with bench.running():
        bench.submit(job("first", "a"))
        assert bench.adapter.entered.wait(PATIENCE_S)
        prepared = threading.Event()
        list_of_prepared = bench.adapter.prepared

        class Telling(list[str]):
            def __iadd__(self, more: Any) -> Any:
                self.extend(more)
                prepared.set()
                return self

        bench.adapter.prepared = Telling(list_of_prepared)
        bench.submit(job("second", "b"))
        assert prepared.wait(PATIENCE_S), "the second job was not prepared while the first ran"
        assert bench.adapter.passes == []
        assert bench.runner.running
        bench.adapter.gate.set()
        bench.events.wait("finished", "first", "second")
    assert bench.adapter.passes == [["a"], ["b"]]


def test_what_the_preparer_lines_up_after_the_pass_has_ended_runs_at_once() -> None:
    """The runner, finding nothing in line, must be woken: no other job may come for a long time."""
    holding, let_go = threading.Event(), threading.Event()

    class SlowToPrepare(StubAdapter):
        def prepare(self, task: str, inputs: Sequence[Any], params: Params) -> list[Item | CortexError]:
            if "b" in inputs:
                holding.set()
                assert let_go.wait(PATIENCE_S)
            return super().prepare(task, inputs, params)

    bench = Bench(SlowToPrepare())
    bench.runner._usual_pass_s = 1.0
    bench.adapter.gate.clear()
    with bench.running():
        bench.submit(job("first", "a"))
        assert bench.adapter.entered.wait(PATIENCE_S)
        bench.submit(job("second", "b"))
        assert holding.wait(PATIENCE_S)
        bench.adapter.gate.set()
        bench.events.wait("finished", "first")
        poll_until(lambda: _sleeps(bench.runner), "the runner found nothing in line")
        let_go.set()
        bench.events.wait("finished", "second")
    assert bench.adapter.passes == [["a"], ["b"]]


def _sleeps(runner: Runner) -> bool:
    return bool(runner._changed._waiters)  # type: ignore[attr-defined]


def test_an_idle_runner_admits_by_itself() -> None:
    bench = Bench()
    with bench.running():
        for n in range(20):
            bench.submit(job(str(n), "x"))
            bench.events.wait("finished", str(n))
    assert bench.adapter.prepared == ["x"] * 20


def test_between_passes_nothing_runs() -> None:
    bench = Bench()
    with bench.running():
        bench.submit(job("a", "x"))
        bench.events.wait("finished", "a")
    assert bench.runner.running == ()


def test_each_pass_of_a_bisection_is_one_to_the_watchdog() -> None:
    """The time limit is a pass's: bad items, found by halving, do not add up to a hang."""
    seen: list[float] = []

    class Picky(StubAdapter):
        def forward(self, task: str, items: Sequence[Item], params: Params) -> Sequence[Any]:
            [running] = bench.runner.running
            seen.append(running.since_s)
            if any(item.data == "bad" for item in items):
                raise RuntimeError("cannot take it")
            return super().forward(task, items, params)

    bench = Bench(Picky())
    mixed = job("mixed", "bad", "fine", "good")
    bench.submit(mixed)
    with bench.running():
        bench.events.wait("finished", "mixed")
    assert [isinstance(outcome, InferenceFailed) for outcome in mixed.outcomes] == [True, False, False]
    assert seen == sorted(set(seen))
    assert len(seen) >= 3


# -------------------------------------------------------------------------------------- dropped, refused


@pytest.mark.parametrize("when", ["before admission", "in line"])
def test_an_unwanted_job_is_dropped_before_its_pass(when: str) -> None:
    bench = Bench()
    gone, kept = job("gone", "x", "y"), job("kept", "z")
    bench.submit(gone, kept)
    if when == "in line":
        bench.runner._admission.admit()
    bench.events.unwanted_ids = {"gone"}
    with bench.running():
        bench.events.wait("finished", "kept")
        bench.events.wait("dropped", "gone")
    assert bench.adapter.passes == [["z"]]
    assert bench.events.ids("dropped") == ["gone"]
    assert bench.events.ids("started") == ["kept"]


def test_a_started_job_is_finished_though_it_becomes_unwanted() -> None:
    bench = Bench()
    bench.adapter.gate.clear()
    with bench.running():
        long = job("long", *(f"text {n}" for n in range(12)))
        bench.submit(long)
        assert bench.adapter.entered.wait(PATIENCE_S)
        bench.events.unwanted_ids = {"long"}
        bench.adapter.gate.set()
        bench.events.wait("finished", "long")
    assert None not in long.outcomes


def test_a_suspect_runs_alone_and_is_asked_for_first() -> None:
    bench = Bench()
    bench.submit(job("suspect", "x", suspect=True), job("a", "y"), job("b", "z"))
    with bench.running():
        bench.events.wait("finished", "suspect", "a", "b")
    assert ["x"] in bench.adapter.passes
    assert bench.events.asked == ["suspect"]


def test_a_suspect_with_too_many_attempts_fails_unrun() -> None:
    bench = Bench()
    poison = PoisonJob("parked")
    bench.events.refusals = {"suspect": poison}
    suspect = job("suspect", "x", "y", suspect=True)
    bench.submit(suspect)
    with bench.running():
        bench.events.wait("finished", "suspect")
    assert suspect.outcomes == [poison, poison]
    assert bench.adapter.passes == []
    assert bench.events.ids("finished") == ["suspect"]


def test_a_suspect_of_one_input_fails_as_a_whole() -> None:
    bench = Bench()
    poison = PoisonJob("parked")
    bench.events.refusals = {"suspect": poison}
    suspect = job("suspect", "x", suspect=True)
    bench.submit(suspect)
    with bench.running():
        bench.events.wait("finished", "suspect")
    assert suspect.failure is poison


def test_a_suspects_input_that_prepare_refuses_is_its_error() -> None:
    bench = Bench(StubAdapter(refuse={"bad"}))
    suspect = job("suspect", "bad", "good", suspect=True)
    bench.submit(suspect)
    with bench.running():
        bench.events.wait("finished", "suspect")
    assert isinstance(suspect.outcomes[0], CortexError)
    assert suspect.outcomes[1] == {"said": "good"}


@pytest.mark.parametrize("error", [RuntimeError("cannot read it"), Panic("cannot read it")])
def test_an_input_that_breaks_prepare_fails_alone(error: BaseException) -> None:
    class Breaks(StubAdapter):
        def prepare(self, task: str, inputs: Sequence[Any], params: Params) -> list[Item | CortexError]:
            if "bad" in inputs:
                raise error
            return super().prepare(task, inputs, params)

    bench = Bench(Breaks())
    mixed, other = job("mixed", "a", "bad", "c"), job("other", "d")
    bench.submit(mixed, other)
    with bench.running():
        bench.events.wait("finished", "mixed", "other")
    assert mixed.failure is None
    assert "cannot read it" in str(mixed.outcomes.pop(1))
    assert mixed.outcomes == [{"said": "a"}, {"said": "c"}]
    assert other.outcomes == [{"said": "d"}]


# ------------------------------------------------------------------------------------------------ defects


def test_a_defect_in_the_bookkeeping_gives_an_answer_and_the_thread_lives_on() -> None:
    bench = Bench()

    def ask(asked: Job, index: int) -> CortexError | None:
        raise LookupError("a defect")

    bench.events.may_run = ask  # type: ignore[method-assign]
    suspect, plain = job("suspect", "x", suspect=True), job("plain", "y")
    bench.submit(suspect)
    with bench.running():
        bench.events.wait("finished", "suspect")
        bench.submit(plain)
        bench.events.wait("finished", "plain")
    assert "LookupError" in str(suspect.failure)
    assert plain.outcomes == [{"said": "y"}]


@pytest.mark.parametrize("error", [Panic("a defect"), SystemExit(1)])
def test_what_is_no_exception_gives_an_answer_and_the_thread_lives_on(error: BaseException) -> None:
    class Ends(StubAdapter):
        def forward(self, task: str, items: Sequence[Item], params: Params) -> Sequence[Any]:
            if items[0].data == "bad":
                raise error
            return super().forward(task, items, params)

    bench = Bench(Ends())
    bad, plain = job("bad", "bad"), job("plain", "y")
    bench.submit(bad)
    with bench.running():
        bench.events.wait("finished", "bad")
        bench.submit(plain)
        bench.events.wait("finished", "plain")
    assert bad.errors == 1
    assert plain.outcomes == [{"said": "y"}]


def test_a_model_that_disappears_fails_its_jobs_and_no_others() -> None:
    bench = Bench(m={}, other={})
    ready(bench.registry, "other", StubAdapter())
    orphan, other = job("orphan", "x"), job("other", "y", model="other")
    bench.submit(orphan, other)
    bench.runner._admission.admit()
    bench.registry.model("m").adapter = None
    with bench.running():
        bench.events.wait("finished", "orphan", "other")
    assert orphan.failure is not None
    assert other.outcomes == [{"said": "y"}]


# ----------------------------------------------------------------------------------------------- stopping


def test_a_stop_finishes_what_has_started_and_drops_the_rest() -> None:
    bench = Bench(m={}, lazy={})
    bench.adapter.gate.clear()
    with bench.running():
        long = job("long", *(f"text {n:02}" for n in range(20)))
        bench.submit(long)
        assert bench.adapter.entered.wait(PATIENCE_S)
        bench.submit(job("waits", "x"), job("waits too", "y"))
        bench.runner.stop()
        bench.adapter.gate.set()
        bench.runner.join(PATIENCE_S)
    assert bench.events.ids("started") == ["long"]
    assert bench.events.ids("finished") == ["long"]
    assert set(bench.events.ids("dropped")) == {"waits", "waits too"}
    assert None not in long.outcomes


def test_without_grace_a_started_job_that_is_not_through_goes_back_as_well() -> None:
    bench = Bench()
    bench.runner = Runner("test", bench.registry, bench.events, stop_grace_s=0.0)
    bench.adapter.gate.clear()
    with bench.running():
        bench.submit(job("long", *(f"text {n:02}" for n in range(20))))
        assert bench.adapter.entered.wait(PATIENCE_S)
        bench.runner.stop()
        bench.adapter.gate.set()
        bench.runner.join(PATIENCE_S)
    assert bench.events.ids("finished") == []
    assert bench.events.ids("dropped") == ["long"]


def test_an_idle_runner_stops_at_once() -> None:
    bench = Bench()
    with bench.running():
        pass
    assert bench.events.told == []
