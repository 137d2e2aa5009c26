"""torch: runs the model's own modules, or the same sums with less around them. Every model, on every device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from workers.engines.crew import Crew
from workers.engines.lean_bert import LeanBert
from workers.engines.side_by_side import SideBySide

__all__ = ["TorchEngine"]


class TorchEngine:
    """The transformer as it was loaded, in the type of its weights."""

    name = "torch"

    def __init__(self, transformer: nn.Module, output: str, precision: str, threads: int, *, lean: bool = True) -> None:
        """``transformer`` takes a dictionary of features and returns it with the hidden states under ``output``.
        ``threads``: as many as torch computes with; what it says of that itself changes while threads start elsewhere.
        Without ``lean`` every module of it is called, for those who watch them.
        """
        self.precision = precision
        self.library = f"torch {torch.__version__}"
        self._transformer = transformer
        self._output = output
        self._lean = LeanBert.of(getattr(transformer, "model", None)) if lean else None
        self._side_by_side = SideBySide(threads, self._lean.pair_cost) if self._lean else None
        #: Threads on which ``encode`` may run at the same time; None: one thread at a time.
        self.crew: Crew | None = self._side_by_side.crew if self._side_by_side else None

    @property
    def size_bytes(self) -> int:
        """0: the weights are the model's own, which counts them."""
        return 0

    def encode(self, features: Mapping[str, Any]) -> torch.Tensor:
        if self._lean is not None and self._side_by_side is not None:
            return self._encode_parts(self._lean, self._side_by_side, features)
        # The library's module may leave more in the dictionary, for a module after it.
        states: torch.Tensor = self._transformer(features)[self._output]
        return states

    def _encode_parts(
        self, lean: LeanBert, side_by_side: SideBySide, features: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        mask = features["attention_mask"]
        lengths: list[int] = mask.sum(1).tolist()
        parts = side_by_side.parts(lengths)
        if len(parts) == 1:
            return lean(features)
        states = torch.zeros(*mask.shape, lean.hidden)

        def encode(rows: slice) -> None:
            longest = max(lengths[rows])
            states[rows, :longest] = lean(
                {name: features[name][rows, :longest] for name in lean.reads & features.keys()}
            )

        side_by_side.run(encode, parts)
        return states

    def close(self) -> None:
        """The weights are the model's own, which gives them back."""
