"""Which of the awaited jobs a poll looks for, when there are more than one look takes.

Answers are announced, and a poll finds only what no announcement told of. Looking for thousands of jobs that have not
even begun would cost client and Redis as much as fetching their answers. So a look takes the jobs that wait longest,
which end first where nothing is announced, and goes through the others in turns.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Final

__all__ = ["LOOK_KEYS", "Round"]

#: Jobs of one look.
LOOK_KEYS: Final = 500


class Round:
    """Remembers how far the turns have come."""

    def __init__(self) -> None:
        self._at = 0

    def pick(self, jobs: Iterable[str], count: int) -> list[str]:
        """At most LOOK_KEYS of ``jobs``, ``count`` of them, longest awaited first."""
        half = LOOK_KEYS // 2
        if count <= LOOK_KEYS:
            self._at = 0
            return list(jobs)
        if not half <= self._at < count:
            self._at = half
        order = iter(jobs)
        longest = list(islice(order, half))
        turn = list(islice(order, self._at - half, self._at))
        self._at += half
        return longest + turn
