"""oneDNN's linear layers answer as torch's own, in the same parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from workers.engines.onednn import OneDnnLinear, use_onednn

pytestmark = pytest.mark.models


class Doubled(nn.Linear):
    """A Linear with a forward of its own."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - as torch names it
        return 2 * super().forward(input)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 24), (3, 7, 24), (5, 24), (0, 24), (2, 0, 24)])
def test_it_answers_as_torchs_linear_in_every_shape(bias: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(24, 40, bias=bias)).requires_grad_(False)
    inputs = torch.randn(shape)
    expected = model(inputs)
    use_onednn(model)
    assert type(model[0]) is OneDnnLinear
    torch.testing.assert_close(model(inputs), expected, atol=1e-5, rtol=1e-5)


def test_it_reads_inputs_that_are_not_contiguous() -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(8, 8)).requires_grad_(False)
    inputs = torch.randn(8, 5, 3).transpose(0, 2)
    expected = model(inputs)
    use_onednn(model)
    torch.testing.assert_close(model(inputs), expected, atol=1e-5, rtol=1e-5)


def test_the_parameters_stay_where_they_are() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    before = [parameter.data_ptr() for parameter in model.parameters()]
    use_onednn(model)
    assert [parameter.data_ptr() for parameter in model.parameters()] == before


def test_other_kinds_and_types_of_linear_are_left_alone() -> None:
    model = nn.Sequential(Doubled(4, 4), nn.Linear(4, 4, dtype=torch.bfloat16), nn.Linear(4, 4, device="meta"))
    use_onednn(model)
    assert [type(module) for module in model] == [Doubled, nn.Linear, nn.Linear]
