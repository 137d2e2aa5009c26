"""Attempts and dead letters, in a real Redis."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from workers import dead_letters
from workers.dead_letters import DeadLetters, dead_letter_key


@pytest.fixture
def client(redis_url: str) -> Iterator[Any]:
    with redis.Redis.from_url(redis_url) as made:
        yield made


def test_attempts_are_counted_by_input_and_forgotten_in_time(client: Any) -> None:
    letters = DeadLetters(lambda: client)
    counts = [letters.count_attempt(*of) for of in (("a", 0), ("a", 0), ("a", 1), ("b", 0))]
    assert counts == [1, 2, 1, 1]
    assert 0 < client.ttl("cortex:attempts:a") <= 86_400


def test_a_parked_job_can_be_put_back(client: Any) -> None:
    letters = DeadLetters(lambda: client, clock=lambda: 12.5)
    message = {"body": "…", "headers": {"id": "a"}, "properties": {}}
    letters.park("q", "a", "it killed three workers", message)
    (raw,) = client.lrange(dead_letter_key("q"), 0, -1)
    assert json.loads(raw) == {"id": "a", "reason": "it killed three workers", "at": 12.5, "message": message}


def test_the_newest_come_first_and_the_list_is_bounded(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dead_letters, "DEAD_LETTERS_MAX", 3)
    letters = DeadLetters(lambda: client)
    for n in range(5):
        letters.park("q", str(n), "poison", {})
    assert [json.loads(raw)["id"] for raw in client.lrange("cortex:dead:q", 0, -1)] == ["4", "3", "2"]


def test_it_connects_once_and_only_when_needed(client: Any) -> None:
    made: list[int] = []

    def connect() -> Any:
        made.append(1)
        return client

    letters = DeadLetters(connect)
    assert made == []
    letters.count_attempt("a", 0)
    letters.park("q", "a", "poison", {})
    assert made == [1]


def test_a_redis_that_is_away_is_said() -> None:
    letters = DeadLetters(lambda: redis.Redis(port=1, socket_connect_timeout=0.1, retry=None))
    with pytest.raises(redis.ConnectionError):
        letters.count_attempt("a", 0)
