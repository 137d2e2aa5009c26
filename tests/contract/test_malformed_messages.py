"""Whatever lies in a queue: the worker lives on, the neighbours are answered, nothing stays unacknowledged."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, NamedTuple

import pytest
import redis

from cortex_tasks.codec import loads, queue_keys, result_key
from tests.support.worker_process import WorkerProcess, poll_until

pytestmark = pytest.mark.fleet

DEAD = "cortex:dead:echo"
CALLBACKS = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
KWARGS = {"inputs": ["x"], "model": "echo"}


def message(headers: Any = None, properties: Any = None, body: Any = None, **top: Any) -> dict[str, Any]:
    """A good message, but for what is given."""
    job_id = str(uuid.uuid4())
    made = {
        "body": json.dumps([[], KWARGS, CALLBACKS] if body is None else body),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {"lang": "py", "task": "cortex.embed", "id": job_id, "retries": 0, **(headers or {})},
        "properties": {
            "correlation_id": job_id,
            "delivery_info": {"exchange": "", "routing_key": "echo"},
            "priority": 0,
            "body_encoding": "utf-8",
            "delivery_tag": job_id,
            **(properties or {}),
        },
    }
    return {**made, **top}


def without(part: str, name: str) -> dict[str, Any]:
    made = message()
    del made[part][name]
    return made


#: Parked on the dead-letter list: no client could be told.
PARKED: dict[str, Any] = {
    "no JSON": b"not json",
    "nothing": b"",
    "no UTF-8": b"\xff\xfe{}",
    "a list": b"[1, 2]",
    "null": b"null",
    "what would split a record": b"1, 2",
    "what would close a record": b'{}],"",["x',
    "deeply nested": b"[" * 100_000,
    "no properties": {key: value for key, value in message().items() if key != "properties"},
    "properties a list": message() | {"properties": [1]},
    "delivery info a text": message(properties={"delivery_info": "x"}),
    "unknown body encoding": message(properties={"body_encoding": "rot13"}),
    "broken base64": message(properties={"body_encoding": "base64"}),
    "body a number": message() | {"body": 5},
    "no body": message() | {"body": None},
    "headers a text": message() | {"headers": "x"},
    "no id": without("headers", "id"),
    "id a number": message({"id": 5}),
    "id a list": message({"id": [1]}),
    "task a list": message({"task": [1]}),
    "unknown task without an id": without("headers", "id") | {"headers": {"task": "no.such"}},
    "time limit a text": message({"timelimit": "abc"}),
    "stamps of a wrong type": message({"stamped_headers": 5}),
    "payload null": message(body=False) | {"body": "null"},
    "payload a number": message(body=5),
    "payload of two": message(body=[[], {}]),
    "arguments numbers": message(body=[1, 2, 3]),
    "keywords a list": message(body=[[], [1], CALLBACKS]),
    "callbacks a list": message(body=[[], KWARGS, [1]]),
}
#: Past, but since the machine's start: Celery's timer takes it at once. What is older runs without the timer.
JUST_NOW = datetime.now(UTC).isoformat()
#: What says when to run is handed on by the timer, when nobody listens to its delivery any more.
LATER: dict[str, Any] = {
    case: raw | {"headers": raw["headers"] | {"eta": JUST_NOW}}
    for case, raw in PARKED.items()
    if isinstance(raw, dict) and isinstance(raw["headers"], dict)
}
#: Refused or dropped as stock Celery does, and logged.
DROPPED: dict[str, Any] = {
    "body no JSON": message() | {"body": "{{{"},
    "a pickle": message() | {"content-type": "application/x-python-serialize"},
    "an ETA that is none": message({"eta": "never"}),
    "an expiry that is none": message({"expires": "x"}),
    "unknown compression": message({"compression": "nope"}),
}
#: Answered, with what error if any.
ANSWERED: dict[str, tuple[dict[str, Any], str | None]] = {
    "no delivery info": (without("properties", "delivery_info"), None),
    "options a text": (message({"cortex": "x"}), None),
    "sent at infinity": (message({"cortex": {"sent_at": 10**400}}), None),
    "priority a text": (message(properties={"priority": "high"}), None),
    "priority a list": (message(properties={"priority": [1]}), None),
    "reply_to a number": (message(properties={"reply_to": 5}), None),
    "reply_to a surrogate": (message(properties={"reply_to": "cortex:reply:\ud800"}), None),
    "expiry without a zone": (message({"expires": "2099-01-01T00:00:00"}), None),
    "expiry at the end of time": (message({"expires": "9999-12-31T23:59:59-14:00"}), None),
    "callbacks null": (message(body=[[], KWARGS, None]), None),
    "unknown task": (message({"task": "no.such"}), "NotRegistered"),
    "no inputs": (message(body=[[], {}, CALLBACKS]), "InvalidInput"),
    "model a list": (message(body=[[], {**KWARGS, "model": [1]}, CALLBACKS]), "UnknownModel"),
    "a parameter named self": (message(body=[[], {**KWARGS, "self": 1}, CALLBACKS]), "InvalidParameter"),
    "callbacks a number": (message(body=[[], KWARGS, {**CALLBACKS, "callbacks": 5}]), "TypeError"),
}


class Fleet(NamedTuple):
    worker: WorkerProcess
    redis: Any

    def push(self, *raw: Any) -> None:
        self.redis.lpush("echo", *(one if isinstance(one, bytes) else json.dumps(one) for one in raw))

    def meta(self, job_id: str) -> dict[str, Any] | None:
        raw = self.redis.get(result_key(job_id))
        return None if raw is None else loads(raw)

    def send_between_neighbours(self, raw: Any) -> None:
        """Push it with a good message on either side; returns when both are answered and the worker is at rest."""
        before, after = message(), message()
        self.push(before, raw, after)
        for neighbour in (before, after):
            poll_until(lambda job_id=neighbour["headers"]["id"]: self.meta(job_id), self.worker.tail(), 20)
        poll_until(self.at_rest, "nothing left behind", 20)
        assert self.worker.process.poll() is None

    def at_rest(self) -> bool:
        return self.redis.hlen("unacked") == 0 and not any(self.redis.llen(key) for key in queue_keys("echo"))


@pytest.fixture(scope="module")
def fleet(echo_worker: WorkerProcess) -> Iterator[Fleet]:
    with redis.Redis.from_url(echo_worker.url) as client:
        yield Fleet(echo_worker, client)


@pytest.mark.parametrize(
    "raw", [*PARKED.values(), *LATER.values()], ids=[*PARKED, *(f"{case}, for later" for case in LATER)]
)
def test_what_cannot_be_read_is_parked(fleet: Fleet, raw: Any) -> None:
    fleet.redis.delete(DEAD)
    fleet.send_between_neighbours(raw)
    (entry,) = (json.loads(entry) for entry in fleet.redis.lrange(DEAD, 0, -1))
    assert entry["reason"].startswith("the message cannot be read: ")
    assert entry["at"] == pytest.approx(time.time(), abs=60)
    if isinstance(raw, dict) and isinstance(raw.get("headers"), dict) and isinstance(raw["headers"].get("id"), str):
        assert entry["id"] == raw["headers"]["id"]
        assert entry["message"]["headers"] == raw["headers"]


@pytest.mark.parametrize("case", DROPPED)
def test_what_celery_drops_stops_nobody(fleet: Fleet, case: str) -> None:
    fleet.send_between_neighbours(DROPPED[case])


@pytest.mark.parametrize("case", ANSWERED)
def test_what_can_be_answered_is(fleet: Fleet, case: str) -> None:
    raw, error = ANSWERED[case]
    fleet.send_between_neighbours(raw)
    meta = poll_until(lambda: fleet.meta(raw["headers"]["id"]), "an answer")
    assert meta["status"] == ("FAILURE" if error else "SUCCESS")
    if error:
        assert meta["result"]["exc_type"] == error


def test_an_unreadable_record_does_not_stop_the_sweep(fleet: Fleet) -> None:
    """What a worker that died between fetching and parking leaves behind."""
    fleet.redis.delete(DEAD)
    abandoned = message()
    fleet.redis.hset("unacked", "bad", b'[not json,"","echo"]')
    fleet.redis.hset("unacked", "good", f'[{json.dumps(abandoned)},"","echo"]')
    fleet.redis.zadd("unacked_index", {"bad": 2, "good": 1})
    poll_until(lambda: fleet.meta(abandoned["headers"]["id"]), "the abandoned job's answer")
    poll_until(fleet.at_rest, "nothing left behind")
    (entry,) = fleet.redis.lrange(DEAD, 0, -1)
    assert json.loads(entry)["message"] == "not json"


def test_a_key_that_is_no_list_costs_no_message(fleet: Fleet) -> None:
    """A queue's key was overwritten with a text: the other queues are served, nothing is popped and lost."""
    fleet.redis.set("slow", "no list")
    try:
        fleet.send_between_neighbours(message())
    finally:
        fleet.redis.delete("slow")
    late = message(body=[[], {"inputs": ["x"], "model": "slow"}, CALLBACKS])
    fleet.redis.lpush("slow", json.dumps(late))
    assert poll_until(lambda: fleet.meta(late["headers"]["id"]), "the mended queue's answer")["status"] == "SUCCESS"
    assert fleet.worker.process.poll() is None
