"""Means and percentiles, rounded as they are printed."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["mean", "percentile", "rounded"]


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that ``percent`` of the values do not exceed (nearest rank). Raises ValueError without values."""
    if not values:
        raise ValueError("no values to take a percentile of")
    ranked = sorted(values)
    # The smallest rank r with r / n >= percent / 100, counted from 1.
    rank = -(-len(ranked) * percent // 100)
    return ranked[max(0, int(rank) - 1)]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def rounded(value: float) -> float:
    """Four significant digits: more would be noise."""
    return float(f"{value:.4g}")
