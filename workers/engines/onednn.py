"""torch's linear layers through oneDNN instead of the BLAS that torch was built with.

On CPUs where that BLAS (MKL, as a rule) does not use the widest vectors, a float32 product takes twice as long in it.
The weights stay where they are and as they are, so processes may share their pages; see docs/performance-engines.md.
"""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["OneDnnLinear", "use_onednn"]


class OneDnnLinear(nn.Linear):
    """A Linear for inference on a CPU: same parameters, same answer but for rounding, no gradients."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - as torch names it
        """``(..., in_features)`` -> ``(..., out_features)``, in the weights' type (float32 or bfloat16)."""
        if input.numel() == 0:
            return super().forward(input)
        output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, "none", [], "")
        return output


def use_onednn(model: nn.Module) -> None:
    """Make every plain Linear of a model a OneDnnLinear, in place. Does nothing where it would not work.

    That is: elsewhere than on a CPU, in other types, or in a torch without oneDNN.
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return
    for module in model.modules():
        # A subclass has a forward of its own.
        if type(module) is nn.Linear and module.weight.is_cpu and module.weight.dtype == torch.float32:
            module.__class__ = OneDnnLinear
