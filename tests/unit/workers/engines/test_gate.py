"""The gate's figures against counting by hand, and its decisions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.engines.gate import Figures, compare, refusal


def _vectors(count: int = 40, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 16)).astype(np.float32)


def test_equal_vectors_have_everything_in_common() -> None:
    vectors = _vectors()
    figures = compare(vectors, vectors)
    assert figures.mean_cosine == pytest.approx(1.0)
    assert figures.top10_overlap == 1.0


@given(st.integers(2, 30), st.floats(0.1, 100))
def test_length_does_not_matter_and_every_figure_lies_in_its_range(count: int, scale: float) -> None:
    left, right = _vectors(count), _vectors(count, seed=2)
    figures = compare(left, right)
    scaled = compare(left, (right * scale).astype(np.float32))
    assert scaled.mean_cosine == pytest.approx(figures.mean_cosine, abs=1e-5)
    assert -1.0 <= figures.mean_cosine <= 1.0
    assert 0.0 <= figures.top10_overlap <= 1.0


def test_the_overlap_is_that_of_counted_neighbours() -> None:
    left, right = _vectors(30), _vectors(30) + 0.5 * _vectors(30, seed=3)
    shares = []
    for row in range(30):
        near = []
        for vectors in (left, right):
            unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
            scores = {other: float(unit[row] @ unit[other]) for other in range(30) if other != row}
            near.append(set(sorted(scores, key=lambda other: -scores[other])[:10]))
        shares.append(len(near[0] & near[1]) / 10)
    assert compare(left, right).top10_overlap == pytest.approx(np.mean(shares))


def test_with_few_texts_all_others_are_neighbours() -> None:
    assert compare(_vectors(3), _vectors(3, seed=2)).top10_overlap == 1.0


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_a_vector_that_is_none_counts_as_unlike(bad: float) -> None:
    exact, candidate = _vectors(4), _vectors(4)
    candidate[1] = bad
    assert compare(exact, candidate).mean_cosine == pytest.approx(0.75)


def test_it_refuses_sets_that_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="two equal sets"):
        compare(_vectors(3), _vectors(4))
    with pytest.raises(ValueError, match="two equal sets"):
        compare(_vectors(1), _vectors(1))


@pytest.mark.parametrize(
    ("figures", "reason"),
    [
        (Figures(0.995, 0.95), ""),
        (Figures(0.9949, 0.95), "mean cosine 0.9949 < 0.995"),
        (Figures(0.999, 0.949), "top-10 overlap 0.949 < 0.95"),
        (Figures(0.9, 0.5), "mean cosine 0.9000 < 0.995, top-10 overlap 0.500 < 0.95"),
    ],
)
def test_it_says_which_limit_is_missed(figures: Figures, reason: str) -> None:
    assert refusal(figures, mean_cosine=0.995, top10_overlap=0.95) == reason
