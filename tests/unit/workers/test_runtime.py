"""Isolation of bad items, settling of jobs, the answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortex_tasks.codec import dumps, loads
from cortex_tasks.errors import CortexError, InferenceFailed, InvalidInput
from cortex_tasks.payloads import EmbedParams, Params
from tests.support.stub_models import Panic
from workers.adapters import Adapter, Item, LoadContext
from workers.adapters.base import WireValue
from workers.batching import Budget
from workers.runtime import Job, Stopwatch, answer, finish_isolating, forward_isolating, run_alone


class Fragile(Adapter):
    """Raises when a batch holds a bad item; counts its passes."""

    def __init__(self, bad: set[int]) -> None:
        self.bad = bad
        self.passes = 0

    @classmethod
    def load(cls, context: LoadContext) -> Self:
        return cls(set())

    @property
    def size_bytes(self) -> int:
        return 1

    def example(self, task: str) -> tuple[Sequence[Any], Params]:
        return [0], EmbedParams()

    def prepare(self, task: str, inputs: Sequence[Any], params: Params) -> list[Item | CortexError]:
        return [Item(value) for value in inputs]

    def forward(self, task: str, items: Sequence[Item], params: Params) -> Sequence[Any]:
        self.passes += 1
        if any(item.data in self.bad for item in items):
            raise RuntimeError("cannot take it")
        return [{"n": item.data} for item in items]


@given(st.sets(st.integers(0, 63), max_size=6), st.integers(1, 64))
def test_only_the_bad_items_fail(bad: set[int], size: int) -> None:
    adapter = Fragile(bad)
    outcomes = forward_isolating(adapter, "embed", [Item(n) for n in range(size)], EmbedParams())
    for number, outcome in enumerate(outcomes):
        if number in bad:
            assert isinstance(outcome, InferenceFailed)
        else:
            assert outcome == {"n": number}
    guilty = len([n for n in bad if n < size])
    assert adapter.passes <= 1 + 2 * guilty * math.ceil(math.log2(max(size, 2)))


class Ends(Fragile):
    """Raises what is no Exception."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(set())
        self.error = error

    def forward(self, task: str, items: Sequence[Item], params: Params) -> Sequence[Any]:
        if any(item.data == 1 for item in items):
            raise self.error
        return [{"n": item.data} for item in items]


def test_an_item_on_which_a_library_panics_fails_alone() -> None:
    outcomes = forward_isolating(Ends(Panic("stride")), "embed", [Item(n) for n in range(4)], EmbedParams())
    assert [isinstance(outcome, InferenceFailed) for outcome in outcomes] == [False, True, False, False]
    assert "Panic: stride" in str(outcomes[1])


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1)])
def test_a_signal_on_the_main_thread_is_no_items_failure(error: BaseException) -> None:
    with pytest.raises(type(error)):
        forward_isolating(Ends(error), "embed", [Item(1)], EmbedParams())


class Short(Fragile):
    def forward(self, task: str, items: Sequence[Item], params: Params) -> Sequence[Any]:
        return [{"n": item.data} for item in items][: max(1, len(items) - 1)]


def test_a_model_that_loses_an_answer_never_crosses_them() -> None:
    outcomes = forward_isolating(Short(set()), "embed", [Item(n) for n in range(5)], EmbedParams())
    assert outcomes == [{"n": n} for n in range(5)]


class OwnErrors(Fragile):
    def forward(self, task: str, items: Sequence[Item], params: Params) -> Sequence[Any]:
        return [InvalidInput("odd") if item.data % 2 else {"n": item.data} for item in items]


def test_an_adapter_may_fail_one_item_by_itself() -> None:
    outcomes = forward_isolating(OwnErrors(set()), "embed", [Item(n) for n in range(4)], EmbedParams())
    assert [isinstance(outcome, CortexError) for outcome in outcomes] == [False, True, False, True]


class BadEnds(Fragile):
    """Cannot finish what is bad, in the way that ``error`` says: raises it, or (None) loses an answer."""

    def __init__(self, bad: set[int], error: BaseException | None) -> None:
        super().__init__(set())
        self.cannot_finish, self.error = bad, error

    def finish(self, task: str, items: Sequence[Item], raw: Sequence[Any], params: Params) -> list[WireValue]:
        if not any(item.data in self.cannot_finish for item in items):
            return [{"n": entry["n"], "finished": True} for entry in raw]
        if self.error is not None:
            raise self.error
        return []


@pytest.mark.parametrize("error", [RuntimeError("cannot say it"), Panic("cannot say it"), None])
def test_an_item_that_cannot_be_finished_fails_alone_without_another_pass(error: BaseException | None) -> None:
    adapter = BadEnds({2, 5}, error)
    items = [Item(n) for n in range(8)]
    raw = forward_isolating(adapter, "embed", items, EmbedParams())
    refused = raw[3] = InvalidInput("odd")
    outcomes = finish_isolating(adapter, "embed", items, raw, EmbedParams())
    assert [isinstance(outcomes.pop(at), InferenceFailed) for at in (5, 2)] == [True, True]
    assert outcomes.pop(2) is refused
    assert outcomes == [{"n": n, "finished": True} for n in (0, 1, 4, 6, 7)]
    assert adapter.passes == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1)])
def test_a_signal_while_items_are_finished_is_no_items_failure(error: BaseException) -> None:
    with pytest.raises(type(error)):
        finish_isolating(BadEnds({0}, error), "embed", [Item(0)], [{"n": 0}], EmbedParams())


@pytest.mark.parametrize("packed", [False, True])
def test_the_answer_keeps_order_and_errors(packed: bool) -> None:
    job = Job("id", "m", "embed", EmbedParams(), [0, InvalidInput("refused", {"limit": 1}), 7], packed=packed)
    run_alone(job, Fragile({7}), Budget(8, 100))
    meta = loads(dumps({"status": "SUCCESS", "result": answer(job, "rev")}))
    items = meta["result"]["items"]
    assert items[0] == {"value": {"n": 0}}
    assert items[1] == {"error": {"code": "invalid_input", "message": "refused", "details": {"limit": 1}}}
    assert items[2]["error"]["code"] == "inference_failed"
    assert meta["result"]["revision"] == "rev"
    assert meta["result"]["timings"]["batch_items"] == 2


def test_an_answer_is_short_in_logs() -> None:
    job = Job("id", "m", "embed", EmbedParams(), [0] * 500)
    run_alone(job, Fragile(set()), Budget(500, 500))
    assert len(repr(answer(job, "0123456789abcdef"))) < 100


class Lengths(Fragile):
    """An input is its length. Notes the passes."""

    def __init__(self, bad: set[int]) -> None:
        super().__init__(bad)
        self.batches: list[list[int]] = []

    def prepare(self, task: str, inputs: Sequence[Any], params: Params) -> list[Item | CortexError]:
        return [InvalidInput("empty") if not value else Item(value, value) for value in inputs]

    def forward(self, task: str, items: Sequence[Item], params: Params) -> Sequence[Any]:
        self.batches.append([item.data for item in items])
        return super().forward(task, items, params)


def test_a_job_by_itself_runs_in_passes_that_keep_to_the_budget() -> None:
    adapter = Lengths({7})
    inputs = [30, 1, 0, 2, 31, 7, 100, 1]
    job = Job("id", "m", "embed", EmbedParams(), inputs)
    run_alone(job, adapter, Budget(3, 64))
    assert all(len(sizes) <= 3 and len(sizes) * max(sizes) <= 64 for sizes in adapter.batches if sizes != [100])
    assert [outcome if isinstance(outcome, dict) else outcome.code for outcome in job.outcomes] == [
        {"n": size} if size not in (0, 7) else "invalid_input" if size == 0 else "inference_failed" for size in inputs
    ]
    assert job.open_items == 0
    assert answer(job, "rev").timings["batch_items"] == 3


# ------------------------------------------------------------------------------------------------ timings


def test_a_job_by_itself_tells_each_stage_by_its_own_time() -> None:
    class Takes(Fragile):
        now_s = 0.0

        def prepare(self, task: str, inputs: Sequence[Any], params: Params) -> list[Item | CortexError]:
            self.now_s += 0.25
            return super().prepare(task, inputs, params)

        def forward(self, task: str, items: Sequence[Item], params: Params) -> Sequence[Any]:
            self.now_s += 2.0
            return super().forward(task, items, params)

        def finish(self, task: str, items: Sequence[Item], raw: Sequence[Any], params: Params) -> list[WireValue]:
            self.now_s += 0.5
            return super().finish(task, items, raw, params)

    adapter = Takes(set())
    job = Job("id", "m", "embed", EmbedParams(), [0, 1, 2])
    run_alone(job, adapter, Budget(2, 100), clock=lambda: adapter.now_s)
    timings = answer(job, "rev").timings
    assert (timings["prepare_ms"], timings["forward_ms"], timings["finish_ms"]) == (250.0, 4_000.0, 1_000.0)


def test_what_passes_share_counts_once() -> None:
    watch = Stopwatch()
    watch.add_pass(10.0, 11.0, items=3)
    watch.add_pass(10.5, 11.5, items=7)
    assert watch.forward_ms == 1_500.0
    watch.add_pass(12.0, 12.25, items=1)
    assert (watch.forward_ms, watch.batch_items) == (1_750.0, 7)
    watch.add_pass(11.75, 12.5, items=1)
    assert watch.forward_ms == 2_250.0
    watch.add_pass(9.0, 13.0, items=1)
    assert watch.forward_ms == 4_000.0, "longer than all the others"


@given(st.lists(st.tuples(st.integers(0, 100), st.integers(1, 10)), min_size=1))
def test_the_time_in_passes_is_that_in_which_any_ran(spans: list[tuple[int, int]]) -> None:
    watch = Stopwatch()
    for ended_s, began_s in sorted((began_s + took_s, began_s) for began_s, took_s in spans):
        watch.add_pass(began_s, ended_s, items=1)
    seconds = {second for began_s, took_s in spans for second in range(began_s, began_s + took_s)}
    assert watch.forward_ms == len(seconds) * 1e3
