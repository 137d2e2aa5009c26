"""MiniLM on a device that computes nothing: what is left is the host's part of an engine for GPUs.

Texts are tokenised, batched, packed, copied and answered as the engine for GPUs does it, by the same code; only the
vectors are arbitrary. For ``benchmarks.carry``.
"""

from __future__ import annotations

from typing import Self

import torch

from workers.adapters import LoadContext
from workers.adapters.sentence_transformers import SentenceTransformersAdapter
from workers.engines.packed import PackedEngine
from workers.engines.packed_bert import PackedBert
from workers.engines.packing import Shape, shapes
from workers.engines.staging import Immediate

__all__ = ["FreeDeviceAdapter"]


class FreeDeviceAdapter(SentenceTransformersAdapter):
    """``adapter: benchmarks.free_device:FreeDeviceAdapter``, for a model whose first module is a plain BERT."""

    @classmethod
    def load(cls, context: LoadContext) -> Self:
        adapter = super().load(context)
        bert = PackedBert(adapter._modules[0].model, torch.float32, "mean")
        table = shapes(bert.window)
        states = {shape: torch.ones(shape.items, bert.hidden) for shape in table}

        def passes(numbers: torch.Tensor, shape: Shape) -> torch.Tensor:
            return states[shape]

        adapter._run_on(PackedEngine(bert, "fp32", Immediate(), passes, table))
        return adapter
