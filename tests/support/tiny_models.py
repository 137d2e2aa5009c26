"""Tiny models of the real architectures, built from a seed: real files, random weights, a second to make.

Each builder fills ``directory`` with what a hub repository would hold (config, WordPiece tokenizer, safetensors)
and returns it. Weights are drawn wide (standard deviation 0.3), so that answers differ well beyond rounding.
"""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertForSequenceClassification,
    DistilBertModel,
    DistilBertTokenizer,
    PreTrainedModel,
)

__all__ = ["classifier", "encoder", "masked_lm", "nli", "sentence_encoder", "tokenizer"]

#: Tokens a tiny model reads at once, special tokens included.
WINDOW = 48
HIDDEN = 32

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_TEXT = (
    "the a an of to in is was it this that example about good bad great awful film movie music sport "
    "politics paris london city capital france england cat dog sat on mat red blue green fast slow queue "
    "worker model text not and or with for from who what where when one two three day night sun rain"
)


def tokenizer(window: int = WINDOW) -> DistilBertTokenizer:
    """A lower-casing WordPiece tokenizer: some words, every ASCII character alone and as a continuation."""
    characters = sorted(set(string.printable.lower()) - set(string.whitespace))
    pieces = [*_SPECIAL, *characters, *(f"##{c}" for c in characters), *_TEXT.split(), "##s", "##ing", "é", "##é"]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    return DistilBertTokenizer(vocab=vocabulary, model_max_length=window)


def _config(window: int, **more: Any) -> DistilBertConfig:
    return DistilBertConfig(
        vocab_size=len(tokenizer(window)),
        max_position_embeddings=window,
        dim=HIDDEN,
        hidden_dim=2 * HIDDEN,
        n_layers=2,
        n_heads=2,
        initializer_range=0.3,
        pad_token_id=0,
        **more,
    )


def _save(directory: Path, kind: type[PreTrainedModel], seed: int, window: int = WINDOW, **config: Any) -> Path:
    torch.manual_seed(seed)
    kind(_config(window, **config)).save_pretrained(directory)
    tokenizer(window).save_pretrained(directory)
    return directory


def encoder(directory: Path, seed: int = 1) -> Path:
    """A DistilBERT without a head."""
    return _save(directory, DistilBertModel, seed)


def masked_lm(directory: Path, seed: int = 2) -> Path:
    """A DistilBERT with a masked-language head."""
    return _save(directory, DistilBertForMaskedLM, seed)


def classifier(directory: Path, seed: int = 3, *, multi_label: bool = False) -> Path:
    """A DistilBERT that classifies: sport, politics, music; independent labels when ``multi_label``."""
    problem = "multi_label_classification" if multi_label else "single_label_classification"
    names = dict(enumerate(("sport", "politics", "music")))
    return _save(
        directory,
        DistilBertForSequenceClassification,
        seed,
        problem_type=problem,
        id2label=names,
        label2id={name: index for index, name in names.items()},
    )


def nli(directory: Path, seed: int = 4, *, entailment_id: int = 0) -> Path:
    """A DistilBERT trained (here: not) on natural language inference; ``entailment_id`` is 0 or 2."""
    names = (
        ("ENTAILMENT", "NEUTRAL", "CONTRADICTION") if entailment_id == 0 else ("contradiction", "neutral", "entailment")
    )
    return _save(
        directory,
        DistilBertForSequenceClassification,
        seed,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )


def sentence_encoder(
    directory: Path,
    seed: int = 5,
    *,
    pooling: Literal["mean", "cls"] = "cls",
    normalize: bool = False,
    prompt: str | None = None,
    include_prompt: bool = True,
) -> Path:
    """A SentenceTransformer: DistilBERT, pooling, a Dense layer to 16 dimensions, perhaps a Normalize at the end.

    ``prompt`` becomes the model's default prompt.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer

    base = Transformer(str(encoder(directory / "base", seed)))
    modules = [base, Pooling(HIDDEN, pooling, include_prompt=include_prompt), Dense(HIDDEN, 16)]
    prompts = {} if prompt is None else {"default": prompt}
    model = SentenceTransformer(
        modules=[*modules, *([Normalize()] if normalize else [])],
        prompts=prompts,
        default_prompt_name="default" if prompts else None,
        device="cpu",
    )
    model.save(str(directory / "model"), create_model_card=False)
    return directory / "model"
