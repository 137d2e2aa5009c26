"""What both clients do without touching a network: requests in, messages out; outcomes in, results out.

``Core.plan`` checks task, model and parameters; ``Plan.order`` checks the inputs and cuts them into jobs;
``Order.result`` puts the outcomes of the jobs together again, in the inputs' order.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, get_args
from uuid import uuid4

from pydantic import ValidationError

from cortex_tasks.book import Outcome
from cortex_tasks.cache import Question, Shelf
from cortex_tasks.catalog import InputKind, TaskSpec, nearest, task_spec
from cortex_tasks.client.cuts import JOB_CHARS, JOB_INPUTS, cut
from cortex_tasks.codec import reply_channel
from cortex_tasks.config import FleetConfig, Limits, ModelConfig, load_fleet
from cortex_tasks.config_problems import reason
from cortex_tasks.errors import (
    ClientClosed,
    ConfigError,
    CortexError,
    InvalidInput,
    InvalidParameter,
    JobCancelled,
    ModelError,
    NoConsumer,
    QueueFull,
    ResultTimeout,
)
from cortex_tasks.inputs import check_input, check_params
from cortex_tasks.payloads import CachePolicy, Lane, Params, Result
from cortex_tasks.presence import WorkerCard
from cortex_tasks.publish import Envelope, new_id
from cortex_tasks.results import JobResult, error_from_meta, parse
from cortex_tasks.settings import Settings, mask_url

__all__ = [
    "Core",
    "Draft",
    "Order",
    "Plan",
    "Sifted",
    "batches",
    "check_timeout",
    "resolve",
    "timed_out",
]

#: Kinds of jobs whose envelopes are kept.
_ENVELOPES: Final = 256
_DEFAULT_RETRY_S: Final = 1.0
#: One round trip of publishing carries at most so much: Redis serves nobody else meanwhile.
_BATCH_JOBS: Final = 512
_BATCH_BYTES: Final = 4 * 1024 * 1024


# Not frozen, as are Sifted and Order: one of each is made for each of thousands of jobs, which takes half the time so.
@dataclass(slots=True, eq=False)
class Draft:
    """One job, ready to be published."""

    id: str
    message: bytes
    #: Which of the order's inputs it holds.
    indexes: Sequence[int]


def batches(drafts: Iterable[Draft]) -> Iterator[list[Draft]]:
    """The drafts, as many at a time as one round trip should carry."""
    batch: list[Draft] = []
    size_bytes = 0
    for draft in drafts:
        if batch and (len(batch) == _BATCH_JOBS or size_bytes + len(draft.message) > _BATCH_BYTES):
            yield batch
            batch, size_bytes = [], 0
        batch.append(draft)
        size_bytes += len(draft.message)
    if batch:
        yield batch


@dataclass(slots=True, eq=False)
class Sifted:
    """The inputs of one call, checked: the good ones in their canonical form, at their indexes, and the others."""

    count: int
    values: list[Any]
    indexes: Sequence[int]
    refused: Mapping[int, InvalidInput]


@dataclass(slots=True, eq=False)
class Order:
    """The inputs of one call: some refused on the spot, some answered by the cache, the others in jobs."""

    plan: Plan
    count: int
    drafts: list[Draft]
    refused: Mapping[int, InvalidInput]
    known: Mapping[int, Result] = field(default_factory=dict)

    def check_one_job(self) -> None:
        """Raises InvalidInput when the inputs do not fit in one job."""
        limit = self.plan.limits.inputs_per_job
        if self.count > limit:
            raise InvalidInput(
                f"{self.count:,} inputs are over the model's limit of {limit:,} a job; use map() for more",
                {"limit": limit, "got": self.count},
            )

    def result(self, outcomes: Sequence[Outcome]) -> JobResult[Any]:
        """One entry an input. ``outcomes``: how each draft ended.

        A job that failed as a whole raises its error; where inputs travelled in several jobs it becomes the error
        of its inputs, unless every job failed. A cancelled one always raises, as does a closed client.
        """
        errors = [error for outcome in outcomes if (error := _failure(outcome)) is not None]
        for error in errors:
            if (len(errors) == len(outcomes) and not self.known) or isinstance(error, JobCancelled | ClientClosed):
                raise error
        return self.entries(outcomes)

    def entries(self, outcomes: Sequence[Outcome]) -> JobResult[Any]:
        """As ``result``, but the error of a job always becomes the error of its inputs."""
        task = self.plan.spec.name
        parts = [_part(task, draft, outcome) for draft, outcome in zip(self.drafts, outcomes, strict=True)]
        if len(parts) == 1 and not self.refused and not self.known:
            return parts[0]
        items: list[Any] = [None] * self.count
        for index, settled in (*self.refused.items(), *self.known.items()):
            items[index] = settled
        for draft, part in zip(self.drafts, parts, strict=True):
            for index, item in zip(draft.indexes, part.items, strict=True):
                items[index] = item
        none: JobResult[Any] = JobResult(task, ())
        for first in list(self.known.values())[:1]:
            none = JobResult(task, (), first.model, first.revision, first.timings)
        slowest = max((part for part in parts if part.model), key=lambda part: part.timings.total_ms, default=none)
        return replace(slowest, items=tuple(items))


def _failure(outcome: Outcome) -> CortexError | None:
    """A new one each time, whose traceback is of whoever raises it alone."""
    if isinstance(outcome, CortexError):
        return type(outcome)(outcome.message, outcome.details)
    return error_from_meta(outcome) if outcome["status"] != "SUCCESS" else None


def _part(task: str, draft: Draft, outcome: Outcome) -> JobResult[Any]:
    """What became of the inputs of one job; a job that failed gives its error to each of them."""
    count = len(draft.indexes)
    error = _failure(outcome)
    if error is None and not isinstance(outcome, CortexError):
        try:
            part = parse(outcome.get("result", {}))
        except (ValueError, CortexError) as malformed:
            error = ModelError(f"the worker's answer cannot be read: {malformed}")
        else:
            if len(part) == count:
                return part
            error = ModelError(f"the worker answered {len(part)} of {count} inputs")
    return JobResult(task, (error,) * count)


@dataclass(frozen=True, slots=True)
class Plan:
    """A kind of job: task, model, parameters and delivery, all checked."""

    spec: TaskSpec
    alias: str
    limits: Limits
    truncate: bool
    envelope: Envelope
    deadline_s: float | None
    #: How long the caller waits for an answer.
    timeout_s: float
    clock: Callable[[], float]
    #: What to ask the cache; None where it is not to be asked.
    question: Question | None = None
    cache: CachePolicy = "use"

    def check(self, value: Any) -> Any:
        """One input in its canonical form. Raises InvalidInput."""
        if self.spec.input is InputKind.TEXT and _is_plain(value, self.limits.text_chars):
            return value
        return check_input(self.spec.name, value, self.limits, self.truncate)

    def order_checked(self, values: list[Any]) -> Order:
        """Inputs that were checked before, as one job."""
        indexes = range(len(values))
        return Order(self, len(values), [self._job(values, indexes, self.clock())], {})

    def sift_one(self, value: Any) -> Sifted:
        """One input. Raises InvalidInput."""
        return Sifted(1, [self.check(value)], (0,), {})

    def sift(self, inputs: Iterable[Any]) -> Sifted:
        """Several inputs; a bad one becomes an entry of its own and its neighbours go on."""
        values = list(inputs)
        refused: dict[int, InvalidInput] = {}
        for index in self._uncertain(values):
            try:
                values[index] = self.check(values[index])
            except InvalidInput as error:
                refused[index] = error
        if not refused:
            return Sifted(len(values), values, range(len(values)), refused)
        indexes = [index for index in range(len(values)) if index not in refused]
        return Sifted(len(values), [values[index] for index in indexes], indexes, refused)

    def _uncertain(self, values: Sequence[Any]) -> Sequence[int]:
        """Which inputs need a closer look: not those that are plainly texts in their canonical form."""
        if self.spec.input is not InputKind.TEXT:
            return range(len(values))
        most = self.limits.text_chars
        return [index for index, value in enumerate(values) if not _is_plain(value, most)]

    def order(self, inputs: Iterable[Any], *, one_job: bool = False) -> Order:
        """Several inputs, of which the cache is not asked."""
        return self.draft(self.sift(inputs), one_job=one_job)

    def draft(self, sifted: Sifted, found: Sequence[Result | None] = (), *, one_job: bool = False) -> Order:
        """Jobs for the good inputs less those that the cache ``found`` (one entry each; none at all: nothing found).

        They are cut into jobs that several workers can share; ``one_job`` cuts only at the model's own limit.
        """
        inputs, indexes, known = sifted.values, sifted.indexes, {}
        if found:
            known = {index: item for index, item in zip(indexes, found, strict=True) if item is not None}
        if known:
            left = [at for at, item in enumerate(found) if item is None]
            inputs, indexes = [inputs[at] for at in left], [indexes[at] for at in left]
        most, now = self.limits.inputs_per_job, self.clock()
        parts = cut(inputs, most, math.inf) if one_job else cut(inputs, min(most, JOB_INPUTS), JOB_CHARS)
        drafts = [self._job(inputs[part], indexes[part], now) for part in parts]
        return Order(self, sifted.count, drafts, sifted.refused, known)

    def _job(self, values: Sequence[Any], indexes: Sequence[int], now_s: float) -> Draft:
        job_id = new_id()
        message = self.envelope.seal(job_id, values, sent_at=now_s, deadline_s=self.deadline_s)
        return Draft(job_id, message, indexes)

    def full(self, jobs: int, depth: int, cards: Iterable[WorkerCard]) -> QueueFull:
        """The refusal of ``jobs`` by a queue in which ``depth`` jobs wait, with an estimate of when there is room."""
        queue, limit = self.envelope.queue, self.envelope.limit_jobs
        rate = sum(card.items_per_s for card in cards if queue in card.queues and card.state == "ready")
        wait_s = min(60.0, max(0.05, (depth + jobs - limit) / rate)) if rate > 0 else _DEFAULT_RETRY_S
        return QueueFull(
            f"queue {queue!r} holds {depth:,} jobs of at most {limit:,}: {jobs:,} more were refused; "
            f"try again in about {wait_s:.2g} s, or start another worker",
            {"queue": queue, "limit": limit, "depth": depth, "retry_after_s": wait_s},
        )


def _is_plain(value: Any, most_chars: int) -> bool:
    """Whether an input is surely a text in its canonical form."""
    return type(value) is str and len(value) <= most_chars and bool(value) and value.isascii() and not value.isspace()


@dataclass
class Core:
    """The state that the calls of one client share."""

    fleet: FleetConfig
    timeout_s: float
    clock: Callable[[], float] = time.time
    #: Of every job: this client's reply channel, or a bare id, as stock Celery has it there.
    reply_to: str = field(default_factory=lambda: reply_channel(uuid4().hex))
    #: Whether single inputs that are asked for at the same moment share a message.
    coalesces: bool = True
    #: None: the cache is never asked.
    shelf: Shelf | None = None
    _envelopes: dict[Any, Envelope] = field(default_factory=dict)
    _plans: dict[Any, Plan] = field(default_factory=dict)

    def plan(self, task: str, **options: Any) -> Plan:
        """Check everything but the inputs. Raises UnknownTask, UnknownModel, InvalidParameter.

        Options that are plain values are checked once: calls mostly come with the same few.
        """
        try:
            # The type tells True from 1 and 1.0, which are equal.
            key = (task, *((name, type(value), value) for name, value in options.items()))
            known = self._plans.get(key)
        except TypeError:
            return self._new_plan(task, **options)
        if known is None:
            known = self._new_plan(task, **options)
            if len(self._plans) >= _ENVELOPES:
                self._plans.clear()
            self._plans[key] = known
        return known

    def _new_plan(
        self,
        task: str,
        *,
        model: str | None = None,
        lane: Lane = "interactive",
        deadline_s: float | None = None,
        cache: CachePolicy = "use",
        timeout_s: float | None = None,
        **params: Any,
    ) -> Plan:
        spec = task_spec(task)
        alias, config = self.fleet.model(model, spec.name)
        _one_of("lane", lane, get_args(Lane))
        _one_of("cache", cache, get_args(CachePolicy))
        if deadline_s is not None:
            _seconds("deadline_s", deadline_s)
        if timeout_s is not None:
            check_timeout(timeout_s)
        checked = check_params(spec.name, params, config.limits, alias)
        given = checked.model_dump(mode="json", exclude_defaults=True)
        # A checked parameter is JSON: its repr is as good as its content.
        key = (spec.name, alias, lane, cache, repr(given))
        envelope = self._envelopes.get(key)
        if envelope is None:
            if len(self._envelopes) >= _ENVELOPES:
                self._envelopes.clear()
            envelope = self._envelopes[key] = Envelope(
                spec,
                {"model": alias, **given},
                queue=config.queue,
                limit_jobs=config.limits.queue_jobs,
                lane=lane,
                cache=cache,
                reply_to=self.reply_to,
            )
        return Plan(
            spec=spec,
            alias=alias,
            limits=config.limits,
            truncate=bool(getattr(checked, "truncate", False)),
            envelope=envelope,
            deadline_s=deadline_s,
            timeout_s=self.timeout_s if timeout_s is None else timeout_s,
            clock=self.clock,
            question=self._question(spec, alias, checked, config) if cache != "off" else None,
            cache=cache,
        )

    def _question(self, spec: TaskSpec, alias: str, params: Params, config: ModelConfig) -> Question | None:
        if self.shelf is None or not (spec.cacheable and config.cached):
            return None
        return self.shelf.question(spec, alias, params, config.adapter)


def resolve(url: str | None, settings: Settings | None, fleet: FleetConfig | None) -> tuple[Settings, FleetConfig]:
    """What a client was given, completed from the environment. Raises ConfigError."""
    chosen = settings or Settings.from_env()
    if url is not None:
        try:
            given: dict[str, Any] = chosen.model_dump() | {"broker_url": url}
            # A URL alone means this one server, whatever the environment says of results.
            chosen = Settings.model_validate(given if settings is not None else given | {"result_url": None})
        except ValidationError as error:
            raise ConfigError(f"{mask_url(url)} cannot be used: {reason(error.errors()[0])}") from None
    return chosen, fleet if fleet is not None else load_fleet(chosen.queues_file)


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in known:
        raise InvalidParameter(f"unknown {name} {value!r}{nearest(str(value), known)}", {name: str(value)})


def check_timeout(timeout_s: float) -> None:
    """Raises InvalidParameter on what nobody can wait for."""
    if not (isinstance(timeout_s, float) and timeout_s == math.inf):
        _seconds("timeout_s", timeout_s)


def _seconds(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
        raise InvalidParameter(f"{name} must be a number of seconds above 0, not {value!r}")


def timed_out(plan: Plan, waited_s: float, depth: int, cards: Sequence[WorkerCard]) -> ResultTimeout:
    """Why no answer came: nobody consumes the queue, or those who do are not through."""
    queue = plan.envelope.queue
    said = f"no answer to cortex.{plan.spec.name} on model {plan.alias!r} within {waited_s:.3g} s"
    details = {"queue": queue, "depth": depth, "timeout_s": waited_s}
    consumers = [card for card in cards if queue in card.queues]
    if any(card.state == "ready" for card in consumers):
        return ResultTimeout(f"{said}: {depth:,} jobs wait in queue {queue!r}; the job itself goes on", details)
    if any(card.state == "starting" for card in consumers):
        return ResultTimeout(f"{said}: the worker of queue {queue!r} is still loading its models", details)
    return NoConsumer(
        f"{said}: no worker consumes queue {queue!r}; start one: celery -A workers.app worker -Q {queue}", details
    )
