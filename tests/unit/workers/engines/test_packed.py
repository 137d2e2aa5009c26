"""The packed encoder against the library's own BertModel; portions, order and fall-backs of the engine."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel

from tests.support.slow_queue import SlowQueue
from workers.engines.packed import PackedEngine, Way, first_that_passes
from workers.engines.packed_bert import PackedBert, Pooling, by_padding
from workers.engines.packing import Shape, shapes
from workers.engines.staging import Immediate

pytestmark = pytest.mark.models

WINDOW = 40
LENGTHS = [1, 40, 3, 9, 5, 9, 1, 17, 40, 40, 2] * 3


@dataclass
class Text:
    ids: list[int]
    type_ids: list[int]


def _bert(**changes: Any) -> BertModel:
    torch.manual_seed(7)
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=WINDOW, initializer_range=0.3, **changes,
    )  # fmt: skip
    return BertModel(config).eval().requires_grad_(False)


def _texts(lengths: list[int]) -> list[Text]:
    torch.manual_seed(3)
    return [Text(torch.randint(0, 50, (n,)).tolist(), torch.randint(0, 2, (n,)).tolist()) for n in lengths]


def _expected(model: BertModel, texts: list[Text], pooling: Pooling) -> NDArray[np.float32]:
    """Each text by itself, through the library."""
    rows = []
    for text in texts:
        ids, types = torch.tensor([text.ids]), torch.tensor([text.type_ids])
        states = model(input_ids=ids, token_type_ids=types).last_hidden_state[0]
        rows.append((states.mean(0) if pooling == "mean" else states[0]).numpy())
    return np.stack(rows)


def _engine(
    model: BertModel, pooling: Pooling = "mean", queue: Any = None, dtype: torch.dtype = torch.float32
) -> PackedEngine:
    """On the CPU, in shapes so small that a few texts need several."""
    bert = PackedBert(model, dtype, pooling)
    queue = queue or Immediate()

    def passes(numbers: torch.Tensor, shape: Shape) -> torch.Tensor:
        return bert(numbers, shape, by_padding)

    return PackedEngine(bert, "fp32", queue, passes, shapes(WINDOW, largest_tokens=64))


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("lengths", [[1], [40], [7, 7, 7], LENGTHS, LENGTHS[::-1]])
def test_it_computes_what_the_library_does_for_each_text(pooling: Pooling, lengths: list[int]) -> None:
    model, texts = _bert(), _texts(lengths)
    vectors = _engine(model, pooling).embed(texts, dimensions=None, normalized=False)
    np.testing.assert_allclose(vectors, _expected(model, texts, pooling), atol=2e-5, rtol=1e-5)


def test_a_text_answers_alike_with_any_neighbours() -> None:
    engine, texts = _engine(_bert()), _texts(LENGTHS)
    together = engine.embed(texts, dimensions=None, normalized=True)
    alone = np.concatenate([engine.embed([text], dimensions=None, normalized=True) for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_vectors_are_cut_before_they_are_scaled() -> None:
    engine, texts = _engine(_bert()), _texts([3, 9])
    raw = engine.embed(texts, dimensions=None, normalized=False)
    cut = engine.embed(texts, dimensions=8, normalized=True)
    np.testing.assert_allclose(cut, raw[:, :8] / np.linalg.norm(raw[:, :8], axis=1, keepdims=True), atol=1e-6)


def test_answers_keep_their_memory() -> None:
    engine = _engine(_bert())
    first = engine.embed(_texts([5]), dimensions=None, normalized=True)
    before = first.copy()
    engine.embed(_texts([9, 5, 7]), dimensions=None, normalized=True)
    np.testing.assert_array_equal(first, before)


@pytest.mark.parametrize("rubbish", [float("nan"), float("inf"), 1e30])
def test_what_an_attention_leaves_at_tokens_of_no_text_is_never_read(rubbish: float) -> None:
    model, texts = _bert(), _texts([3, 9, 5])
    bert = PackedBert(model, torch.float32, "mean")

    def attention(query: Any, key: Any, value: Any, where: Any) -> torch.Tensor:
        context = by_padding(query, key, value, where)
        nowhere = where.places == where.shape.items * where.shape.longest
        return context.masked_fill(nowhere[:, None, None], rubbish)

    def passes(numbers: torch.Tensor, shape: Shape) -> torch.Tensor:
        return bert(numbers, shape, attention)

    engine = PackedEngine(bert, "fp32", Immediate(), passes, shapes(WINDOW, largest_tokens=64))
    vectors = engine.embed(texts, dimensions=None, normalized=False)
    np.testing.assert_allclose(vectors, _expected(model, texts, "mean"), atol=2e-5, rtol=1e-5)


def test_a_device_that_lags_behind_answers_the_same_in_one_copy() -> None:
    model, texts = _bert(), _texts(LENGTHS)
    expected = _engine(model).embed(texts, dimensions=None, normalized=True)
    queue, bert = SlowQueue(), PackedBert(model, torch.float32, "mean")

    def passes(numbers: torch.Tensor, shape: Shape) -> torch.Tensor:
        # Eager torch cannot be late: the device catches up with the copies that this pass reads.
        queue.catch_up(len(queue.given))
        return bert(numbers, shape, by_padding)

    engine = PackedEngine(bert, "fp32", queue, passes, shapes(WINDOW, largest_tokens=64))
    np.testing.assert_allclose(engine.embed(texts, dimensions=None, normalized=True), expected, atol=1e-6)
    assert queue.downloads == 1


def test_in_16_bits_it_stays_near() -> None:
    model, texts = _bert(), _texts(LENGTHS)
    exact = _engine(model).embed(texts, dimensions=None, normalized=True)
    near = _engine(model, dtype=torch.bfloat16).embed(texts, dimensions=None, normalized=True)
    assert near.dtype == np.float32
    assert float((exact * near).sum(axis=1).min()) > 0.98
    assert not np.array_equal(exact, near)


def test_its_weights_are_its_own_and_are_given_back() -> None:
    model = _bert()
    engine = _engine(model)
    before = engine.embed(_texts([4]), dimensions=None, normalized=True)
    model.encoder.layer[0].output.dense.weight.zero_()
    np.testing.assert_array_equal(engine.embed(_texts([4]), dimensions=None, normalized=True), before)
    assert engine.size_bytes > 10_000
    engine.close()
    engine.close()
    assert engine.size_bytes == 0


def test_other_models_do_not_suit() -> None:
    assert PackedBert.suits(_bert())
    distilbert = DistilBertModel(DistilBertConfig(vocab_size=50, dim=32, hidden_dim=64, n_layers=1, n_heads=2)).eval()
    others = [None, distilbert, _bert().train(), _bert(hidden_act="relu"), _bert(is_decoder=True)]
    assert not any(PackedBert.suits(model) for model in (*others, _bert(output_hidden_states=True)))


# ---------------------------------------------------------------------------------------------- the ways


def _choose(*ways: Way, exact: NDArray[np.float32], texts: list[Text]) -> Any:
    def embed(engine: PackedEngine) -> NDArray[np.float32]:
        return engine.embed(texts, dimensions=None, normalized=False)

    return first_that_passes("m", ways, exact, embed, mean_cosine=0.999, top10_overlap=0.9)


def _broken() -> PackedEngine:
    raise RuntimeError("no kernel image is available")


def test_a_way_that_fails_or_answers_otherwise_is_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    model, texts = _bert(), _texts(LENGTHS)
    exact, strange = _expected(model, texts, "mean"), _engine(model, "cls")
    ways = [Way("flash", _broken), Way("strange", lambda: strange), Way("plain", lambda: _engine(model))]
    with caplog.at_level(logging.INFO):
        passed = _choose(*ways, exact=exact, texts=texts)
    assert passed.engine is not None
    assert (passed.figures, passed.note) == ("cos 1.0000 top10 1.000", "")
    assert "cannot run by flash: RuntimeError: no kernel image" in caplog.text
    assert "strange is refused: mean cosine" in caplog.text
    assert "runs by plain" in caplog.text
    assert strange.size_bytes == 0


def test_a_way_that_fails_at_its_first_pass_gives_its_memory_back_before_the_next_opens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, texts = _bert(), _texts([3, 5, 9])
    exact, full = _expected(model, texts, "mean"), _engine(model)
    held: list[int] = []

    def pass_(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("no memory is left")

    def second() -> PackedEngine:
        held.append(full.size_bytes)
        return _engine(model)

    monkeypatch.setattr(full, "_passes", pass_)
    passed = _choose(Way("recorded", lambda: full), Way("plain", second), exact=exact, texts=texts)
    assert passed.engine is not None
    assert held == [0]


def test_without_a_way_there_are_reasons() -> None:
    model, texts = _bert(), _texts([3, 5, 9])
    passed = _choose(Way("flash", _broken), exact=_expected(model, texts, "mean"), texts=texts)
    assert passed.engine is None
    assert passed.note == "flash: RuntimeError: no kernel image is available"
