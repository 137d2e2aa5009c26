"""Which of several sizes is the fastest: tried in turns, as the speed of a machine varies by more than they differ."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

__all__ = ["shares_of_fastest"]

#: After so many rounds a size that is slower than this share of the fastest is tried no more.
_SURE_ROUNDS: Final = 3
_HOPELESS: Final = 0.95


def shares_of_fastest(
    rate: Callable[[int, int], float],
    sizes: Sequence[int],
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[int, float]:
    """Each size's rate as a share of that of the fastest, which has 1.

    ``rate(size, turn)`` measures one; all of a turn should do the same work. Goes on for so many seconds, for one
    round of all sizes at least. Of the rounds the median counts: in a disturbed one sizes do not compare.
    """
    until_s = clock() + seconds
    rounds: list[dict[int, float]] = []
    shares = dict.fromkeys(sizes, 1.0)
    while not rounds or clock() < until_s:
        left = [size for size in sizes if len(rounds) < _SURE_ROUNDS or shares[size] >= _HOPELESS]
        rounds.append({size: rate(size, len(rounds)) for size in left})
        shares |= _shares(rounds)
    return shares


def _shares(rounds: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """Of the sizes of the last round, which all rounds have."""
    left = list(rounds[-1])
    means = [statistics.mean(each[size] for size in left) for each in rounds]
    medians = {
        size: statistics.median(each[size] / mean for each, mean in zip(rounds, means, strict=True)) for size in left
    }
    return {size: median / max(medians.values()) for size, median in medians.items()}
