"""The thread that runs models: takes jobs, prepares them, batches their items, forwards, settles.

One runner serves every model that computes in the worker's own process (so that forward passes never compete
for the same cores); each model hosted in children has a runner of its own. Loading happens on a thread of its
own, so that a model that loads does not hold up the others' batches.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cortex_tasks.config import Batching
from cortex_tasks.errors import CortexError, InferenceFailed
from workers.adapters import Item
from workers.batching import Batch, Batcher, Group, Waiting
from workers.registry import Model, Registry
from workers.runtime import Job, forward_isolating

__all__ = ["Events", "Runner"]

logger = logging.getLogger(__name__)


class Events(Protocol):
    """What a runner tells its owner, on the runner's own thread."""

    def started(self, jobs: Sequence[Job]) -> None:
        """These jobs' first items go into a forward pass now."""

    def finished(self, jobs: Sequence[Job]) -> None:
        """These jobs are settled or have failed as a whole."""

    def dropped(self, jobs: Sequence[Job]) -> None:
        """These jobs were cancelled or expired before they cost anything."""

    def unwanted(self, job: Job) -> bool:
        """Whether a job that has not started should be dropped (revoked, past its deadline)."""

    def may_run(self, job: Job) -> CortexError | None:
        """Asked before a suspect runs, alone: None, or the error it fails with (too many attempts)."""


@dataclass(frozen=True, slots=True)
class _Slot:
    """One item's place: its job and index, and the prepared item (None for a suspect, prepared when it runs)."""

    job: Job
    index: int
    item: Item | None


class Runner(threading.Thread):
    """Runs the models it was given until it is stopped."""

    def __init__(self, name: str, registry: Registry, events: Events) -> None:
        super().__init__(name=f"runner-{name}", daemon=True)
        self._registry = registry
        self._events = events
        self._wake = threading.Condition()
        self._incoming: list[Job] = []
        self._parked: dict[str, list[Job]] = defaultdict(list)
        self._batcher: Batcher[_Slot] = Batcher()
        self._stopping = False
        #: Monotonic seconds since when a forward pass has been running; None between passes.
        self.busy_since_s: float | None = None
        self.busy_model: str = ""

    # ------------------------------------------------------------------ called by other threads

    def submit(self, job: Job) -> None:
        """Take a job. Never blocks on a model."""
        with self._wake:
            self._incoming.append(job)
            self._wake.notify()

    def stop(self) -> None:
        """Finish what has started, drop the rest, end the thread. Returns at once; ``join`` to wait."""
        with self._wake:
            self._stopping = True
            self._wake.notify()

    # ---------------------------------------------------------------------------- on this thread

    def run(self) -> None:
        while True:
            with self._wake:
                while not (self._incoming or len(self._batcher) or self._stopping):
                    self._wake.wait()
                incoming, self._incoming = self._incoming, []
                stopping = self._stopping
            if stopping:
                self._drain(incoming)
                return
            if incoming:
                self._guard(self._admit, incoming, incoming)
            batch = self._batcher.take(self._budget)
            if batch is not None:
                self._guard(self._run_batch, batch, [waiting.payload.job for waiting in batch.items])

    def _guard(self, stage: Callable[[Any], None], work: Any, jobs: Sequence[Job]) -> None:
        """A defect in a stage must neither end the thread nor leave its jobs without an answer."""
        try:
            stage(work)
        except Exception as error:
            logger.exception("%s: %s failed", self.name, stage.__name__)
            broken = [job for job in jobs if job.open_items > 0 and job.failure is None]
            for job in broken:
                job.failure = InferenceFailed(f"the worker failed inside: {type(error).__name__}: {error}")
            self._events.finished(broken)

    def _drain(self, incoming: list[Job]) -> None:
        """On a stop: jobs that have started are finished, the others are dropped (given back to the queue)."""
        idle: dict[str, Job] = {job.id: job for job in incoming}
        idle.update((job.id, job) for jobs in self._parked.values() for job in jobs)
        while (batch := self._batcher.take(self._budget)) is not None:
            started = [slot for slot in batch.items if slot.payload.job.started]
            idle.update((slot.payload.job.id, slot.payload.job) for slot in batch.items if slot not in started)
            if started:
                self._run_batch(Batch(batch.group, started))
        if idle:
            self._events.dropped(list(idle.values()))

    def _budget(self, alias: str) -> Batching:
        return self._registry.model(alias).config.batching

    # ------------------------------------------------------------------------------- admission

    def _admit(self, jobs: list[Job]) -> None:
        """Split jobs by what can be done with them now: drop, fail, park until loaded, or prepare."""
        unwanted = [job for job in jobs if self._events.unwanted(job)]
        if unwanted:
            self._events.dropped(unwanted)
        groups: dict[Group, list[Job]] = defaultdict(list)
        for job in jobs:
            if job in unwanted:
                continue
            if job.open_items == 0:
                self._finish([job])
                continue
            model = self._registry.model(job.model)
            if model.state == "ready":
                groups[job.group].append(job)
            else:
                self._park(model, job)
        for group, members in groups.items():
            self._prepare(group, members)

    def _park(self, model: Model, job: Job) -> None:
        """Keep a job until its model is loaded; start the load unless it runs or failed a moment ago."""
        if model.state != "loading" and not self._registry.may_load(model):
            job.failure = model.error
            self._events.finished([job])
            return
        self._parked[model.alias].append(job)
        if model.state != "loading":
            model.state = "loading"
            threading.Thread(target=self._load, args=(model.alias,), name=f"load-{model.alias}", daemon=True).start()

    def _load(self, alias: str) -> None:
        """On the loading thread: load, then hand the parked jobs back to the runner."""
        try:
            self._registry.load(alias)
        except CortexError:
            logger.debug("load of %s failed; its jobs get the reason", alias)
        with self._wake:
            self._incoming.extend(self._parked.pop(alias, []))
            self._wake.notify()

    def _prepare(self, group: Group, jobs: list[Job]) -> None:
        """Prepare the inputs of jobs of one group in one call and put their items in line."""
        plain = [job for job in jobs if not job.suspect]
        for job in jobs:
            if job.suspect:
                self._line_up_suspect(job)
        if not plain:
            return
        adapter = self._registry.model(group.model).loaded
        given = [job.good_inputs() for job in plain]
        inputs = [value for pairs in given for _, value in pairs]
        started = time.perf_counter()
        try:
            prepared = adapter.prepare(group.task, inputs, plain[0].params)
            if len(prepared) != len(inputs):
                raise RuntimeError(f"prepare returned {len(prepared)} items for {len(inputs)} inputs")
        except Exception:
            logger.exception("%s could not prepare %d inputs together; one by one", group.model, len(inputs))
            for job in plain:
                self._line_up_suspect(job)
            return
        prepare_ms = (time.perf_counter() - started) * 1e3
        place = iter(prepared)
        for job, pairs in zip(plain, given, strict=True):
            job.watch.prepare_ms = prepare_ms
            self._line_up(job, [(index, next(place)) for index, _ in pairs])

    def _line_up(self, job: Job, prepared: list[tuple[int, Item | CortexError]]) -> None:
        done = False
        for index, item in prepared:
            if isinstance(item, CortexError):
                done = job.settle(index, item)
            else:
                slot = _Slot(job, index, item)
                self._batcher.add(Waiting(slot, job.group, item.cost_tokens, job.lane, job.deadline_s))
        if done:
            self._finish([job])

    def _line_up_suspect(self, job: Job) -> None:
        """A job that may have killed a worker: each item runs by itself, prepared only then."""
        for index, _ in job.good_inputs():
            slot = _Slot(job, index, None)
            self._batcher.add(Waiting(slot, job.group, 1, job.lane, job.deadline_s, alone=True))

    # ------------------------------------------------------------------------------ a batch runs

    def _run_batch(self, batch: Batch[_Slot]) -> None:
        slots = self._wanted(batch)
        if not slots:
            return
        model = self._registry.model(batch.group.model)
        self._start(slots)
        self.busy_model, self.busy_since_s = model.alias, time.monotonic()
        try:
            outcomes, forward_ms = self._forward(model, batch.group, slots)
        finally:
            self.busy_since_s = None
        done: list[Job] = []
        counted: set[str] = set()
        for slot, outcome in zip(slots, outcomes, strict=True):
            job = slot.job
            if job.id not in counted:
                counted.add(job.id)
                job.watch.forward_ms += forward_ms
                job.watch.batch_items = max(job.watch.batch_items, len(slots))
            if job.settle(slot.index, outcome):
                done.append(job)
        model.batches += 1
        model.items += len(slots)
        self._finish(done)

    def _wanted(self, batch: Batch[_Slot]) -> list[_Slot]:
        """The batch less the items of jobs that were cancelled, expired or may not run any more."""
        slots = [waiting.payload for waiting in batch.items]
        verdicts: dict[str, bool] = {}
        for job in {slot.job.id: slot.job for slot in slots}.values():
            verdicts[job.id] = self._may_start(job)
        return [slot for slot in slots if verdicts[slot.job.id]]

    def _may_start(self, job: Job) -> bool:
        if job.failure is not None or job.open_items < 0:
            return False
        if job.started:
            return True
        if self._events.unwanted(job):
            job.open_items = -1  # its other items are passed over as well
            self._events.dropped([job])
            return False
        if job.suspect and (refusal := self._events.may_run(job)) is not None:
            job.failure = refusal
            self._events.finished([job])
            return False
        return True

    def _start(self, slots: list[_Slot]) -> None:
        now_s = time.time()
        fresh = [job for job in {slot.job.id: slot.job for slot in slots}.values() if not job.started]
        for job in fresh:
            job.started = True
            if job.sent_at_s is not None:
                job.watch.queue_ms = max(0.0, (now_s - job.sent_at_s) * 1e3 - job.watch.prepare_ms)
        if fresh:
            self._events.started(fresh)

    def _forward(self, model: Model, group: Group, slots: list[_Slot]) -> tuple[list[object], float]:
        """One outcome a slot, and the time of the pass in milliseconds."""
        adapter, params = model.loaded, slots[0].job.params
        started = time.perf_counter()
        items: list[Item] = []
        for slot in slots:
            item = slot.item
            if item is None:
                prepared = adapter.prepare(group.task, [slot.job.inputs[slot.index]], params)[0]
                if isinstance(prepared, CortexError):
                    return [prepared], 0.0
                item = prepared
            items.append(item)
        outcomes = forward_isolating(adapter, group.task, items, params)
        return outcomes, (time.perf_counter() - started) * 1e3

    def _finish(self, jobs: list[Job]) -> None:
        for job in jobs:
            self._registry.model(job.model).jobs += 1
        if jobs:
            self._events.finished(jobs)
