"""A CPU of its own for each thread that computes a forward pass.

A kernel that finds all CPUs idle may wake an OpenMP helper on the CPU of the thread that waits for it, and leave it
there: the two then take turns at every barrier. Seen on Linux 6.18 with two CPUs: a pass that came 50 ms after the one
before took 21 ms instead of 9, twice as long as with one thread (docs/performance.md). So the helpers of the thread
that runs models, and that thread while a pass runs, get disjoint sets of the CPUs that the process may use. Everything
else, of this worker and of others, runs anywhere.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Final, Self

__all__ = ["Placement", "parts"]

logger = logging.getLogger(__name__)

_TASKS: Final = Path("/proc/self/task")
_PR_SET_NAME: Final = 15
#: These place OpenMP's threads by themselves.
_THEIRS: Final = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
#: Passes after which helpers are looked for; then every so many, since a library may replace them.
_FIRST_PASSES: Final = 8
_EVERY_PASSES: Final = 512
#: A pass that begins later than this after the one before finds its helpers asleep.
_IDLE_S: Final = 0.005
#: Of the CPU time of the busiest helper: who has spent less does not compute.
_COMPUTES: Final = 0.1
#: Helpers that come and go more often than this are left alone.
_MOST_CHANGES: Final = 8

_numbers = count()


def parts(cpus: Sequence[int], threads: int, turn: int = 0) -> list[set[int]]:
    """So many disjoint sets of CPUs, neighbours together, as equal as they can be; [] when there are too few CPUs.

    ``turn``: which of the sets comes first.
    """
    if not 1 < threads <= len(cpus):
        return []
    sets = [set(cpus[len(cpus) * at // threads : len(cpus) * (at + 1) // threads]) for at in range(threads)]
    return sets[turn % threads :] + sets[: turn % threads]


class Placement:
    """Enter it for each forward pass, always with the same thread.

    Helpers are the threads that start while a pass runs: they inherit the name that the thread has meanwhile.
    """

    def __init__(self, *, environ: Mapping[str, str] = os.environ, clock: Callable[[], float] = time.monotonic) -> None:
        self._on = hasattr(os, "sched_setaffinity") and not any(name in environ for name in _THEIRS)
        self._clock = clock
        self._own_name = f"cortex-pass-{next(_numbers) % 1000}"
        self._idle_name = ""
        self._all: set[int] = set()
        self._helpers: list[int] = []
        #: Of this thread, then of its helpers; empty without helpers.
        self._sets: list[set[int]] = []
        self._apart = False
        self._ended_s = 0.0
        self._passes = 0
        self._changes = 0

    def __enter__(self) -> Self:
        if self._on and not self._all:
            self._begin()
        if self._on:
            _name_thread(self._own_name)
            self._spread(apart=self._clock() - self._ended_s > _IDLE_S)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._on:
            return
        self._passes += 1
        if self._passes <= _FIRST_PASSES or self._passes % _EVERY_PASSES == 0:
            self._look()
        if self._apart:
            _move(0, self._all)
        _name_thread(self._idle_name)
        self._ended_s = self._clock()

    def _begin(self) -> None:
        self._all = os.sched_getaffinity(0)
        self._idle_name = _thread_name(threading.get_native_id()) or "cortex"
        self._on = len(self._all) > 1 and _TASKS.is_dir() and _name_thread(self._own_name)

    def _spread(self, *, apart: bool) -> None:
        """Put this thread and its helpers apart, or let all of them run anywhere."""
        if not self._sets or (not apart and not self._apart):
            return
        own, *others = self._sets if apart else [self._all] * len(self._sets)
        try:
            if apart != self._apart:
                for thread, cpus in zip(self._helpers, others, strict=True):
                    os.sched_setaffinity(thread, cpus)
            os.sched_setaffinity(0, own)
            self._apart = apart
        except OSError as refused:
            if not isinstance(refused, ProcessLookupError):
                logger.warning("compute threads are left where the kernel puts them: %s", refused)
                self._on = False
            self._forget()

    def _forget(self) -> None:
        """A helper has ended or may not be moved: none is known any more, and what is left runs anywhere."""
        for thread in (0, *self._helpers):
            _move(thread, self._all)
        self._helpers, self._sets, self._apart = [], [], False

    def _look(self) -> None:
        helpers, others = self._find()
        # A new thread has got the CPUs of who started it.
        for thread in (*others, *(new for new in helpers if new not in self._helpers)):
            _move(thread, self._all)
        if helpers == self._helpers:
            return
        self._changes += 1
        self._on = self._changes <= _MOST_CHANGES
        self._spread(apart=False)
        # Two workers on one machine should not both begin with the first CPU.
        sets = parts(sorted(self._all), len(helpers) + 1, os.getpid()) if self._on else []
        self._helpers, self._sets = helpers, sets

    def _find(self) -> tuple[list[int], list[int]]:
        """The ids, oldest first, of the threads that were started while a pass ran: those that compute, and others
        (a progress bar's)."""
        own = threading.get_native_id()
        tasks = sorted(int(task) for task in os.listdir(_TASKS))
        spent_ns = {task: _cpu_ns(task) for task in tasks if task != own and _thread_name(task) == self._own_name}
        least_ns = max(spent_ns.values(), default=0) * _COMPUTES
        helpers = [task for task, ns in spent_ns.items() if ns >= least_ns]
        return helpers, [task for task in spent_ns if task not in helpers]


def _move(thread: int, cpus: set[int]) -> None:
    """Where that is possible: it may have ended, and the process may use other CPUs by now."""
    with contextlib.suppress(OSError):
        os.sched_setaffinity(thread, cpus)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _thread_name(thread: int) -> str:
    try:
        return (_TASKS / str(thread) / "comm").read_text().strip()
    except OSError:
        return ""  # it has ended


def _cpu_ns(thread: int) -> int:
    try:
        return int((_TASKS / str(thread) / "schedstat").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 0  # it has ended, or this kernel keeps no such books


def _name_thread(name: str) -> bool:
    """Name the calling thread for the kernel (15 characters at most); whether that worked."""
    try:
        return bool(_libc().prctl(_PR_SET_NAME, name.encode(), 0, 0, 0) == 0)
    except (AttributeError, OSError):  # another C library
        return False
