"""Texts to embed: true sentences, alone or several together, each text unlike all others, the same on every run."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import count
from typing import Final

from cortex_tasks.demo.material import sentences

__all__ = ["short", "varied"]

#: Sentences of each text of a block of 20: mostly one, seldom a paragraph.
_MIX: Final = (1,) * 12 + (2,) * 5 + (4,) * 2 + (8,)


def varied(seed: int) -> Iterator[str]:
    """Texts of about 15 to 150 tokens without end. Every block of 20 has the same mix, so runs compare."""
    source = sentences()
    choose = random.Random(seed)
    for block in count():
        mix = list(_MIX)
        choose.shuffle(mix)
        for place, length in enumerate(mix):
            # The number makes the text unique, so that no cache can know its answer.
            yield f"Entry {seed}-{block * len(_MIX) + place}: {' '.join(choose.sample(source, length))}"


def short(seed: int) -> Iterator[str]:
    """Single sentences without end, made with next to no effort: for clients whose own CPU time is measured.

    Seeds that follow each other begin with sentences that do.
    """
    source = sentences()
    for number in count():
        yield f"Entry {seed}-{number}: {source[(seed + number) % len(source)]}"
