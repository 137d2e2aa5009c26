"""From a job's arrival to its items' places in line: dropped, failed, parked until its model is loaded, or prepared.

Each place in line holds its model: it stays in memory until the item's batch has run.

Several threads may admit (the runner between passes, its preparer while a pass runs) and take batches; locks keep them
apart.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from cortex_tasks.errors import CortexError, InferenceFailed
from cortex_tasks.payloads import Lane
from workers.adapters import Item
from workers.batching import Ahead, Batch, Batcher, Budget, Group, Waiting
from workers.registry import Model, Registry
from workers.runtime import Job

__all__ = ["Admission", "Events", "Slot", "fail_inside", "jobs_of"]

logger = logging.getLogger(__name__)

#: Characters of a lane's texts that are prepared at a time, one job at least: some tens of milliseconds on two cores.
_PORTION_CHARS: Final = 100_000
#: As many where a batch holds more: about its texts.
_CHARS_A_TOKEN: Final = 4


class Events(Protocol):
    """What the owner of a runner is told and asked, on the runner's threads."""

    def started(self, jobs: Sequence[Job]) -> None:
        """These jobs' first items go into a forward pass now."""

    def finished(self, jobs: Sequence[Job]) -> None:
        """These jobs are settled or have failed as a whole."""

    def dropped(self, jobs: Sequence[Job]) -> None:
        """These jobs were cancelled or expired before they cost anything."""

    def unwanted(self, job: Job) -> bool:
        """Whether a job that has not started should be dropped (revoked, past its deadline)."""

    def may_run(self, job: Job, index: int) -> CortexError | None:
        """Asked before a suspect's input runs, alone: None, or the error it fails with (too many attempts)."""

    def survived(self, job: Job, index: int) -> None:
        """A suspect's input ran and the process lives: it is not guilty of what may come before it is answered."""


@dataclass(slots=True, eq=False)  # not frozen: that makes building one three times as slow
class Slot:
    """One item's place: its job and index, and the prepared item (None for a suspect, prepared when it runs)."""

    job: Job
    index: int
    item: Item | None


class Admission:
    """The jobs of one runner that are not running. ``wake`` is called when there is new work from another thread."""

    def __init__(self, registry: Registry, events: Events, wake: Callable[[], None]) -> None:
        self._registry = registry
        self._events = events
        self._wake = wake
        self._incoming: list[Job] = []
        self._parked: dict[str, list[Job]] = defaultdict(list)
        self._line: Batcher[Slot] = Batcher()
        #: Guards the two lists above; held for moments.
        self._lists = threading.Lock()
        #: Guards the line. Who takes by what is ahead holds it from the look on: something else may line up in between.
        self.line_lock = threading.RLock()
        #: Held while jobs are prepared, so that they enter the line in order.
        self._admitting = threading.Lock()

    # ------------------------------------------------------------------------------- in and out

    def put(self, job: Job) -> None:
        with self._lists:
            self._incoming.append(job)

    @property
    def has_incoming(self) -> bool:
        return bool(self._incoming)

    @property
    def has_more(self) -> bool:
        """Whether anything is in line, has come in, or is being prepared."""
        return bool(self._incoming) or len(self._line) > 0 or self._admitting.locked()

    @property
    def is_lone(self) -> bool:
        """Whether one item, and nothing else, is in line."""
        return len(self._line) == 1

    def ahead(self) -> Ahead | None:
        """What ``take`` would take; None when nothing is in line."""
        with self.line_lock:
            return self._line.ahead(self._budget)

    def take(self, parts: int = 1, sharers: int = 1) -> Batch[Slot] | None:
        """The next batch; None when nothing is in line. ``parts``, ``sharers``: as many run at the same time, and may
        begin now, this one included."""
        with self.line_lock:
            return self._line.take(self._budget, self._brief_budget, parts, sharers)

    def clear(self) -> list[Job]:
        """Everyone who is not in line yet, taken out: for a stop."""
        with self._admitting, self._lists:
            jobs = [*self._incoming, *(job for parked in self._parked.values() for job in parked)]
            self._incoming = []
            self._parked.clear()
            return jobs

    def _budget(self, group: Group) -> Budget:
        return self._registry.model(group.model).budget(group.task)

    def _brief_budget(self, group: Group) -> Budget:
        return self._registry.model(group.model).brief_budget(group.task)

    # ------------------------------------------------------------------------------- admission

    def admit(self) -> None:
        """Deal with jobs that came in: all, or some of many. A defect here leaves no job without an answer."""
        with self._admitting:
            with self._lists:
                jobs = self._portion()
            try:
                self._admit(jobs)
            except BaseException as error:  # a panic of a Rust library is no Exception
                logger.exception("jobs could not be admitted")
                fail_inside([job for job in jobs if not self._is_parked(job)], error, self._events)

    def _portion(self) -> list[Job]:
        """Taken out of those who came in, some of each lane: neither waits until a backlog of the other is prepared."""
        portion: list[Job] = []
        left: list[Job] = []
        chars: dict[Lane, int] = {"interactive": 0, "bulk": 0}
        for job in self._incoming:
            if chars[job.lane] < self._portion_chars(job.model):
                chars[job.lane] += sum([len(value) for value in job.inputs if isinstance(value, str)])
                portion.append(job)
            else:
                left.append(job)
        self._incoming = left
        return portion

    def _portion_chars(self, alias: str) -> int:
        model = self._registry.models.get(alias)
        return (
            max(_PORTION_CHARS, _CHARS_A_TOKEN * model.config.batching.max_padded_tokens) if model else _PORTION_CHARS
        )

    def _admit(self, jobs: list[Job]) -> None:
        unwanted = [job for job in jobs if self._events.unwanted(job)]
        if unwanted:
            self._events.dropped(unwanted)
        groups: dict[Group, list[Job]] = defaultdict(list)
        try:
            for job in jobs:
                if job in unwanted:
                    continue
                model = self._registry.model(job.model)
                if job.open_items == 0 or job.failure is not None:
                    self._finish(job)
                elif job.group in groups or self._registry.hold(model):
                    groups[job.group].append(job)
                else:
                    self._park(model, job)
            for group, members in groups.items():
                self._prepare(group, members)
        finally:
            # From here on each item in line holds the model by itself.
            for group in groups:
                self._registry.release(group.model)

    def _finish(self, job: Job) -> None:
        self._registry.model(job.model).jobs += 1
        self._events.finished([job])

    def _is_parked(self, job: Job) -> bool:
        with self._lists:
            return job in self._parked.get(job.model, ())

    def _park(self, model: Model, job: Job) -> None:
        """Keep a job until its model is loaded; start the load unless it runs or failed a moment ago."""
        if model.state != "loading" and not self._registry.may_load(model):
            job.failure = model.error
            self._finish(job)
            return
        with self._lists:
            self._parked[model.alias].append(job)
        if model.state != "loading":
            model.state = "loading"
            threading.Thread(target=self._load, args=(model.alias,), name=f"load-{model.alias}", daemon=True).start()

    def _load(self, alias: str) -> None:
        """On the loading thread: load, then let the parked jobs come in again, with the reason if it failed."""
        failure: CortexError | None = None
        try:
            self._registry.load(alias, hold=True)
        except CortexError as error:
            failure = error
        with self._lists:
            jobs = self._parked.pop(alias, [])
            for job in jobs:
                job.failure = failure
            self._incoming.extend(jobs)
        if failure is None:
            # They are in line before anybody may throw the model out again: another thread may have the last in hand.
            while self.has_incoming:
                self.admit()
            self.admit()
            self._registry.release(alias)
        self._wake()

    # ------------------------------------------------------------------------------ preparation

    def _prepare(self, group: Group, jobs: list[Job]) -> None:
        """Prepare the inputs of jobs of one group in one call and put their items in line."""
        plain = [job for job in jobs if not job.suspect]
        for job in jobs:
            if job.suspect:
                self._line_up_alone(job)
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
        except BaseException:  # a panic of a Rust library, such as tokenizers, is no Exception
            logger.exception("%s could not prepare %d inputs together; one by one", group.model, len(inputs))
            for job in plain:
                self._line_up_alone(job)
            return
        prepare_ms = (time.perf_counter() - started) * 1e3
        place = iter(prepared)
        for job, pairs in zip(plain, given, strict=True):
            job.watch.prepare_ms = prepare_ms
            self._line_up(job, [(index, next(place)) for index, _ in pairs])

    def _line_up(self, job: Job, prepared: list[tuple[int, Item | CortexError]]) -> None:
        refused = [(index, item) for index, item in prepared if isinstance(item, CortexError)]
        done = [job.settle(index, error) for index, error in refused]
        self._registry.memory.hold_more(job.model, len(prepared) - len(refused))
        with self.line_lock:
            for index, item in prepared:
                if not isinstance(item, CortexError):
                    slot = Slot(job, index, item)
                    self._line.add(Waiting(slot, job.group, item.cost_tokens, job.lane, job.deadline_s))
        if any(done):
            self._finish(job)

    def _line_up_alone(self, job: Job) -> None:
        """A job that may have killed a worker: each item runs by itself, prepared only then."""
        good = job.good_inputs()
        self._registry.memory.hold_more(job.model, len(good))
        with self.line_lock:
            for index, _ in good:
                slot = Slot(job, index, None)
                self._line.add(Waiting(slot, job.group, 1, job.lane, job.deadline_s, alone=True))


def jobs_of(slots: Sequence[Slot]) -> list[Job]:
    """The jobs of these slots, each once."""
    return list(dict.fromkeys(slot.job for slot in slots))


def fail_inside(jobs: Sequence[Job], error: BaseException, events: Events) -> None:
    """Jobs that a defect of the worker's own caught: each gets an answer that says so."""
    broken = [job for job in dict.fromkeys(jobs) if job.open_items > 0 and job.failure is None]
    for job in broken:
        job.failure = InferenceFailed(f"the worker failed inside: {type(error).__name__}: {error}")
    events.finished(broken)
