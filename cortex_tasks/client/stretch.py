"""Chunks of a ``map`` whose inputs the cache knows in part: neighbours share one, so that what is left fills a job."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Final

from cortex_tasks.client.core import Sifted
from cortex_tasks.client.cuts import weight_of
from cortex_tasks.payloads import Result

__all__ = ["Part", "stretched"]

#: A chunk holds at most so many times its usual number of inputs.
STRETCH: Final = 16

#: Inputs, and what the cache knows of each.
Part = tuple[Sifted, Sequence[Result | None]]


def stretched(fresh: Sequence[Sifted], found: Sequence[Result | None], chunk: int, chars: float) -> Iterator[Part]:
    """Join neighbours while at most ``chunk`` inputs and ``chars`` characters of them are unknown.

    ``found``: one entry an input of ``fresh``, or none at all, when nothing is known.
    """
    if not found:
        yield from ((sifted, ()) for sifted in fresh)
        return
    at, group = 0, list[Part]()
    count, left, size = 0, 0, 0
    for sifted in fresh:
        part = found[at : at + len(sifted.values)]
        at += len(part)
        more, more_chars = _unknown(sifted, part, chars)
        if group and (left + more > chunk or count + sifted.count > STRETCH * chunk or size + more_chars > chars):
            yield _joined(group)
            group, count, left, size = [], 0, 0, 0
        group.append((sifted, part))
        count, left, size = count + sifted.count, left + more, size + more_chars
    if group:
        yield _joined(group)


def _unknown(sifted: Sifted, found: Sequence[Result | None], chars: float) -> tuple[int, int]:
    """How many inputs are not known, and their characters where those matter."""
    if chars == math.inf:
        # Not ``count``, which asks each result whether it equals None.
        return sum([item is None for item in found]), 0
    sizes = [weight_of(value) for value, item in zip(sifted.values, found, strict=True) if item is None]
    return len(sizes), sum(sizes)


def _joined(group: list[Part]) -> Part:
    """Neighbours as one."""
    if len(group) == 1:
        return group[0]
    count = 0
    values: list[Any] = []
    indexes: list[int] = []
    refused: dict[int, Any] = {}
    found: list[Result | None] = []
    for sifted, part in group:
        values += sifted.values
        indexes += [count + index for index in sifted.indexes]
        refused |= {count + index: error for index, error in sifted.refused.items()}
        found += part
        count += sifted.count
    return Sifted(count, values, indexes, refused), found
