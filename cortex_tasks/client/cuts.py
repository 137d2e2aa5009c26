"""How the inputs of a call are cut into jobs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

__all__ = ["JOB_CHARS", "JOB_INPUTS", "cut", "weight_of"]

#: A call with many inputs is cut into jobs of about so many, or so many characters (about four make a token): enough
#: to spare overhead, few enough that several workers share the call and others are not kept waiting.
JOB_INPUTS: Final = 256
JOB_CHARS: Final = 65_536
#: What a point of a series weighs beside a character.
_POINT_CHARS: Final = 24


def weight_of(value: Any) -> int:
    """A checked input's size in characters, or what comes close."""
    return len(value) if isinstance(value, str) else _POINT_CHARS * len(value.y)


def cut(values: Sequence[Any], most: int, chars: float) -> Iterator[slice]:
    """Slices of at most ``most`` checked inputs and, but for a single one that is larger, ``chars`` characters."""
    if len(values) == 1:
        yield slice(0, 1)
        return
    start, size = 0, 0
    for index, value in enumerate(values):
        weight = weight_of(value)
        if index > start and (index - start == most or size + weight > chars):
            yield slice(start, index)
            start, size = index, 0
        size += weight
    if start < len(values):
        yield slice(start, len(values))
