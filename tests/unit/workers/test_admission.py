"""From arrival to a place in line: who is dropped, failed, parked, prepared."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from cortex_tasks.errors import CortexError, InferenceFailed, InvalidInput, ModelUnavailable
from cortex_tasks.payloads import Lane, Params
from tests.support.stub_models import PATIENCE_S, Listener, Panic, StubAdapter, fleet_of, job, ready, registry_of
from workers.adapters import Item
from workers.admission import Admission, Slot, fail_inside
from workers.batching import Batch
from workers.registry import Model, Registry
from workers.runtime import Job

LANES: tuple[Lane, ...] = ("bulk", "interactive")


class Bench:
    """An admission with one ready model ``m`` and one that is not loaded, ``lazy``."""

    def __init__(self, **models: dict[str, Any]) -> None:
        self.registry = registry_of(fleet_of(**(models or {"m": {}, "lazy": {}})))
        self.adapter = StubAdapter()
        ready(self.registry, "m", self.adapter)
        self.events = Listener()
        self.woken = threading.Event()
        self.admission = Admission(self.registry, self.events, self.woken.set)

    def admit(self, *jobs: Any) -> None:
        for one in jobs:
            self.admission.put(one)
        self.admission.admit()

    def line(self) -> list[list[tuple[str, int]]]:
        """The batches that the line gives out: each item's job and index."""
        batches: list[list[tuple[str, int]]] = []
        while (batch := self.admission.take()) is not None:
            batches.append([(item.payload.job.id, item.payload.index) for item in batch.items])
        return batches


def test_jobs_of_one_group_are_prepared_in_one_call_and_line_up_together() -> None:
    bench = Bench()
    bench.admit(job("a", "one", "two"), job("b", "three"))
    assert bench.adapter.prepared == ["one", "two", "three"]
    assert bench.line() == [[("a", 0), ("a", 1), ("b", 0)]]
    assert not bench.admission.has_incoming
    assert bench.admission.ahead() is None


def test_a_backlog_is_prepared_in_portions_that_the_other_lane_does_not_wait_for() -> None:
    bench = Bench()
    backlog = [job(str(at), "x" * 30_000, lane="bulk") for at in range(7)]
    bench.admit(*backlog, job("short", "y"))
    assert bench.line() == [[("short", 0)], [("0", 0)], [("1", 0)], [("2", 0)], [("3", 0)]]
    assert bench.admission.has_incoming
    bench.admit()
    assert bench.line() == [[("4", 0)], [("5", 0)], [("6", 0)]]
    assert not bench.admission.has_incoming


def test_there_is_more_while_a_job_comes_in_is_prepared_or_stands_in_line() -> None:
    seen: list[bool] = []

    class Looks(StubAdapter):
        def prepare(self, task: str, inputs: Sequence[Any], params: Params) -> list[Item | CortexError]:
            seen.append(bench.admission.has_more)
            return super().prepare(task, inputs, params)

    bench = Bench()
    bench.registry.model("m").adapter = Looks()
    assert not bench.admission.has_more
    bench.admission.put(job("a", "x"))
    assert bench.admission.has_more
    bench.admission.admit()
    assert seen == [True]
    assert bench.admission.has_more
    assert bench.line() == [[("a", 0)]]
    assert not bench.admission.has_more


def test_a_portion_is_no_less_than_a_batch() -> None:
    bench = Bench(m={"batching": {"max_padded_tokens": 50_000}})
    bench.admit(*(job(str(at), "x" * 30_000, lane="bulk") for at in range(7)))
    assert not bench.admission.has_incoming


def test_a_refused_input_is_settled_and_its_neighbours_line_up() -> None:
    bench = Bench()
    bench.adapter.refuse = {"bad"}
    both, only = job("both", "bad", "good"), job("only", "bad")
    bench.admit(both, only)
    assert isinstance(both.outcomes[0], InvalidInput)
    assert bench.events.told == [("finished", "only")]
    assert bench.line() == [[("both", 1)]]


def test_a_job_whose_inputs_were_all_refused_before_is_finished_at_once() -> None:
    bench = Bench()
    bench.admit(job("empty"), job("refused", InvalidInput("no")))
    assert bench.events.told == [("finished", "empty"), ("finished", "refused")]
    assert not bench.adapter.prepared


def test_an_unwanted_job_is_dropped_before_it_costs_anything() -> None:
    bench = Bench()
    bench.events.unwanted_ids = {"revoked"}
    bench.admit(job("revoked", "a"), job("wanted", "b"))
    assert bench.events.told == [("dropped", "revoked")]
    assert bench.adapter.prepared == ["b"]


def test_a_suspect_lines_up_alone_and_unprepared() -> None:
    bench = Bench()
    bench.admit(job("suspect", "x", "y", suspect=True), job("plain", "z"))
    assert bench.adapter.prepared == ["z"]
    assert sorted(bench.line(), key=str) == [[("plain", 0)], [("suspect", 0)], [("suspect", 1)]]


@pytest.mark.parametrize("defect", [RuntimeError, Panic])
def test_what_cannot_be_prepared_together_lines_up_one_by_one(defect: type[BaseException]) -> None:
    class Fails(StubAdapter):
        def prepare(self, task: str, inputs: Sequence[Any], params: Params) -> list[Item | CortexError]:
            raise defect("a defect")

    bench = Bench()
    ready(bench.registry, "m", Fails())
    bench.admit(job("a", "x"), job("b", "y"))
    assert bench.line() == [[("a", 0)], [("b", 0)]]


def test_an_adapter_that_loses_an_input_never_crosses_them() -> None:
    class Loses(StubAdapter):
        def prepare(self, task: str, inputs: Sequence[Any], params: Params) -> list[Item | CortexError]:
            return super().prepare(task, inputs[1:], params)

    bench = Bench()
    ready(bench.registry, "m", Loses())
    bench.admit(job("a", "x"), job("b", "y"))
    assert bench.line() == [[("a", 0)], [("b", 0)]]


def test_a_defect_in_admission_gives_every_job_an_answer() -> None:
    bench = Bench()
    del bench.registry.models["lazy"]
    broken, neighbour = job("broken", "x", model="lazy"), job("neighbour", "y")
    bench.admit(broken, neighbour)
    assert isinstance(broken.failure, InferenceFailed)
    assert "UnknownModel" in str(broken.failure)
    assert set(bench.events.ids("finished")) == {"broken", "neighbour"}


def test_a_panic_in_admission_gives_every_job_an_answer() -> None:
    bench = Bench()

    def ask(asked: Job) -> bool:
        raise Panic("a defect")

    bench.events.unwanted = ask  # type: ignore[method-assign]
    bench.admit(broken := job("broken", "x"))
    assert "Panic" in str(broken.failure)
    assert bench.events.ids("finished") == ["broken"]


def test_fail_inside_leaves_settled_jobs_alone() -> None:
    events, done, failed, still_open = Listener(), job("done", "x"), job("failed", "x"), job("open", "x")
    done.settle(0, {})
    failed.failure = ModelUnavailable("gone")
    fail_inside([done, failed, still_open], ValueError("odd"), events)
    assert events.told == [("finished", "open")]
    assert "ValueError: odd" in str(still_open.failure)


# ------------------------------------------------------------------------------------------- loading


class Loads(Registry):
    """A registry whose loads end when the test says so, and fail with ``failure``."""

    gate: threading.Event
    failure: CortexError | None = None
    loads = 0

    def load(self, alias: str, *, hold: bool = False) -> Model:
        self.loads += 1
        assert self.gate.wait(PATIENCE_S)
        model = self.model(alias)
        if self.failure is not None:
            model.state, model.error, model.failed_at_s = "unavailable", self.failure, 0.0
            raise self.failure
        ready(self, alias, StubAdapter())
        assert self.hold(model) if hold else True
        return model


@pytest.fixture
def loading() -> Iterator[tuple[Bench, Loads]]:
    bench = Bench()
    bench.registry.__class__ = Loads
    registry = bench.registry
    assert isinstance(registry, Loads)
    registry.gate = threading.Event()
    yield bench, registry
    # Else a thread would wait on.
    registry.gate.set()
    for thread in threading.enumerate():
        if thread.name.startswith("load-"):
            thread.join(PATIENCE_S)


def test_jobs_of_a_model_that_loads_wait_and_block_nobody(loading: tuple[Bench, Loads]) -> None:
    bench, registry = loading
    bench.admit(job("waits", "x", model="lazy"), job("goes on", "y"))
    assert bench.line() == [[("goes on", 0)]]
    assert registry.model("lazy").state == "loading"
    bench.admit(job("waits too", "z", model="lazy"))
    assert bench.line() == []
    registry.gate.set()
    assert bench.woken.wait(PATIENCE_S)
    bench.admission.admit()
    assert bench.line() == [[("waits", 0), ("waits too", 0)]]
    assert registry.loads == 1


def test_a_backlog_that_waited_for_a_load_is_in_line_before_the_model_may_go(loading: tuple[Bench, Loads]) -> None:
    bench, registry = loading
    bench.admit(*(job(f"{lane} {at}", "x" * 90_000, model="lazy", lane=lane) for lane in LANES for at in range(5)))
    while bench.admission.has_incoming:
        bench.admit()
    registry.gate.set()
    assert bench.woken.wait(PATIENCE_S)
    assert sorted(name for batch in bench.line() for name, _ in batch) == [
        f"{lane} {at}" for lane in LANES for at in range(5)
    ]


def test_jobs_that_waited_for_a_failed_load_get_its_reason(loading: tuple[Bench, Loads]) -> None:
    """However long ago the load failed when they are looked at again: they do not wait for another."""
    bench, registry = loading
    registry.failure = ModelUnavailable("no weights", {"transient": True})
    registry._clock = lambda: 1e9
    waits = job("waits", "x", model="lazy")
    bench.admit(waits)
    registry.gate.set()
    assert bench.woken.wait(PATIENCE_S)
    bench.admission.admit()
    assert waits.failure is registry.failure
    assert bench.events.ids("finished") == ["waits"]
    assert registry.loads == 1


def test_a_load_that_failed_a_moment_ago_is_not_tried_again(loading: tuple[Bench, Loads]) -> None:
    bench, registry = loading
    model = registry.model("lazy")
    model.state, model.error, model.failed_at_s = "unavailable", ModelUnavailable("no weights"), -1.0
    late = job("late", "x", model="lazy")
    bench.admit(late)
    assert late.failure is model.error
    assert registry.loads == 0


def test_clear_takes_those_who_are_not_in_line(loading: tuple[Bench, Loads]) -> None:
    bench, _ = loading
    bench.admit(job("parked", "x", model="lazy"), job("in line", "y"))
    bench.admission.put(job("fresh", "z"))
    assert {one.id for one in bench.admission.clear()} == {"parked", "fresh"}
    batch = bench.admission.take()
    assert isinstance(batch, Batch)
    assert isinstance(batch.items[0].payload, Slot)
    assert batch.items[0].payload.job.id == "in line"
