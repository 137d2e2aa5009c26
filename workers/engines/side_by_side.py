"""A batch in parts that are computed side by side, each by one thread; or batches side by side, where many wait.

All threads on one operation after the other meet at a barrier after each: every one then waits for the slowest, which
on shared cores is the one that another program keeps from running. Parts meet once, at the end. Measured
(docs/performance-engines.md): 1.05 to 1.2 times the tokens a second on idle cores, 1.1 to 1.3 times on cores that
others use too. A small batch has too little for that, and is faster with all threads on it.

Batches side by side never meet: a thread that is through takes the next one (``crew``).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from typing import Final, TypeVar

import torch

from workers.engines.crew import Crew

__all__ = ["SideBySide", "cut"]

Part = TypeVar("Part")

#: A smaller part is slower by itself than with all threads on the whole.
_LEAST_TOKENS: Final = 64
#: The same when the costliest part is more than this over the mean of all: the others wait for it.
_UNEQUAL: Final = 1.2

_this_thread = threading.local()


def cut(costs: Sequence[float], parts: int) -> list[slice]:
    """Consecutive rows in so many parts of about the same cost, none of them empty. There are at least as many rows."""
    goal, slices, first, spent = sum(costs) / parts, list[slice](), 0, 0.0
    for at, cost in enumerate(costs):
        left = parts - len(slices)
        must, may = len(costs) - at < left, at > first and left > 1
        if may and (must or spent + cost / 2 > goal * (len(slices) + 1)):
            slices.append(slice(first, at))
            first = at
        spent += cost
    return [*slices, slice(first, len(costs))]


class SideBySide:
    """For one model. The threads are the process'."""

    def __init__(self, threads: int, pair_cost: float) -> None:
        """``threads``: as many as torch computes with. ``pair_cost``: what a pair of tokens that attend to each other
        costs, in tokens."""
        self._threads = threads
        self._pair_cost = pair_cost
        #: Its threads, for whole batches; None when there is one. They do not start first in a pass: there they would
        #: count as OpenMP's helpers, and be placed like them.
        self.crew = Crew(threads, _pool(threads)) if threads > 1 else None

    def parts(self, lengths: Sequence[int]) -> list[slice]:
        """The parts for rows of so many tokens; one where all threads had better compute the whole, or where this
        thread computes by itself."""
        whole = [slice(0, len(lengths))]
        few = not len(lengths) >= self._threads > 1 or sum(lengths) < self._threads * _LEAST_TOKENS
        if few or getattr(_this_thread, "computes_alone", False):
            return whole
        costs = [length * (1 + length * self._pair_cost) for length in lengths]
        parts = cut(costs, self._threads)
        longest = max(sum(costs[part]) for part in parts)
        return parts if longest * self._threads <= _UNEQUAL * sum(costs) else whole

    def run(self, compute: Callable[[Part], None], parts: Sequence[Part]) -> None:
        """Returns when all are through. Raises what the first part that failed has raised."""
        assert self.crew is not None, "one thread computes the whole"
        inference = torch.is_inference_mode_enabled()

        def in_mode(part: Part) -> None:
            with torch.inference_mode(inference):
                compute(part)

        running = [self.crew.executor.submit(in_mode, part) for part in parts]
        wait(running)
        for part in running:
            part.result()


#: Models are loaded side by side: the second waits for the first one's threads, and for torch's setting after them.
_starting = threading.Lock()


def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads that compute with one thread each, the same for all models."""
    with _starting:
        return _started(threads)


@cache
def _started(threads: int) -> ThreadPoolExecutor:
    pool = ThreadPoolExecutor(threads, thread_name_prefix="part", initializer=_alone)
    # All of them start now, since each waits for all.
    started = threading.Barrier(threads)
    wait([pool.submit(started.wait) for _ in range(threads)])
    # `_alone` has also set what threads to come begin with.
    torch.set_num_threads(threads)
    return pool


def _alone() -> None:
    torch.get_num_threads()  # a thread takes the process' setting when it first needs it, and keeps its own after that
    torch.set_num_threads(1)
    _this_thread.computes_alone = True
