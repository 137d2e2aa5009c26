"""Entries of the cache: what was stored, or nothing."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from cortex_tasks.cache.frame import HEADER_BYTES, opened, sealed

KEY = b"k" * 16
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8).filter(lambda n: n != "$"), inner),
    max_leaves=20,
)
vectors = st.fixed_dictionaries({"data": st.binary(max_size=64), "truncated": st.booleans()})
features = st.fixed_dictionaries({"data": st.binary(max_size=64), "shape": st.lists(st.integers(0, 9), max_size=2)})
plain = st.dictionaries(st.sampled_from(["labels", "tokens", "masks"]), json_values)
values = vectors | features | plain


@given(values)
def test_a_value_comes_back(value: dict[str, Any]) -> None:
    assert opened(KEY, sealed(KEY, value)) == value


@given(values, st.data())
def test_a_changed_byte_is_a_miss(value: dict[str, Any], data: st.DataObject) -> None:
    frame = bytearray(sealed(KEY, value))
    where = data.draw(st.integers(0, len(frame) - 1))
    frame[where] ^= data.draw(st.integers(1, 255))
    assert opened(KEY, bytes(frame)) is None


@given(values, st.data())
def test_a_torn_entry_is_a_miss(value: dict[str, Any], data: st.DataObject) -> None:
    frame = sealed(KEY, value)
    torn = frame[: data.draw(st.integers(0, len(frame) - 1))]
    assert opened(KEY, torn) is None


@given(st.binary(max_size=100), st.integers(0, 255), st.integers(0, 255))
def test_nothing_raises(noise: bytes, kind: int, flags: int) -> None:
    opened(KEY, noise)
    frame = bytearray(sealed(KEY, {"labels": "x" * 300}))
    frame[4:6] = bytes((kind, flags))
    opened(KEY, bytes(frame))


def test_an_entry_of_another_key_is_a_miss() -> None:
    assert opened(b"j" * 16, sealed(KEY, {"data": b"1234", "truncated": False})) is None


def test_an_embedding_costs_its_bytes_and_a_header() -> None:
    assert len(sealed(KEY, {"data": bytes(1536), "truncated": False})) == 1536 + HEADER_BYTES


def test_a_document_is_deflated_and_arrays_are_not() -> None:
    tokens = [{"text": f"word{n}", "start": n, "end": n + 5, "lemma": f"word{n}", "pos": "NOUN"} for n in range(50)]
    assert len(sealed(KEY, {"tokens": tokens})) * 4 < len(str(tokens))
    assert len(sealed(KEY, {"data": bytes(4000), "shape": [10, 100], "truncated": False})) > 4000
