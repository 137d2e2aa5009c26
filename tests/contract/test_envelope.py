"""Our messages are stock Celery's: compared with what it publishes, and read with what it reads with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from celery import Celery
from celery.worker.request import Request
from kombu import Connection

from cortex_tasks.app import make_app
from cortex_tasks.catalog import TASKS
from cortex_tasks.codec import HEADER, queue_key, queue_keys
from cortex_tasks.config import FleetConfig
from cortex_tasks.publish import Envelope, revoke_message
from cortex_tasks.settings import Settings

KWARGS = {"inputs": ["One héllo “text” 😀", "two"], "model": "echo", "normalize": False}
#: Differ from message to message, or by design: our representations are shorter, the reply channel is ours.
OWN = {"id", "root_id", "kwargsrepr", "correlation_id", "delivery_tag", "reply_to", "expires"}


@pytest.fixture
def app(redis_url: str, echo_fleet: FleetConfig) -> Iterator[Celery]:
    app = make_app(Settings(broker_url=redis_url), echo_fleet, fail_fast=True)  # type: ignore[arg-type]
    yield app
    app.close()


def ours(deadline_s: float | None = None) -> bytes:
    envelope = Envelope(
        TASKS["embed"], {"model": "echo", "normalize": False}, queue="echo", limit_jobs=10, lane="bulk", cache="use",
        reply_to="cortex:reply:me",
    )  # fmt: skip
    return envelope.seal("11111111-2222", KWARGS["inputs"], sent_at=1.5, deadline_s=deadline_s)  # type: ignore[arg-type]


def theirs(app: Celery, redis_url: str, **options: Any) -> dict[str, Any]:
    header = {"packed": True, "cache": "use", "sent_at": 1.5}
    app.send_task("cortex.embed", kwargs=KWARGS, priority=9, headers={HEADER: header}, ignore_result=False, **options)
    with redis.Redis.from_url(redis_url) as client:
        message: dict[str, Any] = json.loads(client.rpop(queue_key("echo", 9)))  # type: ignore[arg-type]
    return message


def _no_body(*args: Any, **kwargs: Any) -> None: ...


def without_own(part: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in part.items() if name not in OWN}


@pytest.mark.parametrize("deadline_s", [None, 30])
def test_a_message_is_what_send_task_pushes(app: Celery, redis_url: str, deadline_s: float | None) -> None:
    mine, stock = json.loads(ours(deadline_s)), theirs(app, redis_url, expires=deadline_s)
    assert mine.keys() == stock.keys()
    assert json.loads(mine["body"]) == json.loads(stock["body"])
    for part in ("headers", "properties"):
        assert mine[part].keys() == stock[part].keys()
        assert without_own(mine[part]) == without_own(stock[part])
    for name in ("content-type", "content-encoding"):
        assert mine[name] == stock[name]


def test_kombu_and_celery_read_it(app: Celery, redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        client.lpush(queue_key("echo", 9), ours(deadline_s=30))
    with Connection(redis_url, transport_options=app.conf.broker_transport_options) as connection:
        message = connection.SimpleQueue("echo").get(timeout=5)
        message.ack()
    assert message.payload[1] == KWARGS
    app.task(_no_body, name="cortex.embed", shared=False)
    request = Request(message, app=app, decoded=False)
    assert (request.id, request.name, request.kwargs) == ("11111111-2222", "cortex.embed", KWARGS)
    assert request.expires is not None
    assert request.reply_to == "cortex:reply:me"
    assert request.request_dict[HEADER]["packed"] is True


def test_kombu_can_give_it_back_to_its_queue_unharmed(app: Celery, redis_url: str) -> None:
    """As it does with unacked messages when a worker stops."""
    with redis.Redis.from_url(redis_url) as client:
        client.lpush("echo", ours())
        with Connection(redis_url, transport_options=app.conf.broker_transport_options) as connection:
            message = connection.SimpleQueue("echo").get(timeout=5)
            message.requeue()
        back = [json.loads(raw) for key in queue_keys("echo") for raw in client.lrange(key, 0, -1)]
    assert len(back) == 1
    assert json.loads(back[0]["body"]) == json.loads(json.loads(ours())["body"])


def test_a_revocation_is_what_control_revoke_publishes(app: Celery, redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client, client.pubsub() as pubsub:
        pubsub.psubscribe("*")
        pubsub.get_message(timeout=5)
        app.control.revoke(["a", "b"])
        stock = pubsub.get_message(timeout=5)
    channel, raw = revoke_message(["a", "b"])
    assert stock is not None
    assert stock["channel"].decode() == channel
    mine, theirs = json.loads(raw), json.loads(stock["data"])
    assert mine.keys() == theirs.keys()
    assert json.loads(mine["body"]) == json.loads(theirs["body"])
    assert without_own(mine["properties"]) == without_own(theirs["properties"])
    assert mine["headers"].keys() == theirs["headers"].keys()
