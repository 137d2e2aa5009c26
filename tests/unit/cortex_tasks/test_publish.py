"""Messages: prepared once a kind, sealed once a job."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from cortex_tasks.catalog import TASKS
from cortex_tasks.codec import queue_key
from cortex_tasks.payloads import Lane, Series
from cortex_tasks.publish import PUSH_SCRIPT, Envelope, new_id, push_arguments, revoke_message, short_repr

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=50)


def envelope(task: str = "embed", lane: Lane = "interactive", limit: int = 10, **params: Any) -> Envelope:
    return Envelope(
        TASKS[task], {"model": "echo", **params}, queue="echo", limit_jobs=limit, lane=lane, cache="use",
        reply_to="cortex:reply:me",
    )  # fmt: skip


def opened(raw: bytes) -> tuple[dict[str, Any], list[Any]]:
    message = json.loads(raw)
    return message, json.loads(message["body"])


@given(st.lists(TEXT, min_size=1, max_size=5))
def test_any_texts_survive_the_message(texts: list[str]) -> None:
    _, body = opened(envelope().seal("id", texts, sent_at=1.0))
    assert body == [
        [],
        {"inputs": texts, "model": "echo"},
        {"callbacks": None, "errbacks": None, "chain": None, "chord": None},
    ]


@given(TEXT, st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=20))
def test_any_parameter_survives_the_message(text: str, label: str) -> None:
    message, body = opened(envelope("zero_shot", labels=[label]).seal("id", [text], sent_at=1.0))
    assert body[1]["labels"] == [label]
    assert "'labels'" in message["headers"]["kwargsrepr"]


def test_a_series_travels_as_two_columns() -> None:
    series = Series(ds=("2024-01-01T00:00:00", "2024-01-02T00:00:00"), y=(1.0, 2.5))
    message, body = opened(envelope("forecast", horizon=3).seal("id", [series], sent_at=1.0))
    assert body[1]["inputs"] == [{"ds": list(series.ds), "y": [1.0, 2.5]}]
    assert message["headers"]["kwargsrepr"] == "{'inputs': <1 series, 2 points>, 'model': 'echo', 'horizon': 3}"


def test_the_message_carries_ids_lane_deadline_and_reply_channel() -> None:
    message, _ = opened(envelope(lane="bulk").seal("the-id", ["a"], sent_at=1_700_000_000.5, deadline_s=2.5))
    headers, properties = message["headers"], message["properties"]
    assert headers["id"] == headers["root_id"] == properties["correlation_id"] == "the-id"
    assert headers["expires"] == "2023-11-14T22:13:23+00:00"
    assert headers["cortex"] == {"packed": True, "cache": "use", "sent_at": 1_700_000_000.5}
    assert (properties["priority"], properties["reply_to"]) == (9, "cortex:reply:me")
    assert properties["delivery_info"] == {"exchange": "", "routing_key": "echo"}


def test_documents_never_appear_whole_in_what_flower_shows() -> None:
    secret = "The quick brown fox jumps over the lazy dog. " * 50
    message, _ = opened(envelope("zero_shot", labels=["x" * 150] * 5).seal("id", [secret] * 3, sent_at=1.0))
    shown = message["headers"]["kwargsrepr"]
    assert shown.startswith("{'inputs': <3 texts, 'The quick bro…'>, 'model': 'echo'")
    assert len(shown) < 300


@pytest.mark.parametrize(
    ("inputs", "shown"),
    [(["Hello"], "<1 text, 'Hello'>"), (["a" * 15, "b"], f"<2 texts, '{'a' * 13}…'>"), ([], "<0 inputs>")],
)
def test_short_repr(inputs: list[Any], shown: str) -> None:
    assert short_repr(inputs) == shown


def test_ids_are_random_uuids_also_in_a_forked_child() -> None:
    ids = {new_id() for _ in range(1000)}
    assert len(ids) == 1000
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(write, new_id().encode())
        os._exit(0)
    mine, child = new_id(), os.read(read, 100).decode()
    os.waitpid(pid, 0)
    os.close(read)
    os.close(write)
    assert len(child) == len(mine) == 36
    assert child != mine


# --------------------------------------------------------------------------------------------- the push script


def push(url: str, sealed: Envelope, count: int, *, partial: bool = False) -> list[int]:
    with redis.Redis.from_url(url) as client:
        keys, args = push_arguments(sealed, [b"%d" % i for i in range(count)], partial=partial)
        return [int(number) for number in client.eval(PUSH_SCRIPT, len(keys), *keys, *args)]


def stored(url: str, key: str) -> list[bytes]:
    with redis.Redis.from_url(url) as client:
        return list(client.lrange(key, 0, -1))


def test_messages_are_pushed_in_order_onto_their_lanes_list(redis_url: str) -> None:
    assert push(redis_url, envelope(lane="bulk"), 3) == [3, 3]
    assert push(redis_url, envelope(), 2) == [2, 5]
    assert stored(redis_url, queue_key("echo", 9)) == [b"2", b"1", b"0"]
    assert stored(redis_url, "echo") == [b"1", b"0"]


def test_the_limit_counts_every_lane_and_refuses_all_or_takes_a_part(redis_url: str) -> None:
    assert push(redis_url, envelope(lane="bulk"), 8) == [8, 8]
    assert push(redis_url, envelope(), 3) == [0, 8]
    assert push(redis_url, envelope(), 3, partial=True) == [2, 10]
    assert push(redis_url, envelope(), 1, partial=True) == [0, 10]
    assert stored(redis_url, "echo") == [b"1", b"0"]


def test_a_push_of_many_messages_needs_one_call(redis_url: str) -> None:
    assert push(redis_url, envelope(limit=20_000), 12_345) == [12_345, 12_345]
    assert stored(redis_url, "echo")[::-1] == [b"%d" % i for i in range(12_345)]


def test_a_revocation_names_its_jobs() -> None:
    channel, raw = revoke_message(["a", "b"], db=3)
    message = json.loads(raw)
    assert channel == "/3.celery.pidbox"
    assert json.loads(message["body"])["arguments"]["task_id"] == ["a", "b"]
