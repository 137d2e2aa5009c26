"""What a client's settings switch: seen in the messages of its jobs."""

from __future__ import annotations

import json
from typing import Any

import pytest
import redis

from cortex_tasks import ResultTimeout
from cortex_tasks.codec import queue_key
from cortex_tasks.config import FleetConfig
from cortex_tasks.errors import ConfigError
from cortex_tasks.settings import Settings
from tests.support.any_client import CLIENTS, any_client

CALLS = 10


def messages(url: str) -> list[dict[str, Any]]:
    with redis.Redis.from_url(url) as client:
        return [json.loads(raw) for raw in client.lrange(queue_key("orphan"), 0, -1)]  # type: ignore[union-attr]


@pytest.mark.parametrize("name", CLIENTS)
def test_calls_share_a_message_unless_celery_publishes(name: str, redis_url: str, echo_fleet: FleetConfig) -> None:
    client = any_client(name, redis_url, echo_fleet, timeout_s=0.3)
    with pytest.raises(ResultTimeout):
        client.embed_at_once([f"text {n}" for n in range(CALLS)], model="orphan")
    client.close()
    sent = messages(redis_url)
    inputs = sorted(text for message in sent for text in json.loads(message["body"])[1]["inputs"])
    assert inputs == sorted(f"text {n}" for n in range(CALLS))
    if name.endswith(("stock-publish", "all-stock")):
        assert len(sent) == CALLS
    elif name.startswith("async"):
        assert len(sent) == 1


@pytest.mark.parametrize("name", CLIENTS)
def test_answers_are_announced_and_packed_unless_they_are_polled_for(
    name: str, redis_url: str, echo_fleet: FleetConfig
) -> None:
    client = any_client(name, redis_url, echo_fleet)
    client.submit("text", model="orphan")
    (message,) = messages(redis_url)
    with redis.Redis.from_url(redis_url) as server:
        channels = server.pubsub_channels()
    client.close()
    reply_to = message["properties"]["reply_to"]
    is_stock = name.endswith(("stock-replies", "all-stock"))
    assert message["headers"]["cortex"]["packed"] is not is_stock
    assert reply_to.startswith("cortex:reply:") is not is_stock
    assert channels == ([] if is_stock else [reply_to.encode()])


def test_a_switch_has_two_positions() -> None:
    for name in ("CORTEX_PUBLISH", "CORTEX_REPLIES"):
        with pytest.raises(ConfigError, match=name):
            Settings.from_env({name: "sometimes"})
