"""What each task of the transformers adapter does with a model: one class a task, each as ``transformers.pipeline``.

A head turns texts into items, items into raw outputs, raw outputs into wire values; see ``Adapter`` for the road.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Encoding
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

from cortex_tasks.errors import ConfigError, CortexError, InvalidInput, InvalidParameter
from cortex_tasks.payloads import ClassifyParams, FeaturesParams, FillMaskParams, Params, ZeroShotParams
from workers.adapters._torch import Tokens, TokensReader, chunks, collate, isolating
from workers.adapters.base import Item, WireValue

__all__ = ["HEADS", "Head", "Loaded"]

#: A text with more masks than this is refused: each mask costs ``top_k`` decoded copies of the text.
MAX_MASKS: Final = 32
_MASK: Final = "[MASK]"

_Params = TypeVar("_Params", bound=Params)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model of one kind with its tokenizer."""

    alias: str
    model: Any
    tokenizer: Any
    #: Tokens read of an input, special ones included.
    window: int
    #: Padded tokens in one call of the model.
    chunk_tokens: int

    def outputs(self, rows: Sequence[Tokens]) -> Iterator[tuple[slice, Any]]:
        """Runs the model over the rows a chunk at a time: which rows, and the model's output for them."""
        for part in chunks([len(row.ids) for row in rows], self.chunk_tokens):
            features = collate(rows[part], self.tokenizer, self.model.device)
            with torch.inference_mode():
                output = self.model(**features)
            yield part, output


class Head(ABC, Generic[_Params]):
    """One task on one model."""

    #: The kind of model it needs; ``AutoModel`` is the bare encoder, which every other kind contains.
    kind: ClassVar[Any]

    def __init__(self, loaded: Loaded) -> None:
        self._loaded = loaded
        self._tokenizer = loaded.tokenizer
        self._reader = TokensReader(loaded.tokenizer, loaded.window)

    @property
    def window(self) -> int:
        """Tokens read of an input."""
        return self._loaded.window

    @abstractmethod
    def example(self) -> tuple[Sequence[str], _Params]: ...

    def prepare(self, inputs: Sequence[Any], params: _Params) -> list[Item | CortexError]:
        read = self._reader.read(inputs)
        return [row if isinstance(row, InvalidInput) else Item(row, len(row.ids)) for row in read]

    @abstractmethod
    def forward(self, items: Sequence[Item], params: _Params) -> list[Any]: ...

    @abstractmethod
    def finish(self, items: Sequence[Item], raw: Sequence[Any], params: _Params) -> list[WireValue]: ...


class Features(Head[FeaturesParams]):
    """As ``pipeline("feature-extraction")``: the last hidden states, special tokens included; or pooled."""

    kind = AutoModel

    def example(self) -> tuple[Sequence[str], FeaturesParams]:
        return ["A first text.", "A second, somewhat longer text."], FeaturesParams()

    def forward(self, items: Sequence[Item], params: FeaturesParams) -> list[NDArray[np.float32]]:
        """One array an item: float32, shape ``(tokens, hidden)``, or ``(hidden,)`` when pooled."""
        rows: list[Tokens] = [item.data for item in items]
        arrays: list[NDArray[np.float32]] = []
        for part, output in self._loaded.outputs(rows):
            states = output.last_hidden_state.float()
            for row, padded in zip(rows[part], states, strict=True):
                arrays.append(_pooled(padded[: len(row.ids)], params.pooling).cpu().numpy())
        return arrays

    def finish(self, items: Sequence[Item], raw: Sequence[Any], params: FeaturesParams) -> list[WireValue]:
        return [
            {
                "data": np.ascontiguousarray(array, dtype="<f4").tobytes(),
                "shape": list(array.shape),
                "truncated": item.data.truncated,
            }
            for item, array in zip(items, raw, strict=True)
        ]


def _pooled(rows: torch.Tensor, pooling: str) -> torch.Tensor:
    """``rows``: one a real token, shape ``(tokens, hidden)``."""
    if pooling == "none":
        return rows
    return rows[0] if pooling == "cls" else rows.mean(dim=0)


class Classify(Head[ClassifyParams]):
    """As ``pipeline("text-classification", top_k=...)``, on the text's beginning when it is over the window."""

    kind = AutoModelForSequenceClassification

    def example(self) -> tuple[Sequence[str], ClassifyParams]:
        return ["A fine day.", "An awful, long, wet and windy day."], ClassifyParams()

    def forward(self, items: Sequence[Item], params: ClassifyParams) -> list[torch.Tensor]:
        """One tensor an item: float32 logits, shape ``(labels,)``."""
        rows = [item.data for item in items]
        return [row for _, output in self._loaded.outputs(rows) for row in output.logits.float().cpu()]

    def finish(self, items: Sequence[Item], raw: Sequence[Any], params: ClassifyParams) -> list[WireValue]:
        names = self._loaded.model.config.id2label
        values: list[WireValue] = []
        for item, logits in zip(items, raw, strict=True):
            scores = enumerate(self._scores(logits, params.multi_label).tolist())
            labels = _ranked([(names[index], score) for index, score in scores])
            values.append({"labels": labels[: params.top_k], "truncated": item.data.truncated})
        return values

    def _scores(self, logits: torch.Tensor, multi_label: bool | None) -> torch.Tensor:
        config = self._loaded.model.config
        if multi_label is None:
            if config.problem_type == "regression":
                return logits
            multi_label = config.problem_type == "multi_label_classification" or config.num_labels == 1
        return logits.sigmoid() if multi_label else logits.softmax(dim=-1)


def _ranked(scores: list[tuple[str, float]]) -> list[dict[str, Any]]:
    best_first = sorted(scores, key=lambda pair: pair[1], reverse=True)
    return [{"label": label, "score": score} for label, score in best_first]


@dataclass(frozen=True, slots=True)
class _Premise:
    """A text and the hypotheses about it. The encodings hold no special tokens; a job shares its hypotheses."""

    text: Encoding
    hypotheses: tuple[Encoding, ...]
    #: Tokens of each pair as the model reads it.
    lengths: tuple[int, ...]
    truncated: bool


class ZeroShot(Head[ZeroShotParams]):
    """As ``pipeline("zero-shot-classification")``: entailment of one hypothesis a label, the text cut if need be.

    An item is a text with all labels of its call. ``{}`` in the template is replaced, nothing else is formatted.
    """

    kind = AutoModelForSequenceClassification

    def __init__(self, loaded: Loaded) -> None:
        super().__init__(loaded)
        self._bare = TokensReader(loaded.tokenizer, None)
        self._pairs = TokensReader(loaded.tokenizer, loaded.window, "only_first")
        self._special_tokens: int = loaded.tokenizer.num_special_tokens_to_add(pair=True)
        ids = loaded.model.config.label2id
        entailment = [index for label, index in ids.items() if label.lower().startswith("entail")]
        if not entailment:
            raise ConfigError(
                f"model {loaded.alias!r} cannot serve zero_shot: none of its labels ({', '.join(map(str, ids))}) is "
                "an entailment; take a source that was trained on natural language inference"
            )
        #: Columns of the logits: contradiction, entailment (as the pipeline chooses them).
        self._columns = [-1 if entailment[0] == 0 else 0, entailment[0]]

    def example(self) -> tuple[Sequence[str], ZeroShotParams]:
        return ["A fine day for a walk."], ZeroShotParams(labels=("weather", "politics"))

    def prepare(self, inputs: Sequence[Any], params: ZeroShotParams) -> list[Item | CortexError]:
        hypotheses = self._hypotheses(params)
        if isinstance(hypotheses, InvalidParameter):
            return [hypotheses] * len(inputs)
        return [
            text if isinstance(text, InvalidInput) else self._item(text, hypotheses)
            for text in isolating(inputs, self._bare.bare)
        ]

    def _hypotheses(self, params: ZeroShotParams) -> tuple[Encoding, ...] | InvalidParameter:
        texts = [params.hypothesis_template.replace("{}", label) for label in params.labels]
        room = self._loaded.window - self._special_tokens
        encodings = self._bare.bare(texts)
        for label, encoding in zip(params.labels, encodings, strict=True):
            if len(encoding) >= room:
                return InvalidParameter(
                    f"zero_shot: the hypothesis of label {label[:40]!r} has {len(encoding)} tokens, which leaves no "
                    f"room for a text in the model's {self._loaded.window}; shorten it"
                )
        return tuple(encodings)

    def _item(self, text: Encoding, hypotheses: tuple[Encoding, ...]) -> Item:
        whole = [len(text) + len(hypothesis) + self._special_tokens for hypothesis in hypotheses]
        lengths = tuple(min(length, self._loaded.window) for length in whole)
        premise = _Premise(text, hypotheses, lengths, max(whole) > self._loaded.window)
        return Item(premise, cost_tokens=len(lengths) * max(lengths))

    def forward(self, items: Sequence[Item], params: ZeroShotParams) -> list[torch.Tensor]:
        """One tensor an item: float32, shape ``(labels, 2)``: the logits of contradiction and of entailment."""
        premises: list[_Premise] = [item.data for item in items]
        pairs = [(premise.text, hypothesis) for premise in premises for hypothesis in premise.hypotheses]
        lengths = [length for premise in premises for length in premise.lengths]
        logits: list[torch.Tensor] = []
        # The pairs are put together a chunk at a time: all of them at once could be large.
        for part in chunks(lengths, self._loaded.chunk_tokens):
            rows = [self._pairs.pair(text, hypothesis) for text, hypothesis in pairs[part]]
            for _, output in self._loaded.outputs(rows):
                logits.append(output.logits[:, self._columns].float().cpu())
        sizes = [len(premise.hypotheses) for premise in premises]
        return list(torch.cat(logits).split_with_sizes(sizes)) if logits else []

    def finish(self, items: Sequence[Item], raw: Sequence[Any], params: ZeroShotParams) -> list[WireValue]:
        values: list[WireValue] = []
        for item, logits in zip(items, raw, strict=True):
            alone = params.multi_label or len(params.labels) == 1
            scores = logits.softmax(dim=-1)[:, 1] if alone else logits[:, 1].softmax(dim=-1)
            labels = _ranked(list(zip(params.labels, scores.tolist(), strict=True)))
            values.append({"labels": labels, "truncated": item.data.truncated})
        return values


@dataclass(frozen=True, slots=True)
class _Masked:
    tokens: Tokens
    positions: list[int]


class FillMask(Head[FillMaskParams]):
    """As ``pipeline("fill-mask", top_k=...)``; ``[MASK]`` stands for the tokenizer's own mask token in any model.

    With several masks, the sequences keep the special tokens and the other masks, as the pipeline's do.
    """

    kind = AutoModelForMaskedLM

    def __init__(self, loaded: Loaded) -> None:
        super().__init__(loaded)
        if loaded.tokenizer.mask_token_id is None:
            raise ConfigError(f"model {loaded.alias!r} cannot serve fill_mask: its tokenizer has no mask token")

    def example(self) -> tuple[Sequence[str], FillMaskParams]:
        return [f"A warm {_MASK}.", f"The {_MASK} of a rather long text is a {_MASK}."], FillMaskParams()

    def prepare(self, inputs: Sequence[Any], params: FillMaskParams) -> list[Item | CortexError]:
        mask = self._tokenizer.mask_token
        texts = [text.replace(_MASK, mask) if isinstance(text, str) else text for text in inputs]
        return [
            row if isinstance(row, InvalidInput) else self._item(row, params.truncate)
            for row in self._reader.read(texts)
        ]

    def _item(self, tokens: Tokens, truncate: bool) -> Item | InvalidInput:
        if tokens.truncated and not truncate:
            return InvalidInput(
                f"fill_mask: a text has more than the {self._loaded.window} tokens that the model reads; shorten it, "
                "or pass truncate=True to use its beginning"
            )
        positions = [index for index, token in enumerate(tokens.ids) if token == self._tokenizer.mask_token_id]
        if not positions:
            where = f"the first {self._loaded.window} tokens of the text" if tokens.truncated else "the text"
            return InvalidInput(f"fill_mask needs a {_MASK} in {where}", {"task": "fill_mask"})
        if len(positions) > MAX_MASKS:
            return InvalidInput(f"fill_mask: a text has {len(positions)} masks; the limit is {MAX_MASKS}",
                                {"limit": MAX_MASKS, "got": len(positions)})  # fmt: skip
        return Item(_Masked(tokens, positions), len(tokens.ids))

    def forward(self, items: Sequence[Item], params: FillMaskParams) -> list[tuple[list[Any], list[Any]]]:
        """Scores and token ids an item: lists of shape ``(masks, top_k)``, best first."""
        best: list[tuple[list[Any], list[Any]]] = []
        masked: list[_Masked] = [item.data for item in items]
        for part, output in self._loaded.outputs([entry.tokens for entry in masked]):
            for logits, entry in zip(output.logits, masked[part], strict=True):
                chosen = logits[entry.positions].float().softmax(dim=-1)
                scores, ids = chosen.topk(min(params.top_k, chosen.shape[-1]))
                best.append((scores.tolist(), ids.tolist()))
        return best

    def finish(self, items: Sequence[Item], raw: Sequence[Any], params: FillMaskParams) -> list[WireValue]:
        return [
            {"masks": [self._fills(item.data, *mask) for mask in zip(item.data.positions, *best, strict=True)]}
            for item, best in zip(items, raw, strict=True)
        ]

    def _fills(self, masked: _Masked, position: int, scores: list[float], ids: list[int]) -> list[dict[str, Any]]:
        return [
            {
                "token": self._tokenizer.decode([token]),
                "score": score,
                "sequence": self._filled(masked, position, token),
            }
            for score, token in zip(scores, ids, strict=True)
        ]

    def _filled(self, masked: _Masked, position: int, token: int) -> str:
        ids = [*masked.tokens.ids[:position], token, *masked.tokens.ids[position + 1 :]]
        kept = [i for i in ids if i != self._tokenizer.pad_token_id]
        return str(self._tokenizer.decode(kept, skip_special_tokens=len(masked.positions) == 1))


HEADS: Final[dict[str, type[Head[Any]]]] = {
    "features": Features,
    "classify": Classify,
    "zero_shot": ZeroShot,
    "fill_mask": FillMask,
}
