"""Both encodings of an answer, torn and forged ones, and the names of things in Redis."""

from __future__ import annotations

import json
import math
import struct
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from celery.backends.base import compress_payload, decompress_payload
from hypothesis import example, given
from hypothesis import strategies as st
from kombu.serialization import dumps as kombu_dumps
from kombu.serialization import loads as kombu_loads
from kombu.transport.redis import Channel

from cortex_tasks import codec
from cortex_tasks.codec import Answer, dumps, lane_of, loads, priority_of, queue_key, queue_keys
from cortex_tasks.errors import InvalidInput
from cortex_tasks.payloads import Timings

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(max_size=64),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text().filter(lambda key: key not in ("$", "__type__", "__value__")), inner, max_size=4)
    ),
    max_leaves=20,
)
items = st.lists(
    st.one_of(
        st.builds(lambda value: {"value": {"data": value}}, values),
        st.just({"error": InvalidInput("refused", {"limit": 1}).to_wire()}),
    ),
    max_size=6,
)


def meta(items: list[dict[str, Any]], packed: bool) -> dict[str, Any]:
    timings = Timings(queue_ms=1.5, batch_items=3)
    return {
        "status": "SUCCESS",
        "result": Answer("embed", "m", "rev", timings.model_dump(), items, packed),
        "task_id": "id",
    }


@pytest.fixture
def switch_often() -> Iterator[None]:
    """Threads take turns within a few of their steps."""
    usual_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual_s)


# ------------------------------------------------------------------------------------------- round trips


@given(items)
def test_a_packed_answer_comes_back_as_it_was(items: list[dict[str, Any]]) -> None:
    raw = dumps(meta(items, packed=True))
    assert isinstance(raw, bytes)
    assert raw.startswith(b"\0celery-compressed\0application/x-cortex\0CXP1")
    result = loads(raw)["result"]
    assert result["items"] == items
    assert (result["task"], result["model"], result["revision"]) == ("embed", "m", "rev")
    assert result["timings"] == Timings(queue_ms=1.5, batch_items=3).model_dump()


@given(items)
def test_both_encodings_say_the_same(items: list[dict[str, Any]]) -> None:
    packed, plain = dumps(meta(items, packed=True)), dumps(meta(items, packed=False))
    assert isinstance(plain, str)
    assert loads(packed) == loads(plain)


@given(items)
def test_the_plain_encoding_is_kombus_own_json(items: list[dict[str, Any]]) -> None:
    text = dumps(meta(items, packed=False))
    assert kombu_loads(text, "application/json", "utf-8", accept={"application/json"}) == loads(text)


def test_after_what_cannot_be_packed_or_read_the_next_one_comes_back_as_it_was() -> None:
    for _ in range(3):
        with pytest.raises(TypeError):
            codec.pack({"data": b"bytes of what failed", "bad": object()})
        with pytest.raises(ValueError):
            codec.unpack(packed('{"x":{"$":[0,9]}}'))
        assert codec.unpack(codec.pack({"data": b"others"})) == {"data": b"others"}


def test_threads_that_pack_and_read_at_the_same_time_get_their_own(switch_often: None) -> None:
    def go_and_return(number: int) -> bool:
        value = [{"data": b"%d-%d" % (number, at), "at": at} for at in range(50)]
        return all(codec.unpack(codec.pack(value)) == value for _ in range(20))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(go_and_return, range(64)))


def test_vectors_travel_bit_by_bit() -> None:
    vector = struct.pack("<4f", 0.1, -0.0, math.inf, 1e-45)
    raw = dumps(meta([{"value": {"data": vector}}], packed=True))
    assert loads(raw)["result"]["items"][0]["value"]["data"] == vector
    assert raw.endswith(vector), "packed, not written as text"


@pytest.mark.parametrize("value", [datetime(2024, 1, 2, 3, tzinfo=UTC), date(2024, 1, 2), Decimal("1.5"), UUID(int=5)])
def test_what_kombus_json_knows_both_encodings_know(value: Any) -> None:
    for packed in (True, False):
        found = loads(dumps(meta([{"value": {"x": value}}], packed)))["result"]["items"][0]["value"]["x"]
        assert found == loads(codec.kombu_json.dumps(value))


def test_a_meta_without_an_answer_is_plain_json() -> None:
    failure = {"status": "FAILURE", "result": {"exc_type": "InvalidInput", "exc_message": ["no", {}]}}
    text = dumps(failure)
    assert json.loads(text) == failure
    assert loads(text) == loads(text.encode() if isinstance(text, str) else text) == failure
    assert loads(memoryview(text.encode() if isinstance(text, str) else text)) == failure


def test_celery_finds_the_serializer() -> None:
    codec.register_serializer()
    codec.register_serializer()
    content_type, encoding, raw = kombu_dumps(meta([{"value": {"data": b"x"}}], packed=True), codec.SERIALIZER)
    assert (content_type, encoding) == (codec.CONTENT_TYPE, "binary")
    assert kombu_loads(raw, content_type, encoding, accept={content_type})["status"] == "SUCCESS"


@given(items)
def test_celery_itself_reads_a_packed_answer_as_json(items: list[dict[str, Any]]) -> None:
    raw = dumps(meta(items, packed=True))
    assert raw != (text := decompress_payload(raw))
    assert kombu_loads(text, "application/json", "utf-8", accept={"application/json"}) == loads(raw)


def test_what_celery_packs_for_an_app_that_asks_for_it_is_read_here() -> None:
    stored = compress_payload('{"status": "SUCCESS", "result": [1, "é"]}', codec.CONTENT_TYPE)
    assert loads(stored) == {"status": "SUCCESS", "result": [1, "é"]}
    assert loads(decompress_payload(stored)) == loads(stored)


# ------------------------------------------------------------------------------------------ torn, forged


@given(items, st.data())
def test_a_torn_answer_is_a_value_error_and_never_half_an_answer(
    items: list[dict[str, Any]], data: st.DataObject
) -> None:
    whole = dumps(meta([*items, {"value": {"data": b"the end"}}], packed=True))
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(ValueError):
        loads(whole[:cut])


@given(items, st.data())
def test_a_damaged_answer_is_an_answer_or_a_value_error(items: list[dict[str, Any]], data: st.DataObject) -> None:
    raw = bytearray(dumps(meta(items, packed=True)))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        loads(bytes(raw))
    except ValueError:
        return


def packed(head: str, blob: bytes = b"12345678") -> bytes:
    return b"CXP1" + struct.pack("<I", len(head.encode())) + head.encode() + blob


@given(st.binary(max_size=80))
@example(b"")
@example(b"CXP1")
@example(b"CXP1\xff\xff\xff\xff{}")
def test_any_bytes_are_an_answer_or_a_value_error(raw: bytes) -> None:
    for candidate in (raw, b"CXP1" + raw):
        try:
            loads(candidate)
        except ValueError:
            continue


@pytest.mark.parametrize(
    "place",
    ["5", "null", "[]", "[1]", "[1,2,3]", '["a","b"]', "[0,9]", "[9,0]", "[-1,2]", "[0,-1]", "[0.5,1.5]", "[null,1]",
     "{}", "[[0],[1]]", "[1e400,1]"],
)  # fmt: skip
def test_a_forged_place_is_a_value_error(place: str) -> None:
    with pytest.raises(ValueError):
        loads(packed(f'{{"x":{{"$":{place}}}}}'))


@pytest.mark.parametrize(
    "head",
    ['{"__type__":"no such","__value__":1}', '{"__type__":[1],"__value__":1}', '{"__type__":"uuid","__value__":5}',
     '{"__type__":"decimal","__value__":"x"}', '{"__type__":"base64","__value__":5}', "[" * 100_000, "{",
     "{} {}", "{}x"],
)  # fmt: skip
def test_forged_types_are_a_value_error_in_both_encodings(head: str) -> None:
    for raw in (packed(head), head):
        with pytest.raises(ValueError):
            loads(raw)


def test_decoding_runs_no_code() -> None:
    raw = packed('{"__type__":"eval","__value__":"1/0"}')
    with pytest.raises(ValueError, match="Unsupported type"):
        loads(raw)


# ------------------------------------------------------------------------------------------------- names


def test_an_answer_is_short_when_shown() -> None:
    shown = repr(Answer("embed", "m", "0123456789", {"forward_ms": 2}, [{"value": {}}, {"error": {}}] * 500))
    assert shown == "<embed m@01234567: 1000 items, 500 failed, forward 2.0 ms>"


@given(st.integers(-5, 300))
def test_lists_are_named_as_kombu_names_them(priority: int) -> None:
    channel = Channel.__new__(Channel)
    channel.priority_steps = list(codec.PRIORITY_STEPS)
    channel.sep = "\x06\x16"
    if priority >= 0:
        assert queue_key("q", priority) == channel._q_for_pri("q", priority)
    assert queue_keys("q") == tuple(channel._q_for_pri("q", step) for step in codec.PRIORITY_STEPS)


def test_lanes_and_priorities_agree() -> None:
    assert lane_of(priority_of("interactive")) == "interactive"
    assert lane_of(priority_of("bulk")) == "bulk"
    assert [lane_of(priority) for priority in (None, 0, 3, 5, 6, 9, 255)] == ["interactive"] * 4 + ["bulk"] * 3


def test_a_reply_channel_is_known_from_a_stock_reply_to() -> None:
    assert codec.is_reply_channel(codec.reply_channel("me"))
    for other in (None, "", "9c3f0d2e", 5, [1], {"a": 1}, b"cortex:reply:me", "cortex:reply:\ud800"):
        assert not codec.is_reply_channel(other)


def test_a_result_lies_where_stock_celery_looks() -> None:
    from celery.backends.base import KeyValueStoreBackend

    assert codec.result_key("id") == f"{KeyValueStoreBackend.task_keyprefix}id"


# --------------------------------------------------------------------------------------------- reply messages


def carried(*jobs: tuple[str, bytes]) -> bytes:
    parts = [struct.pack("<II", len(job_id), len(meta)) + job_id.encode() + meta for job_id, meta in jobs]
    return codec.REPLY_MAGIC + b"".join(parts)


def test_a_reply_names_jobs_or_carries_their_results() -> None:
    assert codec.read_reply(b"one two") == [("one", None), ("two", None)]
    assert codec.read_reply(carried(("one", b"meta"), ("two", b""))) == [("one", b"meta"), ("two", None)]


@given(st.binary(max_size=200))
def test_any_reply_can_be_read(message: bytes) -> None:
    codec.read_reply(message)
    codec.read_reply(codec.REPLY_MAGIC + message)


@given(st.integers(0, 60))
def test_of_a_torn_reply_what_is_whole_is_read(length: int) -> None:
    jobs = [("one", b"meta"), ("two", b"x" * 20), ("three", b"y" * 10)]
    whole = carried(*jobs)
    assert (
        codec.read_reply(whole[: len(codec.REPLY_MAGIC) + length]) == jobs[: len(codec.read_reply(whole[: 4 + length]))]
    )
