"""DistilBERT-class encoders from transformers: fill_mask, features, classify, zero_shot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Final, Self

import torch
import transformers
from pydantic import Field
from transformers import AutoConfig, AutoModel, AutoTokenizer

from cortex_tasks.errors import ConfigError, CortexError
from cortex_tasks.payloads import Params
from workers.adapters._heads import HEADS, Head, Loaded
from workers.adapters._options import Options, read_options
from workers.adapters._torch import dtype_of, loading, release, size_of, token_bytes_of, window_of
from workers.adapters.base import Adapter, Item, LoadContext, WireValue
from workers.engines.onednn import use_onednn
from workers.engines.select import numeric_class

_LOCAL: Final = {"local_files_only": True, "trust_remote_code": False}
#: For a model that names no limit at all.
_DEFAULT_WINDOW: Final = 512


class TransformersOptions(Options):
    """``options`` of a model in queues.yaml."""

    #: Read at most this many tokens of a text; None: as many as the model's own files say.
    max_length: Annotated[int, Field(ge=8)] | None = None
    #: Padded tokens in one call of the model, for tasks that make more of an item than its text: zero_shot has
    #: a row a label, fill_mask the whole vocabulary a token (4 bytes x 30,522 a token: 125 MB at the default).
    chunk_tokens: Annotated[int, Field(ge=1)] = 1024


class TransformersAdapter(Adapter):
    """Answers as ``transformers.pipeline`` does for each task; texts over the model's window are cut and say so.

    The tasks of a model share one copy of the weights: ``features`` reads the encoder inside the model that another
    task loaded.
    """

    version = "2"

    engine = "torch"

    def __init__(self, heads: dict[str, Head[Any]], models: list[Any]) -> None:
        self._heads = heads
        self._models = models

    @classmethod
    def load(cls, context: LoadContext) -> Self:
        options = read_options(TransformersOptions, context)
        for task in context.tasks:
            if task not in HEADS:
                raise ConfigError(
                    f"models.{context.alias}.tasks: adapter transformers serves {', '.join(HEADS)}, not {task}"
                )
        precision, note = numeric_class("torch", context.precision, context.device)
        context = replace(context, precision=precision)
        if context.backend not in ("torch", "auto"):
            raise ConfigError(
                f"models.{context.alias}.backend: adapter transformers runs on torch, not on {context.backend!r}"
            )
        with loading(context) as snapshot:
            config = AutoConfig.from_pretrained(snapshot, **_LOCAL)
            tokenizer = AutoTokenizer.from_pretrained(snapshot, **_LOCAL)
            models = _load_models(snapshot, context)
            window = window_of(
                options.max_length, tokenizer.model_max_length, getattr(config, "max_position_embeddings", None)
            )
            heads = {
                task: HEADS[task](
                    Loaded(
                        context.alias,
                        models[HEADS[task].kind],
                        tokenizer,
                        window or _DEFAULT_WINDOW,
                        options.chunk_tokens,
                    )
                )
                for task in context.tasks
            }
            adapter = cls(heads, list(models.values()))
        adapter.precision, adapter.note = precision, note
        return adapter

    @property
    def size_bytes(self) -> int:
        return size_of(self._models)

    @property
    def token_bytes(self) -> int:
        return max(token_bytes_of(model.config, head.window) for head in self._heads.values() for model in self._models)

    @property
    def library(self) -> str:
        return f"transformers {transformers.__version__}, torch {torch.__version__}"

    def example(self, task: str) -> tuple[Sequence[Any], Params]:
        return self._heads[task].example()

    def prepare(self, task: str, inputs: Sequence[Any], params: Params) -> list[Item | CortexError]:
        return self._heads[task].prepare(inputs, params)

    def forward(self, task: str, items: Sequence[Item], params: Params) -> Sequence[Any]:
        return self._heads[task].forward(items, params)

    def finish(self, task: str, items: Sequence[Item], raw: Sequence[Any], params: Params) -> list[WireValue]:
        return self._heads[task].finish(items, raw, params)

    def close(self) -> None:
        release(self._models)


def _load_models(snapshot: Path, context: LoadContext) -> dict[Any, Any]:
    """kind -> model, each kind once; the bare encoder is taken from another kind where there is one."""
    kinds = dict.fromkeys(HEADS[task].kind for task in context.tasks)
    models = {kind: _load_model(kind, snapshot, context) for kind in kinds if kind is not AutoModel}
    if AutoModel in kinds:
        whole = next(iter(models.values()), None)
        models[AutoModel] = _load_model(AutoModel, snapshot, context) if whole is None else whole.base_model
    return models


def _load_model(kind: Any, snapshot: Path, context: LoadContext) -> Any:
    """Raises ConfigError when the snapshot lacks weights that this kind of model needs (its head, as a rule)."""
    model, info = kind.from_pretrained(
        snapshot, use_safetensors=True, dtype=dtype_of(context), output_loading_info=True, **_LOCAL
    )
    # A bare encoder may lack its pooler: hidden states do not pass through it.
    missing = sorted(name for name in info["missing_keys"] if kind is not AutoModel or "pooler" not in name)
    if missing:
        tasks = [task for task in context.tasks if HEADS[task].kind is kind]
        raise ConfigError(
            f"model {context.alias!r} cannot serve {', '.join(tasks)}: its files hold "
            f"{', '.join(model.config.architectures or ['no known architecture'])} and lack {', '.join(missing[:3])}; "
            "take the task from its tasks, or take a source that was fine-tuned for it",
            {"model": context.alias, "missing": missing[:20]},
        )
    model.eval().requires_grad_(False).to(context.device)
    use_onednn(model)
    return model
