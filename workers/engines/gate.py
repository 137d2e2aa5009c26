"""May a faster engine answer in the place of the exact one? Measured on texts that it was not built from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

__all__ = ["NEIGHBOURS", "Figures", "compare", "refusal"]

#: Nearest neighbours of each text whose identity is compared.
NEIGHBOURS: Final = 10


@dataclass(frozen=True, slots=True)
class Figures:
    """How near an engine's vectors are to the exact ones: 1 and 1 when they are the same."""

    mean_cosine: float
    #: The share (0..1) of each text's nearest neighbours that the engine finds as well.
    top10_overlap: float

    def __str__(self) -> str:
        return f"cos {self.mean_cosine:.4f} top10 {self.top10_overlap:.3f}"

    @classmethod
    def read(cls, facts: Any) -> Self:
        return cls(float(facts["mean_cosine"]), float(facts["top10_overlap"]))


def compare(exact: NDArray[np.float32], candidate: NDArray[np.float32]) -> Figures:
    """Vectors of the same texts, shape ``(texts, dimensions)``; at least two texts. Raises ValueError otherwise.

    A candidate with a vector that is not finite, or zero, has nothing in common with the exact one there.
    """
    if exact.shape != candidate.shape or exact.ndim != 2 or len(exact) < 2:
        raise ValueError(f"two equal sets of vectors are needed, not {exact.shape} and {candidate.shape}")
    left, right = _unit(exact), _unit(candidate)
    count = min(NEIGHBOURS, len(exact) - 1)
    pairs = zip(_nearest(left, count), _nearest(right, count), strict=True)
    common = [len(np.intersect1d(mine, theirs)) / count for mine, theirs in pairs]
    return Figures(float((left * right).sum(axis=1).mean()), float(np.mean(common)))


def refusal(figures: Figures, *, mean_cosine: float, top10_overlap: float) -> str:
    """Why figures below these limits do not pass; "" when they do."""
    problems = []
    if figures.mean_cosine < mean_cosine:
        problems.append(f"mean cosine {figures.mean_cosine:.4f} < {mean_cosine:g}")
    if figures.top10_overlap < top10_overlap:
        problems.append(f"top-10 overlap {figures.top10_overlap:.3f} < {top10_overlap:g}")
    return ", ".join(problems)


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float64]:
    usable = np.isfinite(vectors).all(axis=1, keepdims=True)
    finite = np.where(usable, vectors, 0.0).astype(np.float64)
    lengths = np.linalg.norm(finite, axis=1, keepdims=True)
    unit: NDArray[np.float64] = finite / np.where(lengths > 0, lengths, 1.0)
    return unit


def _nearest(unit: NDArray[np.float64], count: int) -> NDArray[np.intp]:
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -np.inf)
    return np.argsort(-similarity, axis=1, kind="stable")[:, :count]
