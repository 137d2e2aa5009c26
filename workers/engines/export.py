"""A torch transformer as an ONNX file, which the other engines read."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

__all__ = ["OUTPUT", "to_onnx"]

#: Name of the file's only output: hidden states, float32, shape ``(rows, longest, hidden)``.
OUTPUT: Final = "states"
#: The first with everything that an int8 model needs (a scale a channel), and with room for attention masks.
_OPSET: Final = 17


class _Positional(nn.Module):
    """The transformer with its token features as positional arguments, as tracing wants them."""

    def __init__(self, transformer: nn.Module, output: str, names: Sequence[str], constants: Mapping[str, Any]) -> None:
        super().__init__()
        self._transformer = transformer
        self._output = output
        self._names = names
        self._constants = constants

    def forward(self, *tokens: torch.Tensor) -> torch.Tensor:
        features = dict(zip(self._names, tokens, strict=True)) | dict(self._constants)
        states: torch.Tensor = self._transformer(features)[self._output]
        return states


def to_onnx(
    transformer: nn.Module, output: str, example: Mapping[str, torch.Tensor], constants: Mapping[str, Any], file: Path
) -> None:
    """Trace and write. ``example``: token features of two rows or more, of unequal length, so that masks are used.

    Raises what torch raises (RuntimeError, as a rule) for a model that cannot be traced.
    """
    names = list(example)
    # In eval mode as a whole: the exporter restores the mode of what it is given, down to the last dropout.
    model = _Positional(copy.deepcopy(transformer), output, names, constants).eval()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.__class__ = nn.Linear  # oneDNN's operators are torch's alone
    rows = {name: {0: "rows", 1: "longest"} for name in (*names, OUTPUT)}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer: the gate compares the answers
        torch.onnx.export(
            model,
            tuple(example.values()),
            str(file),
            dynamo=False,
            input_names=names,
            output_names=[OUTPUT],
            dynamic_axes=rows,
            opset_version=_OPSET,
        )
