"""Sentence embeddings by any SentenceTransformer model that reads text through a transformer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Self, cast

import numpy as np
import sentence_transformers
import torch
from numpy.typing import NDArray
from pydantic import Field
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

from cortex_tasks.errors import ConfigError, CortexError, InvalidInput
from cortex_tasks.payloads import EmbedParams, Params
from workers.adapters._options import Options, read_options
from workers.adapters._torch import (
    Tokens,
    TokensReader,
    chunks,
    collate,
    dtype_of,
    loading,
    release,
    size_of,
    token_bytes_of,
    window_of,
)
from workers.adapters.base import Adapter, Item, LoadContext, WireValue
from workers.engines.base import Engine
from workers.engines.cache_store import CacheStore, writable_root
from workers.engines.cuda import cuda_ways, on_gpu, sixteen_bit
from workers.engines.onednn import use_onednn
from workers.engines.packed import PackedEngine, first_that_passes
from workers.engines.packed_bert import PackedBert
from workers.engines.select import FP32_COSINE, Request, Subject, choose, numeric_class
from workers.engines.texts import held_out_texts
from workers.engines.torch import TorchEngine

_PROBE = "The quick brown fox, 42 times."
#: Two texts of unequal length.
_EXAMPLE = (_PROBE, "A second, longer text, so that the batch is padded. " * 4)
#: Padded tokens in one call while engines are built and compared.
_BUILD_TOKENS = 1024
#: Tokens read of a text by a model that names no limit at all.
_DEFAULT_WINDOW = 512
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

    The transformer runs on the engine that the model's ``backend`` names, the library's other modules as they are;
    tokenising (once, before batching) and padding are done here.
    """

    version = "2"

    def __init__(self, model: SentenceTransformer, options: EmbedOptions, precision: str, threads: int) -> None:
        self._model = model
        self._tokenizer = model.tokenizer
        self._prompt: str = model.prompts.get(options.prompt_name or model.default_prompt_name or "", "")
        self._reader = TokensReader(self._tokenizer, window_of(model.max_seq_length))
        self._modules = list(model.children())
        transformer, *later = self._modules
        self._later = later
        self._unnormalized = later[:-1] if later and isinstance(later[-1], Normalize) else later
        self._output: str = transformer.module_output_name
        self._device = model.device
        self._run_on(TorchEngine(transformer, self._output, precision, threads))
        self._constants = self._constant_features()

    @classmethod
    def load(cls, context: LoadContext) -> Self:
        options = read_options(EmbedOptions, context)
        precision, note = _numeric_class(context)
        elsewhere = context.device == "cpu" and _runs_elsewhere(context.backend, precision)
        packed = context.backend == "auto" and on_gpu(context.device)
        loaded_as = "fp32" if elsewhere or packed else precision
        with loading(context) as snapshot:
            model = SentenceTransformer(
                str(snapshot),
                device=context.device,
                local_files_only=True,
                trust_remote_code=False,
                model_kwargs={"dtype": dtype_of(replace(context, precision=loaded_as)), "use_safetensors": True},
            )
            _check(model, options, context)
            if options.max_seq_length is not None:
                model.max_seq_length = window_of(options.max_seq_length, model.max_seq_length)
            use_onednn(model.eval().requires_grad_(False))
            adapter = cls(model, options, loaded_as, context.threads)
        adapter.note = note
        if elsewhere:
            adapter._take_engine(replace(context, precision=precision))
        elif packed:
            adapter._take_packed(replace(context, precision=precision))
        return adapter

    @property
    def size_bytes(self) -> int:
        return size_of(self._modules) + self._engine.size_bytes

    @property
    def token_bytes(self) -> int:
        window = window_of(self._model.max_seq_length) or _DEFAULT_WINDOW
        return token_bytes_of(getattr(self._modules[0], "config", None), window)

    @property
    def library(self) -> str:
        engine = self._engine.library
        return f"sentence-transformers {sentence_transformers.__version__}, {engine}"

    def example(self, task: str) -> tuple[Sequence[Any], Params]:
        return _EXAMPLE, EmbedParams()

    def prepare(self, task: str, inputs: Sequence[Any], params: Params) -> list[Item | CortexError]:
        read = self._reader.read(inputs, prefix=self._prompt)
        return [row if isinstance(row, InvalidInput) else Item(row, len(row.ids)) for row in read]

    def forward(self, task: str, items: Sequence[Item], params: Params) -> Sequence[NDArray[np.float32]]:
        """One vector an item: float32, shape ``(dimensions,)``."""
        rows: list[Tokens] = [item.data for item in items]
        return self._forward(self._engine, rows, cast("EmbedParams", params).normalize) if rows else []

    def _forward(
        self, engine: Engine | PackedEngine, rows: Sequence[Tokens], normalize: bool
    ) -> list[NDArray[np.float32]]:
        if isinstance(engine, PackedEngine):
            return list(engine.embed(rows, dimensions=self._model.truncate_dim, normalized=normalize))
        with torch.inference_mode():
            features: dict[str, Any] = collate(rows, self._tokenizer, self._device) | self._constants
            features[self._output] = engine.encode(features)
            for module in self._later if normalize else self._unnormalized:
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
        self._engine.close()
        release(self._modules)

    def _run_on(self, engine: Engine | PackedEngine, figures: str = "") -> None:
        self._engine, self.figures = engine, figures
        self.engine, self.precision = engine.name, engine.precision
        self.crew = engine.crew if isinstance(engine, TorchEngine) else None

    def _take_engine(self, context: LoadContext) -> None:
        """Run on the engine that the model's backend names instead of torch."""
        rows = [row for row in self._reader.read(_EXAMPLE, prefix=self._prompt) if isinstance(row, Tokens)]
        subject = Subject(
            transformer=self._modules[0],
            output=self._output,
            example=collate(rows, self._tokenizer, self._device),
            constants=self._constants,
            embed=self._embed,
        )
        chosen = choose(_request(context), subject)
        self._run_on(chosen.engine, chosen.figures)
        self.note = chosen.note or self.note
        if self.engine != TorchEngine.name:
            release(self._modules[:1])

    def _take_packed(self, context: LoadContext) -> None:
        """Run without padding on a GPU; on torch's own modules, with a note, where that does not work or answer alike.

        The model is loaded in fp32: what it answers is what another engine is compared with.
        """
        transformer, why = self._modules[0], self._not_packed()
        if not why:
            window = window_of(self._model.max_seq_length, self._tokenizer.model_max_length) or _DEFAULT_WINDOW
            passed = first_that_passes(
                context.alias,
                cuda_ways(transformer.model, self._later[0].pooling_mode, context.precision, context.device, window),
                self._embed(self._engine, held_out_texts()),
                lambda engine: self._embed(engine, held_out_texts()),
                mean_cosine=FP32_COSINE if context.precision == "fp32" else context.gate_cosine,
                top10_overlap=0.0 if context.precision == "fp32" else context.gate_top10,
            )
            why = passed.note
            if passed.engine is not None:
                self._run_on(passed.engine, passed.figures)
                release(self._modules[:1])
        if why:
            self.note = "; ".join(filter(None, (self.note, f"{why}; runs on torch")))
            transformer.to(dtype_of(context))
            self._run_on(TorchEngine(transformer, self._output, context.precision, context.threads))

    def _not_packed(self) -> str:
        """Why the model is none that can run packed; "" when it may be."""
        pooling, *rest = self._unnormalized or [None]
        plain = isinstance(pooling, Pooling) and pooling.pooling_mode in ("mean", "cls") and not rest
        if not plain or not (pooling.include_prompt or not self._prompt):
            return "the engine for GPUs pools by mean or cls, prompts included, and runs no module after that"
        if PackedBert.suits(self._modules[0].model):
            return ""
        return "the engine for GPUs runs plain BERT encoders"

    def _embed(self, engine: Engine | PackedEngine, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unnormalised vectors, shape ``(texts, dimensions)``, in the texts' order."""
        read = self._reader.read(texts, prefix=self._prompt)
        rows = [row for row in read if isinstance(row, Tokens)]
        order = sorted(range(len(rows)), key=lambda index: len(rows[index].ids))
        vectors: list[NDArray[np.float32]] = []
        for part in chunks([len(rows[index].ids) for index in order], _BUILD_TOKENS):
            vectors += self._forward(engine, [rows[index] for index in order[part]], normalize=False)
        return np.stack(vectors)[np.argsort(order)]

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


def _numeric_class(context: LoadContext) -> tuple[str, str]:
    """The precision to run in on this machine, and a note when it is another than the one asked for."""
    precision, note = numeric_class(context.backend, context.precision, context.device)
    if on_gpu(context.device) and not note:
        return sixteen_bit(precision, context.device)
    return precision, note


def _runs_elsewhere(backend: str, precision: str) -> bool:
    """Whether another engine than torch may run it; 16-bit types are torch's alone."""
    return backend in ("openvino", "onnx") or (backend == "auto" and precision in ("fp32", "int8"))


def _request(context: LoadContext) -> Request:
    root = writable_root(context.cache_dir) if context.cache_dir else writable_root()
    return Request(
        alias=context.alias,
        backend=context.backend,
        precision=context.precision,
        digest=f"{context.digest} {json.dumps(dict(context.options), sort_keys=True)}",
        threads=context.threads,
        store=CacheStore(root, max_bytes=context.cache_bytes, ttl_s=context.cache_ttl_s),
        mean_cosine=context.gate_cosine,
        top10_overlap=context.gate_top10,
    )


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
