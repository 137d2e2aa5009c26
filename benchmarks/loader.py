"""One worker process as far as its memory goes: loads MiniLM from a directory, commanded by ``benchmarks.memory``."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from benchmarks.processes import serve
from cortex_tasks.config import load_fleet
from workers.adapters import Adapter, LoadContext, adapter_class

_ALIAS: Final = "minilm"
_MODELS: Final[list[Adapter]] = []


def hello() -> dict[str, Any]:
    """Import what loading needs."""
    adapter_class("sentence_transformers")
    return {"pid": os.getpid()}


def load(*, snapshot: str, digest: str) -> dict[str, Any]:
    """Load, and read every weight, also the words that few texts hold; keeps the model."""
    load_ms, adapter = _timed(lambda: _adapter(snapshot, digest))
    _MODELS.append(adapter)
    for tensor in adapter._model.parameters():
        tensor.sum()
    return {"load_ms": load_ms, "size_bytes": adapter.size_bytes, "own_bytes": _outside(adapter, Path(snapshot))}


def loads(*, snapshot: str, digest: str, count: int) -> dict[str, Any]:
    """Milliseconds of warm loads: ours, the library's of the same mapped model, and its bare layers alone; in turn."""
    ours, theirs, layers = [], [], []
    for _ in range(count):
        ours.append(_timed(lambda: _adapter(snapshot, digest))[0])
        theirs.append(_timed(lambda: _library(snapshot))[0])
        layers.append(_timed(lambda: _bare_layers(snapshot))[0])
    return {"ours_ms": ours, "library_ms": theirs, "layers_ms": layers}


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    began_s = time.perf_counter()
    made = call()
    return (time.perf_counter() - began_s) * 1e3, made


def _adapter(snapshot: str, digest: str) -> Adapter:
    config = load_fleet().models[_ALIAS]
    context = LoadContext(alias=_ALIAS, snapshot=Path(snapshot), digest=digest, tasks=config.tasks)
    return adapter_class(config.adapter).load(context)


def _library(snapshot: str) -> Any:
    """The same modules without Cortex: weights mapped, tokenizer and pooling read."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(
        snapshot, device="cpu", local_files_only=True, model_kwargs={"use_safetensors": True}
    ).eval()


def _bare_layers(snapshot: str) -> Any:
    """The transformer's layers alone: built without memory, the mapped tensors put in their places."""
    import torch
    from safetensors import safe_open
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        model = BertModel(BertConfig.from_pretrained(snapshot))
    with safe_open(Path(snapshot) / "model.safetensors", "pt") as file:
        model.load_state_dict({name: file.get_tensor(name) for name in file.keys()}, assign=True, strict=False)  # noqa: SIM118
    return model.eval()


def _outside(adapter: Adapter, snapshot: Path) -> int:
    """Bytes of parameters that do not lie in the mapped files: copies of this process's own."""
    mapped = [
        tuple(int(edge, 16) for edge in line.split()[0].split("-"))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if str(snapshot) in line
    ]
    tensors = adapter._model.parameters()  # type: ignore[attr-defined]
    return sum(
        tensor.untyped_storage().nbytes()
        for tensor in tensors
        if not any(start <= tensor.data_ptr() < end for start, end in mapped)
    )


if __name__ == "__main__":
    serve(hello=hello, load=load, loads=loads)
