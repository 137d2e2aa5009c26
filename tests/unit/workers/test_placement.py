"""Compute threads get CPUs of their own after an idle time, and give them back."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.placement import Placement, parts

needs_cpus = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="one CPU: there is nothing to place threads on"
)


T = TypeVar("T")


class Helper:
    """A thread that computes a while and then is just there, until it is told to end."""

    def __init__(self, *, computes: bool = True) -> None:
        self._told, self._computed = threading.Event(), threading.Event()
        self._computes = computes
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._computed.wait()

    def _run(self) -> None:
        while self._computes and time.thread_time() < 0.01:
            pass
        self._computed.set()
        self._told.wait()

    @property
    def cpus(self) -> set[int]:
        assert self._thread.native_id is not None
        return os.sched_getaffinity(self._thread.native_id)

    def end(self) -> None:
        self._told.set()
        self._thread.join()
        # The kernel forgets a thread a moment after Python does.
        while os.path.exists(f"/proc/self/task/{self._thread.native_id}"):
            pass


class Time:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Runner:
    """A thread of its own, so that the test's own thread is not moved; it does as it is told."""

    def __init__(self, **settings: str) -> None:
        self.time = Time()
        self.placement = Placement(environ=settings, clock=self.time)
        self.helpers: list[Helper] = []
        self._do: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._done: SimpleQueue[object] = SimpleQueue()
        self._thread = threading.Thread(target=self._obey)
        self._thread.start()

    def _obey(self) -> None:
        while (work := self._do.get()) is not None:
            try:
                self._done.put(work())
            except BaseException as error:
                self._done.put(error)

    def do(self, work: Callable[[], T]) -> T:
        self._do.put(work)
        found = self._done.get()
        if isinstance(found, BaseException):
            raise found
        return found  # type: ignore[return-value]

    def passes(self, *, after_s: float, starts: int = 0) -> set[int]:
        """One pass after so long an idle time, which starts so many helpers. The CPUs it ran on."""
        self.time.now_s += after_s

        def work() -> set[int]:
            with self.placement:
                self.helpers += [Helper() for _ in range(starts)]
                return os.sched_getaffinity(0)

        return self.do(work)

    @property
    def idle_cpus(self) -> set[int]:
        return self.do(lambda: os.sched_getaffinity(0))

    def end(self) -> None:
        for helper in self.helpers:
            helper.end()
        self._do.put(None)
        self._thread.join()


@pytest.fixture
def runner() -> Iterator[Runner]:
    made = Runner()
    yield made
    made.end()


ALL = os.sched_getaffinity(0)


@given(st.sets(st.integers(0, 500), min_size=1, max_size=64), st.integers(0, 70), st.integers(0, 10**6))
def test_parts_are_disjoint_equal_and_use_every_cpu(cpus: set[int], threads: int, turn: int) -> None:
    sets = parts(sorted(cpus), threads, turn)
    if not 1 < threads <= len(cpus):
        assert sets == []
        return
    assert len(sets) == threads
    assert set.union(*sets) == cpus
    assert sum(map(len, sets)) == len(cpus)
    assert max(map(len, sets)) - min(map(len, sets)) <= 1
    assert sets[0] == parts(sorted(cpus), threads)[turn % threads]


@needs_cpus
def test_after_an_idle_time_a_pass_and_its_helper_have_cpus_of_their_own(runner: Runner) -> None:
    assert runner.passes(after_s=1, starts=1) == ALL  # nobody is known yet
    own, other = runner.passes(after_s=1), runner.helpers[0].cpus
    assert own
    assert other
    assert own | other == ALL
    assert own & other == set()
    assert runner.idle_cpus == ALL


@needs_cpus
def test_passes_in_a_row_run_anywhere(runner: Runner) -> None:
    runner.passes(after_s=1, starts=1)
    runner.passes(after_s=1)
    assert runner.passes(after_s=0) == ALL
    assert runner.helpers[0].cpus == ALL
    assert runner.passes(after_s=1) != ALL


@needs_cpus
def test_threads_that_start_elsewhere_or_between_passes_stay_free(runner: Runner) -> None:
    elsewhere = Helper()
    runner.passes(after_s=1, starts=1)
    between = runner.do(Helper)
    runner.helpers += [elsewhere, between]
    for _ in range(3):
        assert runner.passes(after_s=1) != ALL
    assert elsewhere.cpus == between.cpus == ALL


@needs_cpus
def test_a_thread_that_starts_in_a_pass_and_does_not_compute_stays_free(runner: Runner) -> None:
    runner.passes(after_s=1, starts=1)
    runner.time.now_s += 1

    def start() -> None:
        with runner.placement:
            runner.helpers.append(Helper(computes=False))

    runner.do(start)
    own, idle = runner.passes(after_s=1), runner.helpers[1]
    assert own | runner.helpers[0].cpus == ALL
    assert own != ALL
    assert idle.cpus == ALL


@needs_cpus
def test_more_threads_than_cpus_are_left_alone(runner: Runner) -> None:
    runner.passes(after_s=1, starts=len(ALL))
    assert runner.passes(after_s=1) == ALL
    assert [helper.cpus for helper in runner.helpers] == [ALL] * len(ALL)


@needs_cpus
def test_threads_that_start_in_a_placed_pass_are_not_left_on_its_cpus(runner: Runner) -> None:
    runner.passes(after_s=1, starts=1)
    assert runner.passes(after_s=1, starts=len(ALL)) != ALL
    assert runner.passes(after_s=1) == ALL
    assert [helper.cpus for helper in runner.helpers] == [ALL] * (len(ALL) + 1)


@needs_cpus
def test_a_helper_that_has_ended_is_forgotten_and_the_next_found(runner: Runner) -> None:
    runner.passes(after_s=1, starts=1)
    runner.helpers[0].end()
    runner.passes(after_s=1, starts=1)
    own, other = runner.passes(after_s=1), runner.helpers[1].cpus
    assert own | other == ALL
    assert own & other == set()


@needs_cpus
def test_helpers_that_come_and_go_all_the_time_are_left_alone(runner: Runner) -> None:
    for _ in range(8):
        runner.passes(after_s=1, starts=1)
        runner.helpers[-1].end()
    # Looks are rare by now: the next is after the 512th pass.
    for _ in range(512):
        runner.passes(after_s=1)
    runner.passes(after_s=1, starts=1)
    for _ in range(1024):
        runner.passes(after_s=0)
    assert runner.passes(after_s=1) == ALL
    assert runner.helpers[-1].cpus == ALL


@needs_cpus
def test_a_failed_pass_gives_its_cpus_back(runner: Runner) -> None:
    runner.passes(after_s=1, starts=1)
    runner.time.now_s += 1

    def fail() -> None:
        with runner.placement:
            raise ValueError("as a model may")

    with pytest.raises(ValueError, match="as a model may"):
        runner.do(fail)
    assert runner.idle_cpus == ALL


@needs_cpus
def test_a_kernel_that_refuses_costs_no_pass(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    runner.passes(after_s=1, starts=1)
    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    for _ in range(3):
        assert runner.passes(after_s=1) == ALL
    assert [record.levelname for record in caplog.records] == ["WARNING"]


@needs_cpus
def test_cpus_that_are_gone_after_a_pass_cost_nothing(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the container is moved to other CPUs meanwhile."""
    runner.passes(after_s=1, starts=1)
    plain = os.sched_setaffinity

    def refuse(thread: int, cpus: set[int]) -> None:
        if cpus == ALL:
            raise OSError(22, "Invalid argument")
        plain(thread, cpus)

    with monkeypatch.context() as patch:
        patch.setattr(os, "sched_setaffinity", refuse)
        assert runner.passes(after_s=1) < ALL
    runner.passes(after_s=1)
    assert runner.idle_cpus == ALL


@needs_cpus
@pytest.mark.parametrize("name", ["OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY"])
def test_who_places_openmp_threads_by_the_environment_is_left_alone(name: str) -> None:
    runner = Runner(**{name: "anything"})
    try:
        for _ in range(3):
            assert runner.passes(after_s=1, starts=1) == ALL
        assert [helper.cpus for helper in runner.helpers] == [ALL] * 3
    finally:
        runner.end()


@needs_cpus
def test_torch_s_threads_are_found(runner: Runner) -> None:
    import torch

    square = torch.rand(600, 600)
    before = torch.get_num_threads()

    def compute() -> set[int]:
        torch.set_num_threads(2)
        with runner.placement:
            torch.mm(square, square).sigmoid_()
            return os.sched_getaffinity(0)

    cpus = ALL
    for _ in range(3):
        runner.time.now_s += 1
        cpus = runner.do(compute)
    torch.set_num_threads(before)  # what threads to come begin with
    threads = {int(task): os.sched_getaffinity(int(task)) for task in os.listdir("/proc/self/task")}
    apart = [found for found in threads.values() if found != ALL]
    assert cpus != ALL
    assert apart
    assert all(found.isdisjoint(cpus) for found in apart)
