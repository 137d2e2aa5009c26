"""torch: runs the model's own modules. Every model runs on it, on every device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["TorchEngine"]


class TorchEngine:
    """The transformer as it was loaded, in the type of its weights."""

    name = "torch"

    def __init__(self, transformer: nn.Module, output: str, precision: str) -> None:
        """``transformer`` takes a dictionary of features and returns it with the hidden states under ``output``."""
        self.precision = precision
        self.library = f"torch {torch.__version__}"
        self._transformer = transformer
        self._output = output

    @property
    def size_bytes(self) -> int:
        """0: the weights are the model's own, which counts them."""
        return 0

    def encode(self, features: Mapping[str, Any]) -> torch.Tensor:
        states: torch.Tensor = self._transformer(dict(features))[self._output]
        return states

    def close(self) -> None:
        """The weights are the model's own, which gives them back."""
