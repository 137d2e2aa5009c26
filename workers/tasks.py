"""The Celery tasks with bodies, and the reading of a message as a Job."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from celery import Celery, Task

from cortex_tasks.catalog import TASKS, InputKind, task_spec
from cortex_tasks.codec import HEADER, lane_of
from cortex_tasks.config import FleetConfig, Limits, ModelConfig
from cortex_tasks.derived import Form, form_of
from cortex_tasks.errors import CortexError, InvalidInput, ModelError, ModelUnavailable, UnknownModel
from cortex_tasks.inputs import check_input, check_params, is_single
from cortex_tasks.keys import stored_params
from cortex_tasks.payloads import CachePolicy, Params, TextParams
from workers.runtime import Job

__all__ = ["InferenceTask", "register_tasks", "slot", "to_job"]


class _Slot:
    """Where the pool leaves a job's outcome for the task's ``__call__``; used on the hub's thread only."""

    def __init__(self) -> None:
        self._outcome: Any = None

    def put(self, outcome: Any) -> None:
        self._outcome = outcome

    def take(self) -> Any:
        outcome, self._outcome = self._outcome, None
        return outcome


slot = _Slot()


class InferenceTask(Task):
    """A task whose answer the pool has computed with its batch; under any other pool, a batch of one."""

    abstract = True
    acks_late = True
    typing = False
    max_retries = 3
    default_retry_delay = 2
    #: Expected failures: logged in a line, without a traceback.
    throws = (CortexError,)

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        outcome = slot.take()
        if outcome is None:
            outcome = self.app.cortex.run_alone(self, args, kwargs)
        if isinstance(outcome, ModelUnavailable) and outcome.details.get("transient"):
            # Celery's own retry would show the arguments anew, at length.
            shown = {"argsrepr": self.request.argsrepr, "kwargsrepr": self.request.kwargsrepr}
            raise self.retry(exc=outcome, **shown)
        if isinstance(outcome, BaseException):
            raise outcome
        # An eager result is not stored, so nothing encodes it: give what ``get`` of a stored one gives.
        return outcome.__json__() if self.request.is_eager else outcome


def register_tasks(app: Celery, base: type[Task] = InferenceTask) -> None:
    """Put one task a row of the catalogue on the app."""
    for spec in TASKS.values():
        # Not shared: other apps of this process keep out of it.
        app.task(_no_body, name=spec.celery_name, base=base, bind=False, shared=False)


def _no_body(*_: Any, **__: Any) -> None:
    raise ModelError("this task is answered by its pool")


def to_job(
    job_id: str,
    task_name: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    fleet: FleetConfig,
    headers: Mapping[str, Any],
) -> Job:
    """Read and check a message. Bad inputs are settled with their errors; anything else that is wrong raises
    RequestError. ``headers``: the message's, as Celery merges them into the request."""
    inputs, alias, params = _arguments(args, kwargs)
    if not isinstance(alias, str | None):
        raise UnknownModel(f"a model's name must be a str, not {type(alias).__name__}")
    kind = _kind(task_name, alias, params, fleet)
    task, model = kind.task, kind.model
    if type(inputs) is list and kind.takes_text:
        values = inputs
    else:
        values = [inputs] if is_single(task, inputs) else list(inputs)
    if len(values) > model.limits.inputs_per_job:
        raise InvalidInput(
            f"a job of {len(values):,} inputs is over the limit of {model.limits.inputs_per_job:,} of model "
            f"{kind.alias!r}; cut it into several (Cortex.map does)",
            {"limit": model.limits.inputs_per_job, "got": len(values)},
        )
    options = _mapping(headers.get(HEADER))
    return Job(
        id=job_id,
        model=kind.alias,
        task=task,
        params=kind.stored,
        form=kind.form,
        canonical=kind.canonical,
        inputs=[_checked(task, value, model.limits, kind.truncate) for value in values],
        lane=lane_of(_number(_mapping(headers.get("delivery_info")).get("priority"))),
        deadline_s=_epoch(headers.get("expires")),
        sent_at_s=_number(options.get("sent_at")),
        packed=bool(options.get("packed")),
        cache=_policy(options.get("cache")) if model.cached else "off",
    )


def _policy(given: Any) -> CachePolicy:
    """A message's cache policy; of one that is unknown here, the safe one."""
    return given if given in ("use", "refresh", "off") else "use" if given is None else "off"


@dataclass(frozen=True, slots=True)
class _Kind:
    """What jobs have in common but for their inputs."""

    fleet: FleetConfig
    task: str
    takes_text: bool
    alias: str
    model: ModelConfig
    truncate: bool
    #: The parameters that are computed and stored, and these in canonical form.
    stored: Params
    canonical: str
    form: Form | None


#: Kinds seen before, by what they came from: most jobs come with the same few.
_seen: dict[tuple[str, str | None, str], _Kind] = {}
_SEEN_MAX: Final = 512


def _kind(task_name: str, alias: str | None, params: Mapping[str, Any], fleet: FleetConfig) -> _Kind:
    """Raises UnknownTask, UnknownModel, InvalidParameter."""
    # repr tells 1 from True and 1.0, which compare equal.
    key = (task_name, alias, repr(sorted(params.items())) if params else "")
    known = _seen.get(key)
    if known is None or known.fleet is not fleet:
        spec = task_spec(task_name)
        alias, model = fleet.model(alias, spec.name)
        checked = check_params(spec.name, params, model.limits, alias)
        stored = stored_params(checked, model.adapter)
        known = _Kind(
            fleet=fleet,
            task=spec.name,
            takes_text=spec.input is InputKind.TEXT,
            alias=alias,
            model=model,
            truncate=isinstance(checked, TextParams) and checked.truncate,
            stored=stored,
            canonical=stored.canonical(),
            form=form_of(checked, stored),
        )
        if len(_seen) >= _SEEN_MAX:
            _seen.clear()
        _seen[key] = known
    return known


def _arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """(inputs, model, parameters) of a call ``task(inputs, model=None, **params)``."""
    if not isinstance(args, list | tuple) or not isinstance(kwargs, dict | Mapping):
        raise InvalidInput(f"a job's arguments must be a list and a mapping, not {type(args).__name__} and "
                           f"{type(kwargs).__name__}")  # fmt: skip
    params = dict(kwargs)
    if len(args) > 2:
        raise InvalidInput(f"a task takes inputs and model by position, not {len(args)} arguments")
    for name, value in zip(("inputs", "model"), args, strict=False):
        if name in params:
            raise InvalidInput(f"{name!r} was given twice, by position and by name")
        params[name] = value
    if "inputs" not in params:
        raise InvalidInput("a job has no inputs; pass inputs=[...]")
    return params.pop("inputs"), params.pop("model", None), params


def _checked(task: str, value: Any, limits: Limits, truncate: bool) -> Any:
    """An input in its canonical form, or why it is refused."""
    try:
        return check_input(task, value, limits, truncate)
    except InvalidInput as error:
        return error


def _epoch(expires: Any) -> float:
    """Celery's ``expires`` (ISO 8601, UTC where it names no zone, or None) as epoch seconds; inf when there is none."""
    if not isinstance(expires, str):
        return math.inf
    try:
        moment = datetime.fromisoformat(expires)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return math.inf


def _mapping(value: Any) -> Mapping[str, Any]:
    """A part of a message that should be a mapping; an empty one where a foreign client sent something else."""
    return value if type(value) is dict or isinstance(value, Mapping) else {}


def _number(value: Any) -> float | None:
    """A finite number, or None."""
    try:
        number = float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
