"""The wire contract of a worker in a thread: BRPOP in, SETEX and PUBLISH out, echo answers in between."""

from __future__ import annotations

import json
import threading
import time
from functools import cache
from types import TracebackType
from typing import Any, Self

import redis

from cortex_tasks import codec
from cortex_tasks.catalog import task_spec
from cortex_tasks.codec import Answer
from cortex_tasks.config import FleetConfig, load_fleet
from cortex_tasks.echo import REVISION, echo
from cortex_tasks.errors import CortexError
from cortex_tasks.inputs import check_input, check_params
from cortex_tasks.presence import WORKERS_KEY, WorkerCard, worker_key
from tests.support.worker_process import QUEUES_FILE


@cache
def _fleet() -> FleetConfig:
    return load_fleet(QUEUES_FILE)


def answer_message(raw: bytes) -> tuple[str, str | None, Any]:
    """(job id, reply channel, result meta) of a message: what a worker would store."""
    message = json.loads(raw)
    headers = message["headers"]
    _, kwargs, _ = json.loads(message["body"])
    inputs, model = kwargs.pop("inputs"), kwargs.pop("model")
    spec = task_spec(headers["task"])
    limits = _fleet().models[model].limits
    params = check_params(spec.name, kwargs, limits)
    items = []
    for value in inputs:
        found = echo(spec.name, check_input(spec.name, value, limits), params)
        items.append({"error": found.to_wire()} if isinstance(found, CortexError) else {"value": found})
    packed = bool((headers.get(codec.HEADER) or {}).get("packed"))
    answer = Answer(spec.name, model, REVISION, {"queue_ms": 1.0}, items, packed=packed)
    meta = {"status": "SUCCESS", "result": answer, "traceback": None, "children": [], "task_id": headers["id"]}
    return headers["id"], message["properties"].get("reply_to"), meta


class FakeWorker:
    """Answers the jobs of some queues until it is stopped.

    ``announce=False`` stores answers without a message on the reply channel, as when it was lost or the worker is
    stock. ``batch``: the most jobs announced in one message.
    """

    def __init__(self, url: str, *queues: str, announce: bool = True, batch: int = 64) -> None:
        self._redis = redis.Redis.from_url(url)
        self._queues = queues or ("echo",)
        self._announce, self._batch = announce, batch
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.jobs = 0

    def __enter__(self) -> Self:
        write_card(self._redis, *self._queues)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(10)
        self._redis.close()

    def _run(self) -> None:
        keys = [key for queue in self._queues for key in codec.queue_keys(queue)]
        while not self._stop.is_set():
            popped = self._redis.brpop(keys, timeout=0.05)
            if popped is None:
                continue
            key, first = popped
            more = self._redis.rpop(key, self._batch - 1) if self._batch > 1 else None
            self._answer([first, *(more or [])])

    def _answer(self, messages: list[bytes]) -> None:
        finished: dict[str, list[str]] = {}
        with self._redis.pipeline(transaction=False) as pipe:
            for raw in messages:
                job_id, reply_to, meta = answer_message(raw)
                pipe.setex(codec.result_key(job_id), 600, codec.dumps(meta))
                if self._announce and codec.is_reply_channel(reply_to):
                    finished.setdefault(str(reply_to), []).append(job_id)
            for channel, ids in finished.items():
                pipe.publish(channel, " ".join(ids))
            pipe.execute()
        self.jobs += len(messages)


def write_card(client: Any, *queues: str, state: str = "ready", items_per_s: float = 0.0) -> None:
    """A worker's presence, as if one consumed these queues."""
    now = time.time()
    card = WorkerCard.model_validate(
        {
            "node": "fake@test", "image": "test", "host": "test", "pid": 1, "state": state, "queues": queues,
            "models": (), "started_at": now, "seen_at": now, "items_per_s": items_per_s,
        }
    )  # fmt: skip
    client.setex(worker_key(card.node), 60, card.model_dump_json())
    client.zadd(WORKERS_KEY, {card.node: now})
