"""Models in memory among threads: held while they are used, let go when they may, never in between."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from cortex_tasks.errors import ModelUnavailable
from tests.support.stub_models import PATIENCE_S
from tests.support.worker_process import poll_until
from workers.memory import Memory


class Bench:
    def __init__(self, budget: int = 100, **limits: float) -> None:
        self.now_s = 0.0
        self.gone: list[str] = []
        self.memory = Memory(budget, 1_800.0, self.gone.append, lambda: self.now_s, **limits)

    def enter(self, alias: str, size_bytes: int = 50, *, pinned: bool = False, held: bool = False) -> None:
        self.memory.enter(alias, size_bytes, pinned=pinned, reload_s=1.0)
        self.memory.settle(alias, size_bytes, 1.0)
        if not held:
            self.now_s += 1
            self.memory.release(alias)

    def entering(self, alias: str, size_bytes: int = 50) -> tuple[threading.Thread, threading.Event]:
        inside = threading.Event()

        def enter() -> None:
            try:
                self.memory.enter(alias, size_bytes, pinned=False, reload_s=1.0)
            except ModelUnavailable:
                return
            inside.set()

        thread = threading.Thread(target=enter, daemon=True)
        thread.start()
        return thread, inside


def test_a_newcomer_takes_the_place_of_the_longest_unused() -> None:
    bench = Bench()
    for alias in ("a", "b", "c"):
        bench.enter(alias)
    assert bench.gone == ["a"]
    assert not bench.memory.hold("a")
    assert bench.memory.hold("b")
    assert bench.memory.used_bytes == 100


def test_a_model_is_held_from_its_load_on() -> None:
    bench = Bench(50, patience_s=0.0, limit_s=0.05)
    bench.enter("loading", held=True)
    with pytest.raises(ModelUnavailable, match=r"'new' needs 0\.0 MB of memory; all 0 MB stayed in use") as told:
        bench.enter("new")
    assert told.value.details["transient"]
    assert bench.gone == []


def test_a_model_in_use_goes_when_its_use_ends_and_takes_no_new_ones() -> None:
    bench = Bench(50, patience_s=0.0, limit_s=PATIENCE_S)
    bench.enter("used", held=True)
    thread, inside = bench.entering("new")
    deadline = threading.Event()
    while bench.memory.hold("used"):
        bench.memory.release("used")
        assert not deadline.wait(0.01)
    assert bench.gone == []
    assert not inside.is_set()
    bench.memory.hold_more("used", 2)
    bench.memory.release("used", 3)
    thread.join(PATIENCE_S)
    assert bench.gone == ["used"]
    assert inside.is_set()
    bench.memory.wait_gone("used")


def test_a_model_is_not_asked_to_leave_before_the_jobs_that_it_was_loaded_for_are_in_line() -> None:
    bench = Bench(50, patience_s=0.0, limit_s=0.0)
    bench.memory.enter("arrives", 50, pinned=False, reload_s=1.0)
    with pytest.raises(ModelUnavailable):
        bench.enter("new")
    assert bench.memory.settle("arrives", 50, 1.0)
    assert bench.memory.hold("arrives"), "the newcomer has to wait for the first use"
    bench.memory.release("arrives")
    with pytest.raises(ModelUnavailable):
        bench.enter("new")
    assert not bench.memory.hold("arrives"), "now it goes when its use ends"
    bench.memory.release("arrives")
    assert bench.gone == ["arrives"]


def test_an_unused_model_may_be_used_until_the_newcomer_can_take_its_place() -> None:
    bench = Bench(100, patience_s=0.0, limit_s=0.0)
    bench.enter("small", 20)
    bench.enter("large", 60)
    assert bench.memory.hold("large")
    with pytest.raises(ModelUnavailable):
        bench.enter("new", 50)
    bench.memory.release("large")
    assert bench.gone == ["large"], "which is room enough"
    assert bench.memory.hold("small"), "nobody needs its place any more"
    bench.memory.release("small")
    bench.enter("new", 50)
    assert bench.gone == ["large"]


def test_a_patient_newcomer_waits_for_a_model_with_jobs() -> None:
    bench = Bench(50, patience_s=PATIENCE_S, limit_s=PATIENCE_S)
    bench.enter("wanted")
    bench.memory.note_waiting({"wanted": 10})
    thread, inside = bench.entering("new")
    assert not inside.wait(0.1)
    assert bench.memory.hold("wanted")
    bench.memory.note_waiting({})
    bench.memory.release("wanted")
    thread.join(PATIENCE_S)
    assert bench.gone == ["wanted"]


def test_a_large_newcomer_gets_what_becomes_free_before_small_ones_that_came_later() -> None:
    bench = Bench(100, patience_s=0.0, limit_s=PATIENCE_S)
    for alias in ("a", "b"):
        bench.enter(alias)
        bench.memory.hold(alias)
    large, large_inside = bench.entering("large", 100)
    poll_until(lambda: not bench.memory.stays("a") and not bench.memory.stays("b"), "both are about to leave")
    small, small_inside = bench.entering("small", 50)
    bench.memory.release("a")
    assert not small_inside.wait(0.1), "the room is not its own"
    bench.memory.release("b")
    large.join(PATIENCE_S)
    assert large_inside.is_set()
    bench.memory.settle("large", 100, 1.0)
    bench.memory.release("large")
    small.join(PATIENCE_S)
    assert small_inside.is_set()
    assert bench.gone == ["a", "b", "large"]


def test_a_newcomer_takes_free_room_while_an_earlier_one_is_patient() -> None:
    bench = Bench(100, patience_s=PATIENCE_S, limit_s=PATIENCE_S)
    bench.enter("used", held=True)
    bench.entering("large", 100)
    poll_until(lambda: "large" in bench.memory._newcomers, "it waits")
    bench.enter("small", 50)
    assert bench.memory.stays("small")


def test_the_time_of_a_newcomer_begins_when_it_is_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    monkeypatch.setattr("workers.memory.time", SimpleNamespace(monotonic=lambda: now_s))
    bench = Bench(100, patience_s=5.0, limit_s=120.0)
    bench.enter("used", held=True)
    first, _ = bench.entering("first", 100)
    poll_until(lambda: "first" in bench.memory._newcomers, "it waits")
    _, inside = bench.entering("second", 60)
    poll_until(lambda: "second" in bench.memory._newcomers, "it waits")
    now_s = 120.0
    first.join(PATIENCE_S)
    assert not first.is_alive(), "its time is over"
    assert not inside.wait(0.1)
    bench.memory.release("used")
    assert inside.wait(PATIENCE_S)


def test_a_model_that_takes_no_room_waits_for_nobody() -> None:
    bench = Bench(100, patience_s=0.0, limit_s=PATIENCE_S)
    bench.enter("used")
    bench.memory.hold("used")
    bench.entering("large", 100)
    poll_until(lambda: not bench.memory.stays("used"), "it is asked to leave")
    _, inside = bench.entering("in children", 0)
    assert inside.wait(PATIENCE_S)


def test_what_can_never_fit_is_told_at_once() -> None:
    bench = Bench(100)
    bench.enter("pinned", 60, pinned=True)
    with pytest.raises(ModelUnavailable, match="needs"):
        bench.enter("new", 41)


def test_a_model_that_is_larger_than_its_files_makes_room_by_itself() -> None:
    bench = Bench(100)
    bench.enter("old", 50)
    bench.memory.enter("grows", 40, pinned=False, reload_s=1.0)
    assert bench.memory.settle("grows", 60, 1.0)
    assert bench.gone == ["old"]
    bench.memory.forget("grows")
    assert bench.memory.used_bytes == 0
    bench.memory.enter("unknown", 0, pinned=False, reload_s=1.0)
    with pytest.raises(ModelUnavailable, match="'unknown' needs"):
        bench.memory.settle("unknown", 101, 1.0)


def test_a_model_that_is_larger_than_its_files_does_not_throw_out_one_in_use() -> None:
    bench = Bench(100)
    bench.enter("used", 50, held=True)
    bench.memory.enter("grows", 50, pinned=False, reload_s=1.0)
    assert not bench.memory.settle("grows", 60, 1.0), "it has to come again"
    assert bench.gone == []


def test_idle_models_go_after_their_time_to_live() -> None:
    bench = Bench()
    bench.enter("idle")
    bench.enter("pinned", 50, pinned=True)
    bench.now_s += 1_798
    assert bench.memory.let_idle_go() == []
    bench.now_s += 1
    assert bench.memory.let_idle_go() == ["idle"]
    assert bench.gone == ["idle"]
    assert bench.memory.stays("pinned")
