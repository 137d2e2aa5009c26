"""Rows without padding: every text in one portion, nothing over a shape's room, every number where it belongs."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.engines.packing import LARGEST_TOKENS, Shape, fill, portions, shapes

pytestmark = pytest.mark.models  # by its package, which imports torch


@dataclass
class Text:
    ids: list[int]
    type_ids: list[int] = field(default_factory=list)


@given(st.integers(1, 512), st.data())
def test_portions_hold_every_text_once_and_within_their_shape(window: int, data: st.DataObject) -> None:
    lengths = sorted(data.draw(st.lists(st.integers(1, window), max_size=300)))
    table = shapes(window)
    at = 0
    for shape, start, stop in portions(lengths, table):
        assert shape in table
        assert start == at < stop
        assert sum(lengths[start:stop]) <= shape.tokens
        assert stop - start <= shape.items
        assert lengths[stop - 1] <= shape.longest
        at = stop
    assert at == len(lengths)


def test_a_full_batch_takes_the_largest_shape_and_its_rest_a_small_one() -> None:
    lengths = [32] * (2 * LARGEST_TOKENS // 32 + 3)
    assert [shape.tokens for shape, _, _ in portions(lengths, shapes(512))] == [LARGEST_TOKENS, LARGEST_TOKENS, 256]


@pytest.mark.parametrize(("tokens", "taken"), [(25, [256]), (300, [256, 256]), (600, [1_024]), (3_000, [4_096])])
def test_no_more_than_half_of_a_shape_is_empty(tokens: int, taken: list[int]) -> None:
    lengths = [25] * (tokens // 25)
    assert [shape.tokens for shape, _, _ in portions(lengths, shapes(512))] == taken


def test_a_text_of_the_windows_length_fits_though_it_is_long() -> None:
    table = shapes(700, largest_tokens=64)
    assert [stop - start for _, start, stop in portions([3, 700, 700], table)] == [1, 1, 1]
    with pytest.raises(ValueError, match="longer than the model's 700"):
        list(portions([701], table))


def test_few_shapes_serve_every_batch() -> None:
    assert len(shapes(512)) < 40
    assert len(set(shapes(512))) == len(shapes(512))


@given(st.lists(st.integers(1, 12), min_size=1, max_size=5))
def test_fill_writes_every_number(lengths: list[int]) -> None:
    shape = Shape(64, 12)
    rows = [Text(list(range(10 * i, 10 * i + n)), [i % 2] * n) for i, n in enumerate(lengths, 1)]
    numbers = np.full(shape.size, -7, dtype=np.int64)
    fill(rows, shape, numbers)
    assert (numbers >= 0).all()
    ids, types, places, starts = np.split(numbers, (64, 128, 192))
    used = sum(lengths)
    for index, row in enumerate(rows):
        mine = slice(starts[index], starts[index + 1])
        assert ids[mine].tolist() == row.ids
        assert types[mine].tolist() == row.type_ids
        assert places[mine].tolist() == [12 * index + position for position in range(len(row.ids))]
    assert (starts[len(rows) :] == used).all()
    assert (places[used:] == shape.items * shape.longest).all()
