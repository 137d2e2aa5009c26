"""The fleet itself: what takes the jobs, answers them, and fails on demand."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from cortex_tasks import codec
from cortex_tasks.catalog import TASKS, task_spec
from cortex_tasks.client import AsyncCortex, Cortex
from cortex_tasks.codec import Answer, lane_of
from cortex_tasks.config import FleetConfig, default_queues_file, load_fleet
from cortex_tasks.derived import form_of, made
from cortex_tasks.echo import REVISION, echo
from cortex_tasks.errors import BrokerUnavailable, CortexError, InvalidInput
from cortex_tasks.inputs import check_input, check_params
from cortex_tasks.keys import stored_params
from cortex_tasks.payloads import Lane, Params, Timings
from cortex_tasks.presence import WorkerCard
from cortex_tasks.publish import Envelope
from cortex_tasks.testing.wires import AsyncMemoryWire, MemoryWire

__all__ = ["Handler", "LocalFleet", "RecordedJob", "echo_fleet"]

#: ``handler(task, model, inputs, params)`` -> one entry an input: the fields of the task's result class less model,
#: revision and timings (vectors as bytes of float32, of which the fleet makes the form asked for), or an error.
#: ``inputs`` are checked texts or ``Series``. To raise a CortexError fails the job as a whole.
Handler = Callable[[str, str, Sequence[Any], Params], Sequence[Mapping[str, Any] | CortexError]]

_NODE: Final = "local@testing"
#: What the workers claim to answer, for the estimate that comes with QueueFull.
_ITEMS_PER_S: Final = 1_000.0


@dataclass(frozen=True, slots=True)
class RecordedJob:
    """A job that reached the fleet."""

    id: str
    task: str
    model: str
    #: As they travelled: texts, or ``{"ds": [...], "y": [...]}``.
    inputs: list[Any]
    #: Those that differ from their defaults.
    params: dict[str, Any]
    queue: str
    lane: Lane
    cache: str
    #: When it is to be dropped (epoch seconds); None: never.
    expires_at: float | None
    #: When it was submitted (epoch seconds).
    sent_at: float
    reply_to: str


def echo_fleet() -> FleetConfig:
    """The default fleet's models, and one more, ``echo``, that serves every task."""
    raw = load_fleet(default_queues_file()).model_dump(mode="json")
    raw["images"]["echo"] = {"queues": ["echo"], "cpus": 1, "memory": "1GB", "storage": "1GB"}
    raw["models"]["echo"] = {
        "source": "builtin:echo",
        "adapter": "echo",
        "tasks": list(TASKS),
        "backend": "native",
        "queue": "echo",
        "images": ["echo"],
    }
    return FleetConfig.model_validate(raw)


class LocalFleet:
    """All the workers there are, in this process. ``jobs`` records what was submitted, in order."""

    def __init__(
        self,
        handler: Handler | None = None,
        fleet: FleetConfig | None = None,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.fleet = fleet if fleet is not None else echo_fleet()
        self.jobs: list[RecordedJob] = []
        #: How many jobs were refused because their queue was full.
        self.refused = 0
        #: Ids of the jobs that a client cancelled.
        self.revoked: list[str] = []
        self._handler = handler or _echo
        self._clock = clock
        self._lock = threading.RLock()
        self._waiting: list[RecordedJob] = []
        self._stored: dict[str, bytes] = {}
        self._listeners: dict[str, Callable[[list[str]], None]] = {}
        self._held = self._full = self._down = False
        self._workers = True
        self._clients: list[Cortex] = []

    def client(self, timeout_s: float = 5.0) -> Cortex:
        """A ``Cortex`` of this fleet."""
        client = Cortex._over(lambda: MemoryWire(self), self.fleet, timeout_s, clock=self._clock)
        self._clients.append(client)
        return client

    def aclient(self, timeout_s: float = 5.0) -> AsyncCortex:
        """An ``AsyncCortex`` of this fleet; close it (``async with``)."""
        return AsyncCortex._over(lambda: AsyncMemoryWire(self), self.fleet, timeout_s, clock=self._clock)

    def close(self) -> None:
        """Close the clients that ``client`` made."""
        for client in self._clients:
            client.close()

    # --------------------------------------------------------------------------------------- what goes wrong

    def hold(self) -> None:
        """Answer nothing until ``release``: every job waits in its queue."""
        self._held = True

    def release(self) -> None:
        """Answer what waits, and from now on everything at once."""
        self._held = False
        self._work()

    @contextmanager
    def without_workers(self) -> Iterator[None]:
        """Jobs are accepted, but nobody is there to take them; they are taken afterwards."""
        self._workers = False
        try:
            yield
        finally:
            self._workers = True
            self._work()

    @contextmanager
    def full_queues(self) -> Iterator[None]:
        """Every submission is refused: QueueFull. (A real limit, ``limits.queue_jobs``, holds without this.)"""
        self._full = True
        try:
            yield
        finally:
            self._full = False

    @contextmanager
    def broker_down(self) -> Iterator[None]:
        """Redis does not answer: BrokerUnavailable."""
        self._down = True
        try:
            yield
        finally:
            self._down = False

    # ------------------------------------------------------------------------------------------ for the wires

    def reach(self) -> None:
        if self._down:
            raise BrokerUnavailable("Redis at memory does not answer: the test took it down", {"url": "memory"})

    def push(self, envelope: Envelope, messages: Sequence[bytes], partial: bool) -> tuple[int, int]:
        self.reach()
        with self._lock:
            depth = self.depth(envelope.queue)
            room = 0 if self._full else min(len(messages), max(0, envelope.limit_jobs - depth))
            if room < len(messages) and not partial:
                room = 0
            self.refused += len(messages) - room
            jobs = [_record(message) for message in messages[:room]]
            self.jobs += jobs
            self._waiting += jobs
        self._work()
        return room, depth + room

    def fetch(self, job_ids: Sequence[str]) -> list[bytes | None]:
        self.reach()
        return [self._stored.get(job_id) for job_id in job_ids]

    def listen(self, channel: str, heard: Callable[[list[str]], None]) -> None:
        self.reach()
        self._listeners[channel] = heard

    def unlisten(self, channel: str) -> None:
        self._listeners.pop(channel, None)

    def revoke(self, job_ids: Sequence[str]) -> None:
        self.reach()
        with self._lock:
            self.revoked += job_ids
            self._waiting = [job for job in self._waiting if job.id not in set(job_ids)]

    def cards(self) -> list[WorkerCard]:
        self.reach()
        if not self._workers:
            return []
        now = self._clock()
        return [
            WorkerCard(
                node=_NODE, image="testing", host="testing", pid=1, state="ready", queues=self.fleet.queues, models=(),
                started_at=now, seen_at=now, items_per_s=_ITEMS_PER_S,
            )
        ]  # fmt: skip

    def depth(self, queue: str) -> int:
        return sum(job.queue == queue for job in self._waiting)

    # ------------------------------------------------------------------------------------------- the "workers"

    def _work(self) -> None:
        with self._lock:
            if self._held or not self._workers:
                return
            jobs, self._waiting = self._waiting, []
        finished: dict[str, list[str]] = {}
        for job in sorted(jobs, key=lambda job: job.lane == "bulk"):
            stored = codec.dumps(self._meta(job))
            self._stored[job.id] = stored.encode() if isinstance(stored, str) else stored
            finished.setdefault(job.reply_to, []).append(job.id)
        for channel, ids in finished.items():
            if heard := self._listeners.get(channel):
                heard(ids)

    def _meta(self, job: RecordedJob) -> dict[str, Any]:
        """The result meta as a worker stores it."""
        now = self._clock()
        if job.expires_at is not None and now > job.expires_at:
            return _meta(job, "REVOKED", _failure("TaskRevokedError", "celery.exceptions", ["expired"]))
        limits = self.fleet.models[job.model].limits
        try:
            params = check_params(job.task, job.params, limits, job.model)
            items = self._items(job, params)
        except CortexError as error:
            failure = _failure(type(error).__name__, type(error).__module__, [error.message, error.details])
            return _meta(job, "FAILURE", failure)
        except Exception as error:
            # A worker outlives any failure of its model, and so does this one.
            return _meta(job, "FAILURE", _failure(type(error).__name__, type(error).__module__, [str(error)]))
        timings = Timings(queue_ms=max(0.0, now - job.sent_at) * 1e3, batch_items=len(items))
        return _meta(job, "SUCCESS", Answer(job.task, job.model, REVISION, timings.model_dump(), items, packed=True))

    def _items(self, job: RecordedJob, params: Params) -> list[dict[str, Any]]:
        limits = self.fleet.models[job.model].limits
        items: list[dict[str, Any]] = [{} for _ in job.inputs]
        good: dict[int, Any] = {}
        for index, value in enumerate(job.inputs):
            try:
                good[index] = check_input(job.task, value, limits, getattr(params, "truncate", False))
            except InvalidInput as error:
                items[index] = {"error": error.to_wire()}
        values = self._handler(job.task, job.model, list(good.values()), params)
        for index, value in zip(good, _formed(values, params, job.model), strict=True):
            items[index] = {"error": value.to_wire()} if isinstance(value, CortexError) else {"value": dict(value)}
        return items


def _formed(
    values: Sequence[Mapping[str, Any] | CortexError], params: Params, model: str
) -> list[Mapping[str, Any] | CortexError]:
    """Float vectors in the form that was asked for, as a worker makes it of its model's."""
    form = form_of(params, stored_params(params, ""))
    if form is None:
        return list(values)
    return [made(form, [value], model)[0] if isinstance(value, Mapping) else value for value in values]


def _echo(task: str, model: str, inputs: Sequence[Any], params: Params) -> list[Mapping[str, Any] | CortexError]:
    return [echo(task, value, params) for value in inputs]


def _meta(job: RecordedJob, status: str, result: Any) -> dict[str, Any]:
    return {"status": status, "result": result, "traceback": None, "children": [], "task_id": job.id}


def _failure(name: str, module: str, arguments: list[Any]) -> dict[str, Any]:
    return {"exc_type": name, "exc_message": arguments, "exc_module": module}


def _record(raw: bytes) -> RecordedJob:
    """A message, read as a worker reads it."""
    message = json.loads(raw)
    headers, properties = message["headers"], message["properties"]
    _, kwargs, _ = json.loads(message["body"])
    expires = headers["expires"]
    return RecordedJob(
        id=headers["id"],
        task=task_spec(headers["task"]).name,
        model=kwargs.pop("model"),
        inputs=kwargs.pop("inputs"),
        params=kwargs,
        queue=properties["delivery_info"]["routing_key"],
        lane=lane_of(properties["priority"]),
        cache=headers[codec.HEADER]["cache"],
        expires_at=datetime.fromisoformat(expires).timestamp() if expires else None,
        sent_at=headers[codec.HEADER]["sent_at"],
        reply_to=properties["reply_to"],
    )
