"""Sentence embeddings by any SentenceTransformer model that reads text through a transformer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Self, cast

import numpy as np
import sentence_transformers
import torch
from numpy.typing import NDArray
from pydantic import Field
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Transformer

from cortex_tasks.errors import ConfigError, CortexError, InvalidInput
from cortex_tasks.payloads import EmbedParams, Params
from workers.adapters._options import Options, read_options
from workers.adapters._torch import (
    Tokens,
    TokensReader,
    collate,
    dtype_of,
    loading,
    release,
    size_of,
    window_of,
)
from workers.adapters.base import Adapter, Item, LoadContext, WireValue
from workers.engines.onednn import use_onednn

_PROBE = "The quick brown fox, 42 times."
_TOKEN_FEATURES = frozenset({"input_ids", "attention_mask", "token_type_ids"})


class EmbedOptions(Options):
    """``options`` of a model in queues.yaml."""

    #: Read at most this many tokens of a text; None: as many as the model's own files say.
    max_seq_length: Annotated[int, Field(ge=1)] | None = None
    #: One of the model's prompts, put before every text; None: its default prompt, if it has one.
    prompt_name: str | None = None


class SentenceTransformersAdapter(Adapter):
    """Answers as ``SentenceTransformer.encode(text, normalize_embeddings=params.normalize)`` does.

    With one difference: ``normalize=False`` also skips a Normalize module at the end of the model (MiniLM has
    one), which ``encode`` would run; so the vector is always the raw one when the raw one is asked for.

    The library's modules run as they are; only tokenising (once, before batching) and padding are done here.
    """

    version = "2"

    def __init__(self, model: SentenceTransformer, options: EmbedOptions) -> None:
        self._model = model
        self._tokenizer = model.tokenizer
        self._prompt: str = model.prompts.get(options.prompt_name or model.default_prompt_name or "", "")
        self._reader = TokensReader(self._tokenizer, window_of(model.max_seq_length))
        modules = list(model.children())
        self._modules = modules
        self._unnormalized = modules[:-1] if isinstance(modules[-1], Normalize) else modules
        self._constants = self._constant_features()

    @classmethod
    def load(cls, context: LoadContext) -> Self:
        options = read_options(EmbedOptions, context)
        with loading(context) as snapshot:
            model = SentenceTransformer(
                str(snapshot),
                device=context.device,
                local_files_only=True,
                trust_remote_code=False,
                model_kwargs={"dtype": dtype_of(context), "use_safetensors": True},
            )
            _check(model, options, context)
            if options.max_seq_length is not None:
                model.max_seq_length = window_of(options.max_seq_length, model.max_seq_length)
            use_onednn(model.eval().requires_grad_(False))
            return cls(model, options)

    @property
    def size_bytes(self) -> int:
        return size_of(self._modules)

    @property
    def library(self) -> str:
        return f"sentence-transformers {sentence_transformers.__version__}, torch {torch.__version__}"

    def example(self, task: str) -> tuple[Sequence[Any], Params]:
        return [_PROBE, "A second, longer text, so that the batch is padded. " * 4], EmbedParams()

    def prepare(self, task: str, inputs: Sequence[Any], params: Params) -> list[Item | CortexError]:
        read = self._reader.read(inputs, prefix=self._prompt)
        return [row if isinstance(row, InvalidInput) else Item(row, len(row.ids)) for row in read]

    def forward(self, task: str, items: Sequence[Item], params: Params) -> Sequence[NDArray[np.float32]]:
        """One vector an item: float32, shape ``(dimensions,)``."""
        if not items:
            return []
        normalize = cast("EmbedParams", params).normalize
        rows: list[Tokens] = [item.data for item in items]
        with torch.inference_mode():
            features: dict[str, Any] = collate(rows, self._tokenizer, self._model.device) | self._constants
            for module in self._modules if normalize else self._unnormalized:
                features = module(features)
            vectors: torch.Tensor = features["sentence_embedding"].float()
            vectors = vectors[:, : self._model.truncate_dim]
            if normalize:
                vectors = torch.nn.functional.normalize(vectors, dim=-1)
            return list(vectors.cpu().numpy())

    def finish(self, task: str, items: Sequence[Item], raw: Sequence[Any], params: Params) -> list[WireValue]:
        return [
            {"data": vector.astype("<f4", copy=False).tobytes(), "truncated": item.data.truncated}
            for item, vector in zip(items, raw, strict=True)
        ]

    def close(self) -> None:
        release(self._modules)

    def _constant_features(self) -> dict[str, Any]:
        """What the library hands its modules beside the tokens (modality, length of the prompt).

        Raises ValueError when it reads a text in another way than token by token (a chat template, for example).
        """
        theirs = self._model.preprocess([_PROBE], prompt=self._prompt or None)
        ours = self._reader.read([_PROBE], prefix=self._prompt)[0]
        constants = {name: value for name, value in theirs.items() if name not in _TOKEN_FEATURES}
        strange = [name for name, value in constants.items() if isinstance(value, torch.Tensor)]
        if strange or not isinstance(ours, Tokens) or theirs["input_ids"][0].tolist() != ours.ids:
            raise ValueError("the model does not read a text as plain tokens, which this adapter needs")
        return constants


def _check(model: SentenceTransformer, options: EmbedOptions, context: LoadContext) -> None:
    if not isinstance(model[0], Transformer):
        raise ConfigError(
            f"model {context.alias!r} reads its input through {type(model[0]).__name__}; the adapter "
            "sentence_transformers needs a model whose first module is a Transformer"
        )
    if options.prompt_name is not None and options.prompt_name not in model.prompts:
        raise ConfigError(
            f"models.{context.alias}.options.prompt_name: the model has no prompt {options.prompt_name!r}; it has "
            + (", ".join(sorted(model.prompts)) or "none")
        )
