"""Jobs and the stages of their items: prepare, forward with isolation of bad items, finish, answer.

Knows adapters and timing; knows nothing of Celery, threads or Redis.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from cortex_tasks.codec import Answer
from cortex_tasks.derived import Form, made
from cortex_tasks.errors import CortexError, InferenceFailed
from cortex_tasks.payloads import CachePolicy, Lane, Params
from workers.adapters import Adapter, Item
from workers.batching import Batcher, Budget, Group, Waiting

__all__ = ["Job", "Stopwatch", "answer", "as_item_error", "finish_isolating", "forward_isolating", "run_alone"]


@dataclass(slots=True)
class Stopwatch:
    """Where a job's time went so far, in milliseconds."""

    queue_ms: float = 0.0
    prepare_ms: float = 0.0
    forward_ms: float = 0.0
    finish_ms: float = 0.0
    batch_items: int = 0
    #: When passes ran, in order; none touches the next.
    _spans_s: list[tuple[float, float]] = field(default_factory=list)

    def add_pass(self, began_s: float, ended_s: float, items: int) -> None:
        """A pass over so many items, some of them this job's, has ended. Passes may run at the same time: what they
        share counts once. Seconds of any one clock; called in the order of their ends."""
        self.batch_items = max(self.batch_items, items)
        while self._spans_s and self._spans_s[-1][1] >= began_s:
            before_s, until_s = self._spans_s.pop()
            self.forward_ms -= (until_s - before_s) * 1e3
            began_s, ended_s = min(began_s, before_s), max(ended_s, until_s)
        self._spans_s.append((began_s, ended_s))
        self.forward_ms += (ended_s - began_s) * 1e3

    @property
    def model_s(self) -> float:
        """Seconds spent on the model's side of the job: what a runtime should include."""
        return (self.prepare_ms + self.forward_ms + self.finish_ms) / 1e3


@dataclass(slots=True, eq=False)
class Job:
    """One job in this worker.

    An input that is a CortexError was refused already; it is its own outcome. ``outcomes`` fills up item by
    item; None marks one still open.
    """

    id: str
    model: str
    task: str
    params: Params
    inputs: Sequence[Any]
    lane: Lane = "interactive"
    #: Epoch seconds; inf: no deadline.
    deadline_s: float = math.inf
    #: Epoch seconds of submission; None: not told.
    sent_at_s: float | None = None
    packed: bool = False
    cache: CachePolicy = "use"
    #: ``params`` are those that answers are stored under; the answers asked for are made from them, if not the same.
    form: Form | None = None
    #: Items that were found in the cache.
    known_items: int = 0
    #: It was in a worker's hands before; that worker is gone.
    suspect: bool = False
    #: The caller's own (the pool's ticket).
    ticket: Any = None
    #: The parameters' canonical form, where it is known already.
    canonical: str | None = None
    group: Group = field(init=False)
    outcomes: list[Any] = field(init=False)
    open_items: int = field(init=False)
    started: bool = False
    #: Dropped before it started: its items are passed over.
    given_up: bool = False
    watch: Stopwatch = field(default_factory=Stopwatch)
    #: The whole job failed (its model cannot be had).
    failure: CortexError | None = None

    def __post_init__(self) -> None:
        self.group = Group(self.model, self.task, self.canonical or self.params.canonical())
        self.outcomes = [value if isinstance(value, CortexError) else None for value in self.inputs]
        self.open_items = self.outcomes.count(None)

    @property
    def errors(self) -> int:
        """Items that failed; 1 for a job that failed as a whole."""
        return 1 if self.failure else sum(isinstance(outcome, CortexError) for outcome in self.outcomes)

    def good_inputs(self) -> list[tuple[int, Any]]:
        """(index, input) of those that were not refused."""
        return [(i, value) for i, value in enumerate(self.inputs) if not isinstance(value, CortexError)]

    def settle(self, index: int, outcome: Any) -> bool:
        """Record one item's value or error; True when it was the last one open."""
        self.outcomes[index] = outcome
        self.open_items -= 1
        return self.open_items == 0


def forward_isolating(
    adapter: Adapter, task: str, items: Sequence[Item], params: Params, on_pass: Callable[[], None] = lambda: None
) -> list[Any]:
    """A raw output or a CortexError an item, in order. ``on_pass`` is called before each pass."""

    def run(begin: int, end: int) -> Sequence[Any]:
        on_pass()
        return adapter.forward(task, items[begin:end], params)

    return _isolating(run, 0, len(items))


def finish_isolating(
    adapter: Adapter, task: str, items: Sequence[Item], raw: Sequence[Any], params: Params
) -> list[Any]:
    """A wire value or a CortexError an item, in order; entries that are errors already stay what they are."""
    good = [index for index, entry in enumerate(raw) if not isinstance(entry, CortexError)]
    if len(good) == len(raw):
        return _isolating(
            lambda begin, end: adapter.finish(task, items[begin:end], raw[begin:end], params), 0, len(raw)
        )
    outcomes = list(raw)
    if good:
        values = finish_isolating(adapter, task, [items[i] for i in good], [raw[i] for i in good], params)
        for index, value in zip(good, values, strict=True):
            outcomes[index] = value
    return outcomes


def _isolating(run: Callable[[int, int], Sequence[Any]], begin: int, end: int) -> list[Any]:
    """What ``run`` makes of the entries from one place to another.

    When it raises they are cut in half, and so on, so that a bad one fails alone: with k bad ones among n, about
    k log2 n extra runs.
    """
    try:
        made = run(begin, end)
        if len(made) != end - begin:
            raise InferenceFailed(f"the model returned {len(made)} answers for {end - begin} inputs")
        return list(made)
    except (KeyboardInterrupt, SystemExit):
        raise  # a signal's: a stock pool computes on the main thread
    except BaseException as error:  # a panic of a Rust library is no Exception
        if end - begin == 1:
            return [as_item_error(error)]
    middle = (begin + end) // 2
    return [*_isolating(run, begin, middle), *_isolating(run, middle, end)]


def as_item_error(error: BaseException) -> CortexError:
    """What the only input fails with that a model raised this on."""
    if isinstance(error, CortexError):
        return error
    return InferenceFailed(f"the model failed on this input: {type(error).__name__}: {str(error)[:300]}")


def answer(job: Job, revision: str) -> Answer:
    """The answer of a job whose items are all settled."""
    watch = job.watch
    return Answer(
        task=job.task,
        model=job.model,
        revision=revision,
        timings={
            "queue_ms": round(watch.queue_ms, 3),
            "prepare_ms": round(watch.prepare_ms, 3),
            "forward_ms": round(watch.forward_ms, 3),
            "finish_ms": round(watch.finish_ms, 3),
            "cached": "l2" if job.known_items and job.known_items == len(job.good_inputs()) else None,
            "batch_items": watch.batch_items,
        },
        items=[
            {"error": outcome.to_wire()} if isinstance(outcome, CortexError) else {"value": outcome}
            for outcome in _asked(job)
        ],
        packed=job.packed,
    )


def _asked(job: Job) -> list[Any]:
    """The outcomes in the form that was asked for."""
    if job.form is None:
        return job.outcomes
    indexes = [index for index, outcome in enumerate(job.outcomes) if isinstance(outcome, dict)]
    outcomes = list(job.outcomes)
    for index, value in zip(indexes, made(job.form, [outcomes[i] for i in indexes], job.model), strict=True):
        outcomes[index] = value
    return outcomes


def run_alone(job: Job, adapter: Adapter, budget: Budget, clock: Callable[[], float] = time.perf_counter) -> None:
    """Settle a job by itself, in the calling thread, in passes that keep to the budget: for pools that do not batch."""
    started = clock()
    given = job.good_inputs()
    prepared = adapter.prepare(job.task, [value for _, value in given], job.params)
    job.watch.prepare_ms = (clock() - started) * 1e3
    line: Batcher[tuple[int, Item]] = Batcher()
    for (index, _), item in zip(given, prepared, strict=True):
        if isinstance(item, CortexError):
            job.settle(index, item)
        else:
            line.add(Waiting((index, item), job.group, item.cost_tokens))
    while (batch := line.take(lambda _: budget)) is not None:
        began_s = clock()
        places, items = zip(*(waiting.payload for waiting in batch.items), strict=True)
        raw = forward_isolating(adapter, job.task, items, job.params)
        ended_s = clock()
        job.watch.add_pass(began_s, ended_s, len(items))
        values = finish_isolating(adapter, job.task, items, raw, job.params)
        job.watch.finish_ms += (clock() - ended_s) * 1e3
        for index, value in zip(places, values, strict=True):
            job.settle(index, value)
