"""Forms of an embedding made from one vector."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortex_tasks.derived import derive, is_derived, scaled
from cortex_tasks.payloads import ClassifyParams, EmbedParams

vectors = st.lists(st.floats(-1e6, 1e6, width=32), min_size=0, max_size=20).map(
    lambda values: struct.pack(f"<{len(values)}f", *values)
)


@given(st.lists(vectors, max_size=8))
def test_a_vectors_form_does_not_depend_on_its_neighbours(packed: list[bytes]) -> None:
    assert scaled(packed) == [scaled([one])[0] for one in packed]


@given(vectors)
def test_a_scaled_vector_has_length_one_and_the_same_direction(packed: bytes) -> None:
    raw, found = np.frombuffer(packed, "<f4").astype("f8"), np.frombuffer(scaled([packed])[0], "<f4").astype("f8")
    length = np.linalg.norm(raw)
    if length > 1e-6:
        assert found == pytest.approx(raw / length, abs=1e-6)


def test_zeros_stay_zeros() -> None:
    assert scaled([bytes(16)]) == [bytes(16)]


def test_only_the_form_changes() -> None:
    value = {"data": struct.pack("<2f", 3, 4), "truncated": True}
    assert derive(value) == {"data": struct.pack("<2f", 0.6, 0.8), "truncated": True}


def test_what_is_derived() -> None:
    assert is_derived(EmbedParams(), EmbedParams(normalize=False))
    assert not is_derived(EmbedParams(truncate=True), EmbedParams())
    assert not is_derived(ClassifyParams(), ClassifyParams())
