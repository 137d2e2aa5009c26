"""The forms of an embedding, made from the one vector that is computed and stored.

Client and worker use this one function, so that an answer is the same bytes whether it was computed or known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from cortex_tasks.payloads import EmbedParams, Params

__all__ = ["derive", "is_derived", "scaled"]

#: As torch's ``normalize``: a vector of zeros stays what it is.
_SMALLEST: Final = 1e-12


def is_derived(params: Params, stored: Params) -> bool:
    """Whether answers to ``params`` are made from what is stored for ``stored``."""
    return isinstance(params, EmbedParams) and isinstance(stored, EmbedParams) and params.normalize != stored.normalize


def derive(value: Mapping[str, Any]) -> dict[str, Any]:
    """The wire value of an embedding (``data``: float32 little-endian) scaled to length 1."""
    return {**value, "data": scaled([value["data"]])[0]}


def scaled(vectors: Sequence[bytes]) -> list[bytes]:
    """Packed float32 vectors, each scaled to length 1. A vector's result does not depend on its neighbours."""
    import numpy as np

    found: list[bytes] = []
    for first, last in _runs(vectors):
        rows = np.frombuffer(b"".join(vectors[first:last]), dtype="<f4").reshape(last - first, -1)
        lengths = np.sqrt(np.add.reduce(rows * rows, axis=1, keepdims=True))
        packed = (rows / np.maximum(lengths, _SMALLEST)).astype("<f4", copy=False).tobytes()
        width = len(vectors[first])
        found += [packed[start : start + width] for start in range(0, len(packed), width)] if width else [b""]
    return found


def _runs(vectors: Sequence[bytes]) -> list[tuple[int, int]]:
    """Where neighbours of one length begin and end; mostly all have one length. An empty one stands alone."""
    runs: list[tuple[int, int]] = []
    first = 0
    for index in range(1, len(vectors) + 1):
        if index == len(vectors) or len(vectors[index]) != len(vectors[first]) or not vectors[first]:
            runs.append((first, index))
            first = index
    return runs
