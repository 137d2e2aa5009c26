from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortex_tasks.errors import InferenceFailed, InvalidInput
from cortex_tasks.payloads import Series
from workers.adapters.base import LoadContext
from workers.child_protocol import (
    Channel,
    context_from_wire,
    context_to_wire,
    encode,
    inputs_from_wire,
    inputs_to_wire,
    outcome_from_wire,
    outcome_to_wire,
)

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    one, other = map(Channel, socket.socketpair())
    yield one, other
    one.close()
    other.close()


def round_trip(message: Any) -> Any:
    one, other = map(Channel, socket.socketpair())
    sender = threading.Thread(target=one.send, args=(message,))
    sender.start()
    try:
        return other.receive(10)
    finally:
        sender.join()
        one.close()
        other.close()


@given(VALUES)
def test_what_is_sent_is_what_arrives(message: Any) -> None:
    assert round_trip(message) == message


def test_bytes_larger_than_any_buffer_arrive_whole() -> None:
    message = {"a": bytes(range(256)) * 40_000, "b": [b"", b"\0"], "c": "\ud800 lone"}
    assert round_trip(message) == message


@pytest.mark.parametrize("message", [object(), {"a": {1, 2}}, {(1, 2): 3}])
def test_what_json_cannot_say_is_refused_before_anything_is_sent(message: Any) -> None:
    with pytest.raises(TypeError):
        encode(message)


def test_messages_keep_apart(ends: tuple[Channel, Channel]) -> None:
    one, other = ends
    one.send([1])
    one.send({"two": b"2"})
    assert [other.receive(5), other.receive(5)] == [[1], {"two": b"2"}]


def test_silence_is_a_timeout_and_absence_the_end(ends: tuple[Channel, Channel]) -> None:
    one, other = ends
    with pytest.raises(TimeoutError):
        other.receive(0.01)
    one.finish()
    with pytest.raises(EOFError):
        other.receive(5)
    other.send("an answer may still come")
    assert one.receive(5) == "an answer may still come"
    other.close()
    with pytest.raises(EOFError):
        one.send("x" * 10)
    one.finish()


def test_a_message_cut_short_is_the_end() -> None:
    raw, far = socket.socketpair()
    raw.sendall(encode({"a": b"12345"})[:-2])
    raw.close()
    with pytest.raises(EOFError):
        Channel(far).receive(5)
    far.close()


def test_contexts_inputs_and_outcomes_survive_their_wire_forms() -> None:
    context = LoadContext("a", Path("/models/a"), "ff", ("embed",), {"k": [1]}, 1, "cuda:0", "int8")
    assert context_from_wire(round_trip(context_to_wire(context))) == context
    bare = LoadContext("a", None, "", ("forecast",))
    assert context_from_wire(round_trip(context_to_wire(bare))) == bare
    series = Series(ds=("2024-01-01T00:00:00", "2024-01-02T00:00:00"), y=(0.1, 1e300))
    assert inputs_from_wire("forecast", round_trip(inputs_to_wire([series]))) == [series]
    assert inputs_from_wire("annotate", round_trip(inputs_to_wire(["a", "b"]))) == ["a", "b"]
    assert outcome_from_wire(round_trip(outcome_to_wire({"data": b"\0"}))) == {"data": b"\0"}
    error = outcome_from_wire(round_trip(outcome_to_wire(InvalidInput("no", {"at": 3}))))
    assert (type(error), str(error), error.details) == (InvalidInput, "no", {"at": 3})
    assert not isinstance(error, InferenceFailed)
