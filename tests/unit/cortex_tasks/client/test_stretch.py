"""Chunks of a map whose inputs are known in part."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from cortex_tasks.client.core import Sifted
from cortex_tasks.client.stretch import STRETCH, stretched
from cortex_tasks.errors import InvalidInput

#: Of each input: known, unknown, or refused.
inputs = st.lists(st.lists(st.sampled_from(["known", "new", "bad"]), min_size=1, max_size=4), max_size=30)
KNOWN: Any = object()


def sift(kinds: list[str], first: int) -> Sifted:
    good = [index for index, kind in enumerate(kinds) if kind != "bad"]
    refused = {index: InvalidInput(f"{first + index}") for index, kind in enumerate(kinds) if kind == "bad"}
    return Sifted(len(kinds), [f"text {first + index}" for index in good], good, refused)


@given(inputs, st.integers(4, 8), st.sampled_from([math.inf, 30.0]))
def test_nothing_is_lost_moved_or_too_much(pieces: list[list[str]], chunk: int, chars: float) -> None:
    flat = [kind for piece in pieces for kind in piece]
    fresh, first = [], 0
    for piece in pieces:
        fresh.append(sift(piece, first))
        first += len(piece)
    found = [KNOWN if kind == "known" else None for kind in flat if kind != "bad"]
    at = 0
    for sifted, known in stretched(fresh, found, chunk, chars):
        for index, value, item in zip(sifted.indexes, sifted.values, known or [None] * len(sifted.values), strict=True):
            assert value == f"text {at + index}"
            assert (item is KNOWN) == (flat[at + index] == "known")
        assert all(str(error) == str(at + index) for index, error in sifted.refused.items())
        assert list(known).count(None) <= chunk
        assert sifted.count <= STRETCH * chunk
        at += sifted.count
    assert at == len(flat)


def test_one_tenth_of_a_thousand_travels_in_full_jobs() -> None:
    fresh = [sift(["new" if n % 10 == 0 else "known" for n in range(first, first + 64)], first)
             for first in range(0, 1024, 64)]  # fmt: skip
    found = [None if n % 10 == 0 else KNOWN for n in range(1024)]
    sizes = [known.count(None) for _, known in stretched(fresh, found, 64, math.inf)]
    assert sum(sizes) == 103
    assert len(sizes) == 2


def test_where_nothing_is_known_chunks_stay_as_they_are() -> None:
    fresh = [sift(["new"] * 3, 0), sift(["new"], 3)]
    assert [sifted for sifted, _ in stretched(fresh, [], 64, math.inf)] == fresh
