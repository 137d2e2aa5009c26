"""Celery-native signatures: for programs that compose jobs with Celery's own groups, chains and chords.

::

    from cortex_tasks.tasks import embed

    answer = embed.delay(inputs=["one", "two"], model="minilm").get(timeout=30)
    cortex_tasks.parse(answer).values()[0].vector

A task is called as ``task(inputs, model=None, **parameters)``; ``get()`` returns the plain answer, which
``cortex_tasks.parse`` turns into typed results. The tasks belong to Cortex's own app (``cortex_tasks.app.app``),
whatever app is current in the program, and go to the queue of their model.

In a chain the previous task's return value is ``inputs``: a text, a series, or a list of them. An answer of Cortex
is not one; put a task of your own between two of Cortex's, or use an immutable signature (``.si``).

Celery waits for the results of a group through one app's connection: ``get`` of a group that mixes these tasks with
another app's own never returns. For such groups put the tasks on that app: ``embed = register(app)["embed"]``.

The tasks never run in the calling process, which holds no models: with ``task_always_eager`` on their app their
results raise RequestError. (The worker's app, ``workers.app``, does compute eagerly, where models are installed.)

The nine tasks are made when they are first asked for.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from celery import Celery, Task, current_task
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from cortex_tasks.catalog import TASKS, task_spec
from cortex_tasks.codec import HEADER
from cortex_tasks.config import FleetConfig, Limits, load_fleet
from cortex_tasks.errors import InvalidInput, InvalidParameter, QueueFull, RequestError
from cortex_tasks.inputs import check_input, check_params, is_single
from cortex_tasks.payloads import Series
from cortex_tasks.publish import short_options, short_repr
from cortex_tasks.settings import Settings
from cortex_tasks.wire import RedisWire, Wire, unavailable

if TYPE_CHECKING:
    annotate: Task
    classify: Task
    decompose: Task
    detect_anomalies: Task
    embed: Task
    features: Task
    fill_mask: Task
    forecast: Task
    zero_shot: Task

__all__ = [
    "NativeTask",
    "annotate",
    "classify",
    "decompose",
    "detect_anomalies",
    "embed",
    "features",
    "fill_mask",
    "forecast",
    "register",
    "zero_shot",
]


class NativeTask(Task):
    """A task of the catalogue as submitters see it: checked and routed here, computed by the fleet."""

    abstract = True
    typing = False
    ignore_result = False

    def __init__(self, name: str, settings: Settings, fleet: FleetConfig, wire: Wire) -> None:
        self.name = name
        self._broker, self._fleet, self._wire = settings.broker, fleet, wire

    def run(self, *args: Any, **kwargs: Any) -> Any:
        raise RequestError(
            f"{self.name} runs on the fleet, not in this process: call .delay() or .apply_async(), without "
            "task_always_eager; for tests without a fleet there is cortex_tasks.testing"
        )

    def apply_async(
        self,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        headers: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """As Celery's, after the checks that a submission allows.

        Raises InvalidInput (naming the index: nothing is sent), InvalidParameter, UnknownModel, QueueFull,
        BrokerUnavailable.
        """
        inputs, model, params = _arguments(self.name, args or (), kwargs or {})
        alias, config = self._fleet.model(model, task_spec(self.name).name)
        checked = check_params(self.name, params, config.limits, alias)
        texts = _checked_inputs(self.name, inputs, config.limits, getattr(checked, "truncate", False))
        given = {"model": alias, **checked.model_dump(mode="json", exclude_defaults=True)}
        # A job of a running task (a chain's next link, a retry) is not refused: its sender could not wait.
        if not current_task and not self.app.conf.task_always_eager:
            self._check_room(config.queue, config.limits.queue_jobs)
        options.setdefault("queue", config.queue)
        options.update(argsrepr="()", kwargsrepr=f"{{'inputs': {short_repr(texts)}, {short_options(given)}}}")
        wire_inputs = [{"ds": v.ds, "y": v.y} if isinstance(v, Series) else v for v in texts]
        own = {"sent_at": time.time(), **((headers or {}).get(HEADER) or {})}
        try:
            return super().apply_async(
                (), {"inputs": wire_inputs, **given}, headers={**(headers or {}), HEADER: own}, **options
            )
        except (OperationalError, RedisError) as error:
            raise unavailable(self._broker, error) from error

    def _check_room(self, queue: str, limit: int) -> None:
        depth = self._wire.depth(queue)
        if depth >= limit:
            raise QueueFull(
                f"queue {queue!r} holds {depth:,} jobs of at most {limit:,}: one more was refused; try again later",
                {"queue": queue, "limit": limit, "depth": depth, "retry_after_s": 1.0},
            )


def _arguments(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, str | None, dict[str, Any]]:
    """(inputs, model, parameters) of a call ``task(inputs, model=None, **parameters)``."""
    if len(args) > 2:
        raise InvalidParameter(f"{name} takes inputs and model by position, not {len(args)} arguments")
    params = dict(kwargs)
    for key, value in zip(("inputs", "model"), args, strict=False):
        if key in params:
            raise InvalidParameter(f"{name}: {key!r} was given by position and by name")
        params[key] = value
    if "inputs" not in params:
        raise InvalidInput(f"{name} needs inputs: pass inputs=[...]")
    return params.pop("inputs"), params.pop("model", None), params


def _checked_inputs(name: str, inputs: Any, limits: Limits, truncate: bool) -> list[Any]:
    values = [inputs] if is_single(name, inputs) else list(inputs)
    if len(values) > limits.inputs_per_job:
        raise InvalidInput(
            f"{len(values):,} inputs are over the model's limit of {limits.inputs_per_job:,} a job; send several jobs",
            {"limit": limits.inputs_per_job, "got": len(values)},
        )
    checked = []
    for index, value in enumerate(values):
        try:
            checked.append(check_input(name, value, limits, truncate))
        except InvalidInput as error:
            raise InvalidInput(f"input {index}: {error}", {**error.details, "input": index}) from None
    return checked


def register(app: Celery, settings: Settings | None = None, fleet: FleetConfig | None = None) -> dict[str, Task]:
    """Put the nine tasks on an app that points at the fleet's Redis; short name -> task.

    ``settings`` and ``fleet``: by default the environment's.
    """
    settings = settings or Settings.from_env()
    fleet = fleet or load_fleet(settings.queues_file)
    wire = RedisWire(settings)
    # Celery binds a task's class to its app, so each app has one of its own.
    bound: type[NativeTask] = type(NativeTask.__name__, (NativeTask,), {"__module__": __name__})
    return {spec.name: app.register_task(bound(spec.celery_name, settings, fleet, wire)) for spec in TASKS.values()}


def __getattr__(name: str) -> Any:
    if name not in TASKS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from cortex_tasks.app import app

    globals().update(register(app))
    return globals()[name]
