"""What is left of a batch when its pass has ended: finish its answers, settle its jobs, tell that they are through.

It is done in place, by the thread that computed the batch, where nobody waits for that thread, and where it is done
sooner than handed over. Else another thread does it while the next pass runs: one batch at a time, so that they finish
in the order they ran in, and no more than one set of raw outputs is kept.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Final

from workers.adapters import Adapter, Item
from workers.admission import Events, Slot, fail_inside
from workers.batching import Batch
from workers.model import Model
from workers.registry import Registry
from workers.runtime import Job, finish_isolating

__all__ = ["Finishing", "Passed"]

logger = logging.getLogger(__name__)

#: A batch is handed over when those of its kind usually take longer to finish. The hand-over itself takes some 20 us;
#: but Python code that finishes keeps the interpreter from the pass beside it for up to 5 ms at a time.
_WORTH_S: Final = 0.001
#: The part that a longer, and a shorter, time has in what is usual: a thread that was kept from running for once
#: says little.
_SLOWER: Final = 0.2
_FASTER: Final = 0.5


@dataclass(slots=True, eq=False)
class Passed:
    """A batch whose pass has ended. Its places in line hold the model until it is finished."""

    model: Model
    adapter: Adapter
    batch: Batch[Slot]
    #: Whose items ran, each once.
    jobs: list[Job]
    #: Those of the batch that ran, and for each the item and its raw output, or a CortexError.
    slots: list[Slot]
    items: Sequence[Item]
    raw: Sequence[Any]


class Finishing:
    """The last stage of one runner's batches.

    ``books`` guards what batches at the same time have in common. ``begins`` and ``ends`` are called with a model's
    name before, and after, its adapter is at work on the calling thread, which the watchdog limits. ``clock``: seconds.
    """

    def __init__(
        self,
        name: str,
        registry: Registry,
        events: Events,
        books: threading.Lock,
        begins: Callable[[str], None],
        ends: Callable[[], None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._registry, self._events, self._books = registry, events, books
        self._begins, self._ends, self._clock = begins, ends, clock
        #: Seconds that finishing a batch takes, by model and task.
        self._usual_s: dict[tuple[str, str], float] = {}
        # Its thread starts with the first batch that is handed over.
        self._beside = ThreadPoolExecutor(1, thread_name_prefix=f"finisher-{name}")
        self._last: Future[None] | None = None

    # -------------------------------------------------------------------- called by the runner's thread

    def pays_beside(self, passed: Passed) -> bool:
        """Whether handing over is sooner done than finishing. Nothing may run beside what may kill the worker."""
        group = passed.batch.group
        return self._usual_s.get((group.model, group.task), 0.0) > _WORTH_S and not passed.slots[0].job.suspect

    def hand_over(self, passed: Passed) -> None:
        """Finish it while the caller goes on, and release its model then. Call ``wait`` before."""
        self._last = self._beside.submit(self._run_beside, passed)

    def wait(self) -> None:
        """Until what was handed over is finished."""
        if self._last is not None:
            wait([self._last])
            self._last = None

    def close(self) -> None:
        """The same, and end the thread."""
        self._beside.shutdown()

    # ----------------------------------------------------------------------------- called by any thread

    def run(self, passed: Passed) -> None:
        """Finish it in the calling thread."""
        began_s = self._clock()
        self._begins(passed.model.alias)
        try:
            outcomes = finish_isolating(
                passed.adapter, passed.batch.group.task, passed.items, passed.raw, passed.slots[0].job.params
            )
        finally:
            # What comes after it may wait for Redis, and is no pass for the watchdog to end.
            self._ends()
        took_s = self._clock() - began_s
        for slot in passed.slots:
            if slot.job.suspect:
                self._events.survived(slot.job, slot.index)
        with self._books:
            self._settle(passed, outcomes, took_s)

    def fail(self, batch: Batch[Slot], error: BaseException) -> None:
        """A defect of the worker's own must not leave a job without an answer."""
        logger.error("a batch of %s failed", batch.group.model, exc_info=error)
        with self._books:
            fail_inside([waiting.payload.job for waiting in batch.items], error, self._events)

    def _run_beside(self, passed: Passed) -> None:
        try:
            self.run(passed)
        except BaseException as error:  # a panic of a Rust library is no Exception
            self.fail(passed.batch, error)
        finally:
            self._registry.release(passed.model.alias, len(passed.batch.items))

    def _settle(self, passed: Passed, outcomes: Sequence[Any], took_s: float) -> None:
        model, kind = passed.model, (passed.model.alias, passed.batch.group.task)
        usual_s = self._usual_s.get(kind, 0.0)
        self._usual_s[kind] = usual_s + (_SLOWER if took_s > usual_s else _FASTER) * (took_s - usual_s)
        for job in passed.jobs:
            job.watch.finish_ms += took_s * 1e3
        done = [slot.job for slot, out in zip(passed.slots, outcomes, strict=True) if slot.job.settle(slot.index, out)]
        if done:
            model.jobs += len(done)
            self._events.finished(done)
