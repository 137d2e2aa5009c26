"""The thread that runs models: takes batches from the line, forwards, has them finished.

One runner serves every model that computes in the worker's own process (so that forward passes never compete for
the same cores); each model hosted in children has a runner of its own. While a long pass runs, the runner's preparer
admits what arrives, so that the next batch is ready when the pass ends; an idle runner admits by itself, which spares
a short pass the hand-over. So it is with the end of a batch: ``workers.finishing`` does it beside the next pass where
that is worth it.

A pass has all cores to itself, on the runner's thread: so a text that comes alone is answered soonest. Where more than
a batch waits and the model has a crew, a batch with a part of the budget runs on each of the crew's threads instead,
*apart* from the others: a thread that is through takes the next one, and none waits for the one that the hub, a client
or Redis has kept from running. Measured in docs/performance.md.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Final, NamedTuple

from cortex_tasks.errors import CortexError
from cortex_tasks.payloads import Params
from workers.adapters import Adapter, Crew, Item
from workers.admission import Admission, Events, Slot, jobs_of
from workers.batching import Batch
from workers.finishing import Finishing, Passed
from workers.placement import Placement
from workers.registry import Model, Registry
from workers.runtime import Job, as_item_error, forward_isolating

__all__ = ["STOP_GRACE_S", "Runner", "Running"]

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
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        #: The preparer waits here: for work that comes while a long pass runs.
        self._while_busy = threading.Condition(self._lock)
        self._preparer = threading.Thread(target=self._prepare, name=f"preparer-{name}", daemon=True)
        self._stopping = False
        self._stop_grace_s = stop_grace_s
        self._usual_pass_s = 0.0
        self._placement = Placement()
        #: Batches that run on threads of a crew.
        self._apart = 0
        #: The forward passes that are running, by their threads.
        self._passes: dict[int, Running] = {}
        #: Guards what passes at the same time may have in common: jobs, a model's counters and its learners.
        self._books = threading.Lock()
        self._finishing = Finishing(name, registry, events, self._books, self._begin_pass, self._end_pass)

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

    @property
    def running(self) -> tuple[Running, ...]:
        """The forward passes that are running, and the finishing of batches. May be read by any thread."""
        return tuple(self._passes.values())

    def _notify(self) -> None:
        with self._lock:
            if self._in_long_pass():
                self._while_busy.notify()
            else:
                self._changed.notify()

    def _in_long_pass(self) -> bool:
        return self.ident in self._passes and self._usual_pass_s > _LONG_PASS_S

    # -------------------------------------------------------------------------- on its own threads

    def run(self) -> None:
        self._preparer.start()
        while True:
            with self._changed:
                self._changed.wait_for(self._may_go_on)
                stopping = self._stopping
            if stopping:
                self._preparer.join()
                self._drain()
                self._finishing.close()
                return
            if self._admission.has_incoming:
                self._admission.admit()
            self._run_next()

    def _may_go_on(self) -> bool:
        if self._stopping:
            return self._apart == 0
        return self._admission.has_incoming or self._turn(self._apart)[0]

    def _turn(self, apart: int) -> tuple[bool, Crew | None]:
        """Whether the next batch may run now, beside so many that run apart, and on whose threads: a crew's, or (None)
        the runner's own with all cores."""
        ahead = self._admission.ahead()
        if ahead is None:
            return False, None
        model = self._registry.model(ahead.model)
        adapter = model.adapter  # read once: another thread may let the model go
        crew = adapter.crew if adapter and not ahead.by_itself else None
        if crew is not None and model.buffer_tokens and ahead.cost_tokens * crew.threads > model.buffer_tokens:
            crew = None  # as many items of that length at a time would not fit in the inference buffer
        if crew is not None and (apart or ahead.more):
            return apart < crew.threads, crew
        return not apart, None

    def _run_next(self) -> None:
        with self._lock, self._admission.line_lock:
            # A lone item has all cores whatever it is, and is waited for.
            may_run, crew = (True, None) if not self._apart and self._admission.is_lone else self._turn(self._apart)
            parts = crew.threads if crew else 1
            batch = self._admission.take(parts, parts - self._apart) if may_run else None
            if batch is not None and crew is not None:
                self._apart += 1
                crew.executor.submit(self._run_apart, batch, crew)
        if batch is not None and crew is None:
            self._run_guarded(batch)

    def _run_apart(self, batch: Batch[Slot], crew: Crew) -> None:
        """On a thread of a crew: this batch. The next one, while it may run so, waits its turn behind whatever else the
        threads were asked for meanwhile: a model that is being loaded warms up on them."""
        follows: Batch[Slot] | None = None
        try:
            self._run_guarded(batch, crew.threads)
            with self._changed, self._admission.line_lock:
                may_run, whose = self._turn(self._apart - 1)
                if may_run and whose == crew and not self._stopping:
                    follows = self._admission.take(crew.threads, crew.threads - (self._apart - 1))
        finally:
            if follows is not None:
                crew.executor.submit(self._run_apart, follows, crew)
            else:
                with self._changed:
                    self._apart -= 1
                    self._changed.notify()

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

    def _run_guarded(self, batch: Batch[Slot], passes: int = 1) -> None:
        """A defect here must neither end the thread nor leave a job without an answer.

        ``passes``: how many run at the same time, on a thread each; one has all cores.
        """
        handed_over = False
        try:
            handed_over = self._run(batch, passes)
        except BaseException as error:  # a panic of a Rust library is no Exception
            self._finishing.fail(batch, error)
        finally:
            if not handed_over:
                self._registry.release(batch.group.model, len(batch.items))

    # ------------------------------------------------------------------------------ a batch runs

    def _run(self, batch: Batch[Slot], passes: int) -> bool:
        """Whether it was handed over, to be finished beside the next one."""
        if batch.items[0].alone:
            self._finishing.wait()  # it may kill the worker, and should not take the others' answers along
        with self._books:
            slots = self._wanted(batch)
            jobs = jobs_of(slots)
            if slots:
                self._start(jobs)
        if not slots:
            return False
        model = self._registry.model(batch.group.model)
        began_s = time.perf_counter()
        with self._placement if passes == 1 else nullcontext():
            try:
                passed = self._forward(model, batch, slots, jobs)
            finally:
                self._end_pass()
            ended_s = time.perf_counter()
            with self._books:
                self._count(passed, began_s, ended_s)
            beside = passes == 1 and self._may_finish_beside(passed)
            if not beside:
                # All that can wait comes after it: somebody waits for these answers.
                self._finishing.run(passed)
        if passes == 1:
            self._usual_pass_s += 0.2 * (ended_s - began_s - self._usual_pass_s)
        with self._books:
            self._learn(model, batch, slots, passes, ended_s - began_s)
        if beside:
            # Not within the placement: a thread that starts there is taken for one that computes.
            self._finishing.hand_over(passed)
        return beside

    def _may_finish_beside(self, passed: Passed) -> bool:
        """Asked when the last one is finished: answers come in the order of their passes."""
        self._finishing.wait()
        return self._admission.has_more and self._finishing.pays_beside(passed)

    def _begin_pass(self, alias: str) -> None:
        self._passes[threading.get_ident()] = Running(alias, time.monotonic())

    def _end_pass(self) -> None:
        self._passes.pop(threading.get_ident(), None)

    def _learn(self, model: Model, batch: Batch[Slot], slots: Sequence[Slot], passes: int, pass_s: float) -> None:
        learner = model.learners.get(batch.group.task)
        if learner is None:
            return
        # A crew's models run on all cores when little waits, or in a hurry: neither says what the budget is good for.
        as_usual = passes > 1 or not (model.adapter and model.adapter.crew)
        if batch.full and as_usual and len(slots) == len(batch.items):
            tokens = sum(waiting.cost_tokens for waiting in batch.items)
            learner.observe(batch.budget.max_padded_tokens, tokens * passes, pass_s)
        else:
            learner.pass_over(batch.budget.max_padded_tokens)

    def _wanted(self, batch: Batch[Slot]) -> list[Slot]:
        """The batch less the items of jobs that were cancelled, expired or may not run any more."""
        slots = [waiting.payload for waiting in batch.items]
        may_start = {job: self._may_start(job) for job in jobs_of(slots)}
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

    def _start(self, jobs: list[Job]) -> None:
        now_s = time.time()
        fresh = [job for job in jobs if not job.started]
        for job in fresh:
            job.started = True
            if job.sent_at_s is not None:
                job.watch.queue_ms = max(0.0, (now_s - job.sent_at_s) * 1e3 - job.watch.prepare_ms)
        if fresh:
            self._events.started(fresh)

    def _forward(self, model: Model, batch: Batch[Slot], slots: list[Slot], jobs: list[Job]) -> Passed:
        adapter, task, params = model.loaded, batch.group.task, slots[0].job.params
        self._begin_pass(model.alias)
        items: list[Item] = []
        for slot in slots:
            item = slot.item
            if item is None:
                prepared = _prepared_alone(adapter, task, slot.job.inputs[slot.index], params)
                if isinstance(prepared, CortexError):
                    return Passed(model, adapter, batch, jobs, slots, [], [prepared])
                item = prepared
            items.append(item)
        raw = forward_isolating(adapter, task, items, params, lambda: self._begin_pass(model.alias))
        return Passed(model, adapter, batch, jobs, slots, items, raw)

    def _count(self, passed: Passed, began_s: float, ended_s: float) -> None:
        model, items = passed.model, len(passed.slots)
        model.batches += 1
        model.items += items
        model.forward_s += ended_s - began_s
        for job in passed.jobs:
            job.watch.add_pass(began_s, ended_s, items)


def _prepared_alone(adapter: Adapter, task: str, value: Any, params: Params) -> Item | CortexError:
    try:
        return adapter.prepare(task, [value], params)[0]
    except BaseException as error:  # a panic of a Rust library is no Exception
        return as_item_error(error)
