"""Warming: on a schedule, the models that were asked the most are loaded and their frequent inputs computed ahead.

One worker a model does it at each scheduled moment: the first that takes the lease of that moment. Its inputs pass
through the desk as small bulk jobs, one at a time, so that claims, flights and budgets hold for them as for all others.
No job begins while interactive work is in the worker's hands, nor after the time limit.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple
from uuid import uuid4

from redis.exceptions import RedisError

from cortex_tasks.cache.counters import Counters
from cortex_tasks.cache.names import entry_prefix, warming_key
from cortex_tasks.cache.popular import Wanted, read_inputs, read_models
from cortex_tasks.catalog import TASKS
from cortex_tasks.config import CacheWarming
from cortex_tasks.cron import Cron
from cortex_tasks.errors import CortexError, InvalidInput, InvalidParameter
from cortex_tasks.inputs import check_input, check_params
from cortex_tasks.keys import Address, stored_params
from cortex_tasks.payloads import Params
from workers.admission import Events
from workers.registry import Model, Registry
from workers.runtime import Job

__all__ = ["Gate", "Warmer"]

logger = logging.getLogger(__name__)

#: Inputs of one job: what interactive work that comes meanwhile may have to wait for.
JOB_INPUTS: Final = 32
START_S: Final = 1.0
#: Keys of one round trip that asks what is stored.
_LOOK_KEYS: Final = 256
#: How often it is looked whether interactive work is through, or the worker ends.
_NAP_S: Final = 0.1
#: A lease outlives its moment by this much beside the time limit: so far apart clocks may be.
_LEASE_S: Final = 600


class _Ticket:
    """A warming job's ticket, in the place of the pool's."""

    __slots__ = ("done", "given_up")

    def __init__(self) -> None:
        self.done = threading.Event()
        self.given_up = False


class Gate:
    """Between the desk and its ``Events``: what is told of warming jobs ends here."""

    def __init__(self, events: Events) -> None:
        self._events = events

    def started(self, jobs: Sequence[Job]) -> None:
        if others := [job for job in jobs if not isinstance(job.ticket, _Ticket)]:
            self._events.started(others)

    def finished(self, jobs: Sequence[Job]) -> None:
        if others := self._settle(jobs):
            self._events.finished(others)

    def dropped(self, jobs: Sequence[Job]) -> None:
        if others := self._settle(jobs):
            self._events.dropped(others)

    def _settle(self, jobs: Sequence[Job]) -> list[Job]:
        others: list[Job] = []
        for job in jobs:
            if isinstance(job.ticket, _Ticket):
                job.ticket.done.set()
            else:
                others.append(job)
        return others

    def unwanted(self, job: Job) -> bool:
        return job.ticket.given_up if isinstance(job.ticket, _Ticket) else self._events.unwanted(job)

    def may_run(self, job: Job, index: int) -> CortexError | None:
        return self._events.may_run(job, index)

    def survived(self, job: Job, index: int) -> None:
        self._events.survived(job, index)


def _params_of(canonical: str) -> dict[str, Any]:
    """Parameters from their canonical form. Raises InvalidParameter."""
    try:
        params = json.loads(canonical)
    except ValueError:
        params = None
    if not isinstance(params, dict):
        raise InvalidParameter("parameters that cannot be read")
    return params


class _Question(NamedTuple):
    """What inputs of one job share."""

    task: str
    canonical: str
    params: Params


class Warmer(threading.Thread):
    """``redis``: a client of the cache's. ``submit`` hands a job to the desk; ``busy`` says whether interactive work is
    in the worker's hands; ``owner`` names the worker in its leases. ``clock``: monotonic seconds; ``wall_clock``: epoch
    seconds; ``start_s``: the start that workers get of models that only they have loaded."""

    def __init__(
        self,
        config: CacheWarming,
        registry: Registry,
        redis: Any,
        submit: Callable[[Job], None],
        busy: Callable[[], bool],
        counters: Counters,
        *,
        owner: str = "",
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        start_s: float = START_S,
    ) -> None:
        super().__init__(name="cache-warming", daemon=True)
        self._start_s = start_s
        self._owner = owner
        self._config, self._registry, self._redis = config, registry, redis
        self._submit, self._busy, self._counters = submit, busy, counters
        self._clock, self._wall_clock = clock, wall_clock
        self._cron = Cron.parse(config.schedule)
        self._looked_s = wall_clock()
        self._ended = threading.Event()

    def run(self) -> None:
        # Schedules are of whole minutes.
        while not self._ended.wait(60.0 - self._wall_clock() % 60.0):
            try:
                self.turn()
            except Exception:
                logger.exception("warming failed; it is tried again at the next scheduled time")

    def stop(self) -> None:
        """Begin nothing new and end the thread. Returns at once."""
        self._ended.set()

    def turn(self) -> None:
        """Warm if a scheduled moment has come since the last turn."""
        now_s = self._wall_clock()
        due_s, self._looked_s = self._cron.latest(self._looked_s, now_s), now_s
        if due_s is None:
            return
        until_s = self._clock() + self._config.time_limit_s
        try:
            for alias in self._in_turn(read_models(self._redis, now_s, self._config.models)):
                if self._clock() < until_s and self._mine(alias, due_s):
                    self._warm(self._registry.model(alias), until_s)
        except (RedisError, OSError) as error:
            logger.warning("warming is left out: Redis does not answer: %s", type(error).__name__)

    def _in_turn(self, aliases: Sequence[str]) -> Iterator[str]:
        """Models that are loaded here, then the others: workers that have those get the start of them."""
        late: list[str] = []
        for alias in aliases:
            model = self._registry.models.get(alias)
            if model is not None and model.state == "ready":
                yield alias
            elif model is not None:
                late.append(alias)
        if late and not self._ended.wait(self._start_s):
            yield from late

    def _mine(self, alias: str, due_s: int) -> bool:
        """Whether this worker is the one that warms a model now."""
        model = self._registry.models.get(alias)
        if model is None or not model.config.cached or not self._has_room(model):
            return False
        lease_s = _LEASE_S + math.ceil(self._config.time_limit_s)
        return bool(self._redis.set(warming_key(alias, due_s), self._owner, nx=True, ex=lease_s))

    def _has_room(self, model: Model) -> bool:
        """Nobody who is in memory goes for the sake of warming, as far as the model's size is known."""
        memory = self._registry.memory
        return memory.stays(model.alias) or memory.used_bytes + model.size_bytes <= memory.budget_bytes

    def _warm(self, model: Model, until_s: float) -> None:
        began_s = self._clock()
        inputs = read_inputs(self._redis, model.alias, self._wall_clock(), self._config.inputs)
        if not inputs:
            return
        warmed = self._load(model, inputs, until_s) if model.state != "ready" else 0
        if not self._registry.hold(model):
            logger.warning("model %s is not warmed: it is not loaded", model.alias)
            return
        cut = False
        try:
            for question, values in self._missing(model, inputs):
                if cut := not self._free(until_s):
                    break
                warmed += self._compute(model, question, values, until_s)
        finally:
            self._registry.release(model.alias)
            self._counters.add(model.alias, warmings=1, warmed=warmed, warmings_cut=int(cut))
        logger.info("model %s: %d of %d frequent inputs warmed in %.1f s%s", model.alias, warmed, len(inputs),
                    self._clock() - began_s, ", cut off" if cut else "")  # fmt: skip

    def _load(self, model: Model, inputs: Sequence[Wanted], until_s: float) -> int:
        """Have a model loaded as for any job that is its first: whoever asks for it meanwhile waits for the same load.

        Returns how many inputs were computed with it.
        """
        for question, value in self._checked(model, inputs)[:1]:
            if self._free(until_s):
                return self._compute(model, question, [value], until_s)
        return 0

    def _missing(self, model: Model, inputs: Sequence[Wanted]) -> Iterator[tuple[_Question, list[Any]]]:
        """What of these is not stored, in jobs of one question each, the most frequent first."""
        jobs: dict[_Question, list[Any]] = {}
        for first in range(0, len(inputs), _LOOK_KEYS):
            asked = self._checked(model, inputs[first : first + _LOOK_KEYS])
            with self._redis.pipeline(transaction=False) as pipe:
                for question, value in asked:
                    address = Address(question.task, model.alias, model.revision, question.canonical)
                    pipe.exists(entry_prefix(model.alias) + address.key(value))
                stored = pipe.execute()
            for (question, value), known in zip(asked, stored, strict=True):
                if not known:
                    job = jobs.setdefault(question, [])
                    job.append(value)
                    if len(job) == JOB_INPUTS:
                        yield question, jobs.pop(question)
        yield from jobs.items()

    def _checked(self, model: Model, inputs: Sequence[Wanted]) -> list[tuple[_Question, Any]]:
        """What a job of these would be; inputs that this worker would refuse are left out."""
        found: list[tuple[_Question, Any]] = []
        limits = model.config.limits
        for task, canonical, value in inputs:
            if task not in model.config.tasks or not TASKS[task].cacheable:
                continue
            try:
                params = check_params(task, _params_of(canonical), limits, model.alias)
                question = _Question(task, canonical, stored_params(params, model.config.adapter))
                if question.params.canonical() == canonical:
                    found.append((question, check_input(task, value, limits)))
            except (InvalidInput, InvalidParameter) as error:
                logger.debug("an input of %s is not warmed: %s", model.alias, error)
        return found

    def _free(self, until_s: float) -> bool:
        """Wait while interactive work is about; False when it is too late to begin anything."""
        while self._clock() < until_s and not self._ended.is_set():
            if not self._busy():
                return True
            self._ended.wait(_NAP_S)
        return False

    def _compute(self, model: Model, question: _Question, values: Sequence[Any], until_s: float) -> int:
        """Have inputs computed and stored; returns how many were, before the time limit."""
        ticket = _Ticket()
        job = Job(
            id=f"warming-{uuid4()}",
            model=model.alias,
            task=question.task,
            params=question.params,
            canonical=question.canonical,
            inputs=list(values),
            lane="bulk",
            ticket=ticket,
        )
        self._submit(job)
        while not ticket.done.wait(_NAP_S) and self._clock() < until_s and not self._ended.is_set():
            pass
        # What has begun is finished by its runner; what waits is dropped there.
        ticket.given_up = not ticket.done.is_set()
        return sum(isinstance(outcome, dict) for outcome in job.outcomes)
