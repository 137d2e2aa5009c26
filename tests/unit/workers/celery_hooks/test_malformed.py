"""Parking what cannot be read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from celery.worker import state as worker_state

from workers.celery_hooks import malformed


@pytest.fixture
def client(redis_url: str) -> Iterator[Any]:
    with redis.Redis.from_url(redis_url) as made:
        yield made


@pytest.mark.parametrize(
    ("raw", "job_id", "message"),
    [
        (b"not json", "", "not json"),
        (b"\xff", "", "\\xff"),
        (b"", "", ""),
        (b"[1]", "", [1]),
        (b"[" * 100_000, "", "[" * 100_000),
        (b'{"headers": {"id": "a"}}', "a", {"headers": {"id": "a"}}),
        (b'{"headers": {"id": 5}}', "", {"headers": {"id": 5}}),
        (b'{"headers": []}', "", {"headers": []}),
    ],
)
def test_a_message_moves_to_the_dead_letters_in_one_step(client: Any, raw: bytes, job_id: str, message: Any) -> None:
    client.hset("u", "tag", "record")
    client.zadd("i", {"tag": 1})
    malformed.park(client, ("u", "i"), "q", "tag", raw, KeyError("properties"))
    entry = json.loads(client.lindex("cortex:dead:q", 0))
    assert (entry["id"], entry["message"]) == (job_id, message)
    assert entry["reason"] == "the message cannot be read: KeyError: 'properties'"
    assert not client.exists("u", "i")


def test_a_long_reason_is_cut(client: Any) -> None:
    malformed.park(client, ("u", "i"), "q", "tag", b"x", ValueError("y" * 10_000))
    assert len(json.loads(client.lindex("cortex:dead:q", 0))["reason"]) < 300


@pytest.mark.parametrize(
    ("record", "message", "queue"),
    [
        (b'[{"a": [1]},"","q"]', b'{"a": [1]}', "q"),
        (b'[{"a": [1]}, "", "q"]', b'{"a": [1]}', "q"),
        (b'[not json,"","q"]', b"not json", "q"),
        (b'[,"","q"]', b"", "q"),
        (b'[a,"",b,"","q"]', b'a,"",b', "q"),
        (b"nonsense", b"", "nonsense"),
        (b"", b"", ""),
    ],
)
def test_records_are_taken_apart(record: bytes, message: bytes, queue: str) -> None:
    assert malformed.split_record(record) == (message, queue)


@pytest.mark.parametrize("job_id", ["a", 5])
def test_celerys_books_lose_only_that_request(job_id: Any) -> None:
    first, second = (
        type("R", (), {"id": given, "message": SimpleNamespace(delivery_tag=f"tag of {given}")})()
        for given in (job_id, "b")
    )
    worker_state.reset_state()
    try:
        worker_state.task_reserved(first)
        worker_state.task_reserved(second)
        malformed.forget_request("another tag")
        assert worker_state.requests == {job_id: first, "b": second}
        malformed.forget_request(f"tag of {job_id}")
        assert worker_state.requests == {"b": second}
        assert list(worker_state.reserved_requests) == [second]
    finally:
        worker_state.reset_state()
