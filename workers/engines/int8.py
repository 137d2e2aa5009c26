"""A transformer whose Linear layers compute in int8, from what calibration texts show of their inputs.

Weights: symmetric int8, a scale an output channel; seven bits of it where the CPU adds two products in sixteen bits
(``exact_levels``). Activations: unsigned int8, one scale a layer. The inputs of a
transformer's layers have a few channels that are far larger than the rest and would take the whole scale; as in
SmoothQuant (Xiao et al., 2023) a part of each channel's size moves into the weights first.

The result is a torch model that *simulates* the rounding; exported to ONNX it holds QuantizeLinear/DequantizeLinear
pairs, which OpenVINO and ONNX Runtime compute as real int8.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Collection, Iterator
from typing import Any, Final

import torch
from torch import nn

__all__ = ["QUANTISER_VERSION", "exact_levels", "quantised"]

#: Bump when the figures of a quantised model change: engines built by another version are built again.
QUANTISER_VERSION: Final = "2"
#: The share (0..1) of a channel's size that moves into the weights, by the weights' levels: measured on MiniLM, see
#: docs.
_SMOOTHING: Final = {127: 0.8, 63: 0.7}
_LEAST: Final = 1e-5

_Range = tuple[torch.Tensor, torch.Tensor]


def exact_levels(flags: Collection[str]) -> int:
    """The largest weight with which a CPU's int8 products are exact. ``flags``: what /proc/cpuinfo says it can do.

    x86 without VNNI multiplies unsigned by signed bytes and adds pairs of products in 16 bits, cutting off what is
    larger: 2 x 255 x 127 is, 2 x 255 x 63 is not.
    """
    saturates = "avx2" in flags and not any("vnni" in flag for flag in flags)
    return 63 if saturates else 127


def quantised(transformer: nn.Module, calibrate: Callable[[], Any], levels: int = 127) -> nn.Module:
    """A copy in which each Linear that ``calibrate`` passes data through (running the original) is an int8 one.

    ``levels``: the largest weight.
    """
    with _observed(transformer) as ranges:
        calibrate()
    result = copy.deepcopy(transformer)
    for name, (low, high) in ranges.items():
        parent, _, leaf = name.rpartition(".")
        setattr(result.get_submodule(parent), leaf, _Int8Linear(result.get_submodule(name), low, high, levels))
    return result


@contextlib.contextmanager
def _observed(model: nn.Module) -> Iterator[dict[str, _Range]]:
    """While it is open, collects the least and greatest input of each Linear, a channel each."""
    ranges: dict[str, _Range] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            rows = inputs[0].detach().float().reshape(-1, inputs[0].shape[-1])
            low, high = rows.amin(0), rows.amax(0)
            if name in ranges:
                low, high = torch.minimum(low, ranges[name][0]), torch.maximum(high, ranges[name][1])
            ranges[name] = (low, high)

        return hook

    hooks = [
        module.register_forward_pre_hook(watch(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        yield ranges
    finally:
        for hook in hooks:
            hook.remove()


class _Int8Linear(nn.Module):
    """A Linear that rounds its weights and its input (float32 in and out) as an int8 one does."""

    shrink: torch.Tensor
    weight: torch.Tensor
    weight_scale: torch.Tensor
    weight_zero: torch.Tensor

    def __init__(self, linear: Any, low: torch.Tensor, high: torch.Tensor, levels: int) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        size = torch.maximum(low.abs(), high.abs()).clamp_min(_LEAST)
        share = _SMOOTHING[levels]
        factor = size**share / weight.abs().amax(0).clamp_min(_LEAST) ** (1 - share)
        factor = factor.clamp_min(_LEAST)
        bottom = min(float((low / factor).min()), 0.0)
        top = max(float((high / factor).max()), bottom + _LEAST, 0.0)
        self._scale = (top - bottom) / 255
        self._zero = round(-bottom / self._scale)
        self.bias = linear.bias
        self.register_buffer("shrink", 1 / factor)
        self.register_buffer("weight", weight * factor)
        self.register_buffer("weight_scale", ((weight * factor).abs().amax(1) / levels).clamp_min(1e-12))
        self.register_buffer("weight_zero", torch.zeros(len(weight), dtype=torch.int32))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        rounded = torch.fake_quantize_per_tensor_affine(inputs * self.shrink, self._scale, self._zero, 0, 255)
        weight = torch.fake_quantize_per_channel_affine(self.weight, self.weight_scale, self.weight_zero, 0, -128, 127)
        return nn.functional.linear(rounded, weight, self.bias)
