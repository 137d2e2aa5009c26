"""The thread that runs models: takes batches from the line, forwards, settles.

One runner serves every model that computes in the worker's own process (so that forward passes never compete for
the same cores); each model hosted in children has a runner of its own. While a long pass runs, the runner's preparer
admits what arrives, so that the next batch is ready when the pass ends; an idle runner admits by itself, which spares
a short pass the hand-over.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from typing import Final, NamedTuple

from cortex_tasks.errors import CortexError
from workers.adapters import Item
from workers.admission import Admission, Events, Slot, fail_inside
from workers.batching import Batch
from workers.placement import Placement
from workers.registry import Model, Registry
from workers.runtime import Job, forward_isolating

__all__ = ["STOP_GRACE_S", "Runner", "Running"]

logger = logging.getLogger(__name__)

#: A warm shutdown finishes what has started for so long: within the 30 s that supervisors usually grant.
STOP_GRACE_S: Final = 20.0
#: Passes that usually take longer than this are worth a hand-over to the preparer.
_LONG_PASS_S: Final = 0.005


class Running(NamedTuple):
    """A forward pass."""

    model: str
    #: Monotonic seconds.
    since_s: float


class Runner(threading.Thread):
    """Runs the models it was given until it is stopped."""

    def __init__(self, name: str, registry: Registry, events: Events, *, stop_grace_s: float = STOP_GRACE_S) -> None:
        """``stop_grace_s``: how long ``stop`` goes on with jobs that have started."""
        super().__init__(name=f"runner-{name}", daemon=True)
        self._registry = registry
        self._events = events
        self._admission = Admission(registry, events, self._notify)
        lock = threading.RLock()
        self._changed = threading.Condition(lock)
        #: The preparer waits here: for work that comes while a long pass runs.
        self._while_busy = threading.Condition(lock)
        self._preparer = threading.Thread(target=self._prepare, name=f"preparer-{name}", daemon=True)
        self._stopping = False
        self._stop_grace_s = stop_grace_s
        self._usual_pass_s = 0.0
        self._placement = Placement()
        #: The forward pass that is running; None between passes. Replaced as a whole, for the watchdog's thread.
        self.running: Running | None = None

    # ------------------------------------------------------------------ called by other threads

    def submit(self, job: Job) -> None:
        """Take a job. Never blocks on a model."""
        self._admission.put(job)
        self._notify()

    def stop(self) -> None:
        """Finish what has started, drop the rest, end the thread. Returns at once; ``join`` to wait."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
            self._while_busy.notify()

    def _notify(self) -> None:
        with self._changed:
            if self._in_long_pass():
                self._while_busy.notify()
            else:
                self._changed.notify()

    def _in_long_pass(self) -> bool:
        return self.running is not None and self._usual_pass_s > _LONG_PASS_S

    # -------------------------------------------------------------------------- on its own threads

    def run(self) -> None:
        self._preparer.start()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._admission.has_work or self._stopping)
                stopping = self._stopping
            if stopping:
                self._preparer.join()
                self._drain()
                return
            if self._admission.has_incoming:
                self._admission.admit()
            batch = self._admission.take()
            if batch is not None:
                self._run_guarded(batch)

    def _prepare(self) -> None:
        """The preparer: admit what arrives while a long pass runs."""
        while True:
            with self._changed:
                self._while_busy.wait_for(
                    lambda: self._stopping or (self._in_long_pass() and self._admission.has_incoming)
                )
                if self._stopping:
                    return
            self._admission.admit()
            with self._changed:
                # The pass may have ended meanwhile: then the runner found nothing in line, and sleeps.
                self._changed.notify()

    def _drain(self) -> None:
        """On a stop: jobs that have started are finished, as far as the grace goes; the others are dropped, which
        gives them back to the queue. A bulk job that goes back is computed again; nothing of it was answered."""
        until_s = time.monotonic() + self._stop_grace_s
        left = dict.fromkeys(self._admission.clear())
        while (batch := self._admission.take()) is not None:
            in_time = time.monotonic() < until_s
            go_on = [waiting for waiting in batch.items if in_time and waiting.payload.job.started]
            left.update(dict.fromkeys(w.payload.job for w in batch.items if w not in go_on))
            if go_on:
                self._run_guarded(Batch(batch.group, go_on, batch.budget))
        if left:
            self._events.dropped(list(left))

    def _run_guarded(self, batch: Batch[Slot]) -> None:
        """A defect here must neither end the thread nor leave a job without an answer."""
        try:
            self._run(batch)
        except Exception as error:
            logger.exception("a batch of %s failed", batch.group.model)
            fail_inside([waiting.payload.job for waiting in batch.items], error, self._events)
        finally:
            self._registry.release(batch.group.model, len(batch.items))

    # ------------------------------------------------------------------------------ a batch runs

    def _run(self, batch: Batch[Slot]) -> None:
        slots = self._wanted(batch)
        if not slots:
            return
        model = self._registry.model(batch.group.model)
        self._start(slots)
        started_s = time.perf_counter()
        try:
            with self._placement:
                outcomes = self._forward(model, batch, slots)
                pass_s = time.perf_counter() - started_s
                for slot in slots:
                    if slot.job.suspect:
                        self._events.survived(slot.job, slot.index)
                model.batches += 1
                model.items += len(slots)
                # All that can wait comes after it: somebody waits for these answers.
                self._settle(model, slots, outcomes, pass_s * 1e3)
        finally:
            self.running = None
        self._usual_pass_s += 0.2 * (pass_s - self._usual_pass_s)
        if model.learner is not None:
            budget_tokens = batch.budget.max_padded_tokens
            if batch.full and len(slots) == len(batch.items):
                tokens = sum(waiting.cost_tokens for waiting in batch.items)
                model.learner.observe(budget_tokens, tokens, pass_s)
            else:
                model.learner.pass_over(budget_tokens)

    def _wanted(self, batch: Batch[Slot]) -> list[Slot]:
        """The batch less the items of jobs that were cancelled, expired or may not run any more."""
        slots = [waiting.payload for waiting in batch.items]
        may_start = {job: self._may_start(job) for job in _jobs_of(slots)}
        return [slot for slot in slots if may_start[slot.job] and not self._refused(slot)]

    def _refused(self, slot: Slot) -> bool:
        """Whether this input of a suspect has been tried too often; it fails then."""
        job = slot.job
        refusal = self._events.may_run(job, slot.index) if job.suspect else None
        if refusal is None:
            return False
        if len(job.inputs) == 1:
            job.failure = refusal
        if job.settle(slot.index, refusal):
            self._events.finished([job])
        return True

    def _may_start(self, job: Job) -> bool:
        if job.failure is not None or job.given_up:
            return False
        if job.started:
            return True
        if self._events.unwanted(job):
            job.given_up = True  # its other items are passed over as well
            self._events.dropped([job])
            return False
        return True

    def _start(self, slots: list[Slot]) -> None:
        now_s = time.time()
        fresh = [job for job in _jobs_of(slots) if not job.started]
        for job in fresh:
            job.started = True
            if job.sent_at_s is not None:
                job.watch.queue_ms = max(0.0, (now_s - job.sent_at_s) * 1e3 - job.watch.prepare_ms)
        if fresh:
            self._events.started(fresh)

    def _forward(self, model: Model, batch: Batch[Slot], slots: list[Slot]) -> list[object]:
        """One outcome a slot."""
        adapter, task, params = model.loaded, batch.group.task, slots[0].job.params

        def note_pass() -> None:
            self.running = Running(model.alias, time.monotonic())

        note_pass()
        items: list[Item] = []
        for slot in slots:
            item = slot.item
            if item is None:
                prepared = adapter.prepare(task, [slot.job.inputs[slot.index]], params)[0]
                if isinstance(prepared, CortexError):
                    return [prepared]
                item = prepared
            items.append(item)
        return forward_isolating(adapter, task, items, params, note_pass)

    def _settle(self, model: Model, slots: list[Slot], outcomes: list[object], forward_ms: float) -> None:
        for job in _jobs_of(slots):
            job.watch.forward_ms += forward_ms
            job.watch.batch_items = max(job.watch.batch_items, len(slots))
        done = [slot.job for slot, out in zip(slots, outcomes, strict=True) if slot.job.settle(slot.index, out)]
        if done:
            model.jobs += len(done)
            self._events.finished(done)


def _jobs_of(slots: Sequence[Slot]) -> list[Job]:
    """The jobs of these slots, each once."""
    return list(dict.fromkeys(slot.job for slot in slots))
