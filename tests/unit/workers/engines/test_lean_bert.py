"""The lean encoder against the library's own BertModel, with and without padding."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel

from workers.engines import lean_bert
from workers.engines.lean_bert import LeanBert, alike
from workers.engines.onednn import use_onednn

pytestmark = pytest.mark.models


def _bert(**changes: Any) -> BertModel:
    torch.manual_seed(7)
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=40, initializer_range=0.3, **changes,
    )  # fmt: skip
    return BertModel(config).eval().requires_grad_(False)


def _features(lengths: list[int], *, types: bool = True) -> dict[str, torch.Tensor]:
    torch.manual_seed(len(lengths))
    shape = (len(lengths), max(lengths))
    mask = (torch.arange(shape[1])[None] < torch.tensor(lengths)[:, None]).long()
    features = {"input_ids": torch.randint(0, 50, shape), "attention_mask": mask}
    return features | ({"token_type_ids": torch.randint(0, 2, shape)} if types else {})


@pytest.mark.parametrize("types", [True, False])
@pytest.mark.parametrize("lengths", [[1], [40], [7, 7, 7], [1, 40], [3, 9, 5, 9, 1], [1, 1, 2, 5, 5, 20, 21, 40]])
@pytest.mark.parametrize("waste", [0, 30 * 32, 10**9])
def test_it_computes_what_the_library_does(
    lengths: list[int], types: bool, waste: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one group, in some, and in one for each change of length."""
    monkeypatch.setattr(lean_bert, "_WASTE", waste)
    model, features = _bert(), _features(lengths, types=types)
    mask = features["attention_mask"][..., None]
    with torch.inference_mode():
        expected = model(**features).last_hidden_state * mask
        use_onednn(model)
        lean = LeanBert.of(model)
        assert lean is not None
        states = lean(features)
    torch.testing.assert_close(states, expected, atol=2e-5, rtol=1e-5)


@given(st.lists(st.integers(1, 512), min_size=1, max_size=80), st.integers(0, 10**6))
def test_groups_hold_every_row_once_and_waste_no_more_than_allowed(lengths: list[int], waste: int) -> None:
    groups = alike(lengths, waste)
    assert [length for group in groups for length in group] == lengths
    for group in groups:
        assert len(group) * max(group) ** 2 - sum(length * length for length in group) <= waste
    for group, after in pairwise(groups):
        larger = [*group, after[0]]
        assert len(larger) * max(larger) ** 2 - sum(length * length for length in larger) > waste


def test_it_copies_no_weights() -> None:
    model = _bert()
    use_onednn(model)
    lean = LeanBert.of(model)
    assert lean is not None
    before = lean(_features([4]))
    model.encoder.layer[0].output.dense.weight.zero_()
    assert not torch.equal(lean(_features([4])), before)


def test_other_models_are_left_to_the_library() -> None:
    def of(model: Any) -> LeanBert | None:
        use_onednn(model)
        return LeanBert.of(model)

    distilbert = DistilBertModel(DistilBertConfig(vocab_size=50, dim=32, hidden_dim=64, n_layers=1, n_heads=2)).eval()
    assert of(distilbert) is None
    assert of(_bert(hidden_act="relu")) is None
    assert of(_bert(is_decoder=True)) is None
    assert of(_bert(output_hidden_states=True)) is None
    assert of(_bert().to(torch.bfloat16)) is None
    assert of(_bert().train()) is None
    assert LeanBert.of(None) is None
