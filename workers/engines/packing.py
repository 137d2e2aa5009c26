"""Texts of unequal length as rows without padding, in a few fixed shapes: what a GPU wants. Pure, numpy only.

A GPU replays a recorded pass (a CUDA graph) far faster than it is told one, but a recording has one shape. So there is
a small table of shapes, texts are cut into portions that each fill one of them, and only the end of a portion, not of
every text, is padding.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Final, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["LARGEST_TOKENS", "Portion", "Row", "Shape", "fill", "portions", "shapes"]

#: Tokens of a shape. More do not make a GPU faster, and while one portion computes the next is packed.
_TOKENS: Final = (256, 1_024, 4_096, 8_192, 16_384)
LARGEST_TOKENS: Final = _TOKENS[-1]
_SHORTEST_LONGEST: Final = 16


class Row(Protocol):
    """One text as the model reads it."""

    @property
    def ids(self) -> Sequence[int]: ...

    @property
    def type_ids(self) -> Sequence[int]: ...


class Shape(NamedTuple):
    """What one recorded pass computes: room for so many tokens of so many texts, none longer than ``longest``."""

    tokens: int
    longest: int

    @property
    def items(self) -> int:
        """Texts that fit: with texts of one portion about equally long, twice as many as are ``longest``."""
        return max(1, 2 * self.tokens // self.longest)

    @property
    def size(self) -> int:
        """Numbers that describe a portion of this shape: see ``fill``."""
        return 3 * self.tokens + self.items + 1


class Portion(NamedTuple):
    """Texts for one pass: ``order[start:stop]`` of a batch."""

    shape: Shape
    start: int
    stop: int


def shapes(window: int, largest_tokens: int = LARGEST_TOKENS) -> list[Shape]:
    """All shapes for a model that reads up to ``window`` tokens of a text."""
    lengths = []
    longest = _SHORTEST_LONGEST
    while longest < window:
        lengths.append(longest)
        longest *= 2
    lengths.append(window)
    # The largest always: a text of the window's length must fit somewhere.
    sizes = [tokens for tokens in _TOKENS if tokens < largest_tokens] + [max(largest_tokens, window)]
    return [Shape(tokens, longest) for tokens in sizes for longest in lengths if longest <= tokens]


def portions(lengths: Sequence[int], table: Sequence[Shape]) -> Iterator[Portion]:
    """Cuts texts of these lengths, shortest first, into portions: the largest shape while there is enough for it.

    Raises ValueError for a text that is longer than every shape.
    """
    sizes = sorted({shape.tokens for shape in table})
    ends = sorted({shape.longest for shape in table})
    left, start = sum(lengths), 0
    while start < len(lengths):
        if lengths[start] > ends[-1]:
            raise ValueError(f"a text of {lengths[start]} tokens is longer than the model's {ends[-1]}")
        portion, tokens = _next(lengths, start, _room(sizes, left), sizes, ends)
        yield portion
        left, start = left - tokens, portion.stop


def _room(sizes: Sequence[int], tokens: int) -> int:
    """The smallest size that holds so many tokens; the one below when that would leave more than half of it empty."""
    at = min(bisect_left(sizes, tokens), len(sizes) - 1)
    return sizes[at - 1] if at and 2 * tokens < sizes[at] else sizes[at]


def _next(
    lengths: Sequence[int], start: int, room: int, sizes: Sequence[int], ends: Sequence[int]
) -> tuple[Portion, int]:
    """As many texts from ``start`` on as fit into ``room``, and their tokens."""
    # A long text needs more room than the rest of a batch would.
    room = max(room, sizes[bisect_left(sizes, ends[bisect_left(ends, lengths[start])])])
    stop, tokens, shape = start, 0, Shape(room, ends[-1])
    while stop < len(lengths):
        length = lengths[stop]
        if tokens + length > room or length > ends[-1]:
            break
        wider = Shape(room, ends[bisect_left(ends, length)])
        if wider.longest > room or stop - start >= wider.items:
            break
        stop, tokens, shape = stop + 1, tokens + length, wider
    return Portion(shape, start, stop), tokens


def fill(rows: Sequence[Row], shape: Shape, numbers: NDArray[np.int64]) -> None:
    """Describe the rows of a portion. ``numbers``: int64, shape ``(shape.size,)``, written in full.

    It holds, one after the other: token ids, segment ids and places, ``tokens`` of each, and where each text begins,
    ``items + 1`` of them. A place is ``text x longest + position``. Behind the last text come tokens of no text, whose
    place is ``items x longest``; texts that do not exist begin where the last one ends.
    """
    tokens, items = shape.tokens, shape.items
    lengths = np.fromiter((len(row.ids) for row in rows), dtype=np.int64, count=len(rows))
    used = int(lengths.sum())
    ids, types, places, starts = np.split(numbers, (tokens, 2 * tokens, 3 * tokens))
    ids[:used] = np.fromiter(chain.from_iterable(row.ids for row in rows), dtype=np.int64, count=used)
    types[:used] = np.fromiter(chain.from_iterable(row.type_ids for row in rows), dtype=np.int64, count=used)
    starts[0] = 0
    np.cumsum(lengths, out=starts[1 : len(rows) + 1])
    starts[len(rows) + 1 :] = used
    # The position of a token is how far behind its text's beginning it stands.
    shift = np.arange(len(rows)) * shape.longest - starts[: len(rows)]
    np.add(np.arange(used), np.repeat(shift, lengths), out=places[:used])
    ids[used:], types[used:], places[used:] = 0, 0, items * shape.longest
