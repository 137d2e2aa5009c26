"""The quantiser: every layer that computes is rounded, a little, and no other."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from workers.engines.int8 import exact_levels, quantised

pytestmark = pytest.mark.models


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(16, 32)
        self.second = nn.Linear(32, 8, bias=False)
        self.unused = nn.Linear(8, 8)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.second(torch.relu(self.first(inputs)))
        return output


def _inputs(seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    inputs = torch.randn(200, 16)
    inputs[:, 3] *= 50  # one channel far larger than the others, as in a transformer
    return inputs


def test_it_rounds_what_was_calibrated_and_nothing_else() -> None:
    model = Model().eval()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.inference_mode():
        result = quantised(model, lambda: model(_inputs(1)))
        expected, got = model(_inputs(2)), result(_inputs(2))
    assert [type(module) is nn.Linear for module in (result.first, result.second, result.unused)] == [
        False,
        False,
        True,
    ]
    assert not torch.equal(got, expected)
    assert torch.nn.functional.cosine_similarity(got, expected).mean() > 0.999
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_channel_that_is_always_zero_does_no_harm() -> None:
    model = Model().eval()
    inputs = torch.zeros(4, 16)
    with torch.inference_mode():
        result = quantised(model, lambda: model(inputs))
        assert torch.isfinite(result(inputs)).all()
        assert torch.isfinite(result(_inputs(1))).all()


@pytest.mark.parametrize(
    ("flags", "levels"),
    [
        ("fpu sse2 avx avx2 fma", 63),
        ("avx2 avx512f avx512bw", 63),
        ("avx2 avx512f avx512_vnni", 127),
        ("avx2 avx_vnni", 127),
        ("fp asimd asimddp i8mm", 127),
        ("", 127),
    ],
)
def test_weights_are_as_large_as_the_cpu_multiplies_exactly(flags: str, levels: int) -> None:
    assert exact_levels(flags.split()) == levels
    # Two products of an unsigned byte are added in 16 bits where the CPU has nothing wider.
    assert levels == 127 or 2 * 255 * levels < 2**15


@pytest.mark.parametrize("levels", [63, 127])
def test_no_weight_is_larger_than_the_levels(levels: int) -> None:
    model = Model().eval()
    with torch.inference_mode():
        result = quantised(model, lambda: model(_inputs(1)), levels)
        rounded = (result.first.weight / result.first.weight_scale[:, None]).round()  # type: ignore[operator, index, union-attr]
        expected, got = model(_inputs(2)), result(_inputs(2))
    assert rounded.abs().max() == levels
    assert torch.nn.functional.cosine_similarity(got, expected).mean() > 0.995
