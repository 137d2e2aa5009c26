"""What a client publishes by Celery's own means, and who it shares its connections with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from cortex_tasks import BrokerUnavailable
from cortex_tasks.app import make_app
from cortex_tasks.catalog import TASKS
from cortex_tasks.codec import queue_key
from cortex_tasks.config import FleetConfig
from cortex_tasks.payloads import Series
from cortex_tasks.publish import Envelope
from cortex_tasks.settings import Settings
from cortex_tasks.stock import StockWire

#: Told anew, or written with other blanks, by whoever publishes.
OWN = {"body", "expiration", "delivery_tag"}
SERIES = Series(ds=("2024-01-01T00:00:00", "2024-01-02T00:00:00"), y=(1.0, 2.5))
SENT_AT = 4_000_000_000.0


def settings_of(url: str) -> Settings:
    return Settings.model_validate({"broker_url": url, "publish": "stock"})


@pytest.fixture
def wire(redis_url: str, echo_fleet: FleetConfig) -> Iterator[StockWire]:
    made = StockWire(settings_of(redis_url), echo_fleet)
    yield made
    made.close()


@pytest.fixture
def server(redis_url: str) -> Iterator[Any]:
    with redis.Redis.from_url(redis_url) as client:
        yield client


def envelope(task: str = "embed", limit_jobs: int = 3) -> Envelope:
    return Envelope(
        TASKS[task], {"model": "echo"}, queue="echo", limit_jobs=limit_jobs, lane="bulk", cache="off",
        reply_to="cortex:reply:me",
    )  # fmt: skip


def opened(message: bytes) -> tuple[dict[str, Any], Any]:
    """A message without what is its publisher's own, and its body."""
    found: dict[str, Any] = json.loads(message)
    for part in (found, found["properties"]):
        for name in OWN & part.keys():
            if name != "body":
                del part[name]
    return found, json.loads(found.pop("body"))


@pytest.mark.parametrize("deadline_s", [None, 60.0])
@pytest.mark.parametrize(("task", "value"), [("embed", "One héllo “text” 😀"), ("forecast", SERIES)])
def test_celery_publishes_what_was_sealed(
    wire: StockWire, server: Any, task: str, value: Any, deadline_s: float | None
) -> None:
    sealed = envelope(task).seal("11111111-2222", [value], sent_at=SENT_AT, deadline_s=deadline_s)
    assert wire.push(envelope(task), [sealed], partial=False) == (1, 1)
    published = server.rpop(queue_key("echo", 9))
    (mine, my_body), (theirs, their_body) = opened(sealed), opened(published)
    assert their_body == my_body
    # Celery repeats what is shown of the arguments.
    assert theirs["properties"].items() >= mine["properties"].items()
    for name in ("origin", "stamps"):
        mine["headers"].pop(name), theirs["headers"].pop(name)
    assert theirs["headers"] == mine["headers"]
    assert ("expiration" in json.loads(published)["properties"]) == (deadline_s is not None)


@pytest.mark.parametrize(("partial", "pushed"), [(False, 0), (True, 2)])
def test_a_full_queue_takes_none_or_the_first(wire: StockWire, server: Any, partial: bool, pushed: int) -> None:
    server.lpush(queue_key("echo", 3), "of another lane")
    sealed = [envelope().seal(f"job-{n}", ["text"], sent_at=SENT_AT) for n in range(4)]
    assert wire.push(envelope(), sealed, partial=partial) == (pushed, 1 + pushed)
    ids = [json.loads(raw)["headers"]["id"] for raw in reversed(server.lrange(queue_key("echo", 9), 0, -1))]
    assert ids == [f"job-{n}" for n in range(pushed)]


def test_no_answer_is_subscribed_to_and_every_connection_is_given_back(
    redis_url: str, echo_fleet: FleetConfig, server: Any
) -> None:
    before = server.info("clients")["connected_clients"]
    wire = StockWire(settings_of(redis_url), echo_fleet)
    wire.push(envelope(), [envelope().seal("an-id", ["text"], sent_at=SENT_AT)], partial=False)
    assert server.info("clients")["connected_clients"] > before
    assert server.pubsub_channels() == []
    wire.close()
    assert server.info("clients")["connected_clients"] == before


def test_the_connection_is_not_one_of_celerys_pool(wire: StockWire, redis_url: str, echo_fleet: FleetConfig) -> None:
    """Which is the process's: a forked child would publish on its parent's."""
    wire.push(envelope(), [envelope().seal("an-id", ["text"], sent_at=SENT_AT)], partial=False)
    with make_app(settings_of(redis_url), echo_fleet, fail_fast=True) as app, app.producer_pool.acquire() as producer:
        assert producer.connection is not wire._sender._connection
    assert wire._sender._producer.connection is wire._sender._connection


def test_an_absent_redis_is_named_without_its_password(echo_fleet: FleetConfig) -> None:
    wire = StockWire(settings_of("redis://me:s3cret@127.0.0.1:1/0"), echo_fleet)
    with pytest.raises(BrokerUnavailable, match=r"redis://me:\*\*\*@127\.0\.0\.1:1/0") as raised:
        wire._sender.send([envelope().seal("an-id", ["text"], sent_at=SENT_AT)])
    assert "s3cret" not in repr(raised.value)
    wire.close()
