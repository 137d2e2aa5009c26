"""The whole contract for an engine: what runs a transformer's layers, and nothing else of a model.

The adapter tokenises before it, and pools, projects and normalises after it, in the same way for every engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

__all__ = ["Engine"]


class Engine(Protocol):
    """Used by one thread at a time."""

    #: As queues.yaml, or the card of a worker with a GPU, names it: torch, openvino, onnx; cuda.
    name: str
    #: The numeric class it computes in: fp32, bf16, fp16 or int8.
    precision: str
    #: What computes and in which version, for the model's revision, e.g. ``"openvino 2026.4.1"``.
    library: str

    @property
    def size_bytes(self) -> int:
        """Memory that the weights take, in bytes; 0 once closed."""

    def encode(self, features: Mapping[str, Any]) -> torch.Tensor:
        """The hidden states of padded rows: float, shape ``(rows, longest, hidden)``, its own memory.

        ``features`` holds the tokens as ``collate`` makes them (int64, shape ``(rows, longest)``), padded to the
        right; states at padding are arbitrary.
        """

    def close(self) -> None:
        """Give the memory back. May be repeated."""
