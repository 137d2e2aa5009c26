"""Content addresses: the same question has the same key, from any process on any host, and no other one has.

A key is 128 bits of BLAKE2b over task, model alias, model revision, canonical parameters and the input's bytes, each
part preceded by its length, so that no two lists of parts give the same bytes.

Embeddings of one text that differ only in form (length, dimensions, encoding) are made from one stored vector
(``derived``): what makes the form is left out of the key.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any, Final

from cortex_tasks.payloads import EmbedParams, Params, Series

__all__ = ["KEY_BYTES", "Address", "input_bytes", "stored_params"]

KEY_BYTES: Final = 16
#: Changes when the meaning of a key or of what is stored under it changes: old entries are then not found.
_VERSION: Final = "cortex-cache-1"
#: Adapters whose vector with ``normalize=False`` is the one that the scaled vector is made from.
_RAW_VECTORS: Final = frozenset({"sentence_transformers"})


def stored_params(params: Params, adapter: str) -> Params:
    """The parameters under which an answer is computed and stored; ``derived.derive`` makes the asked form of it.

    ``adapter``: the model's, as queues.yaml names it.
    """
    if not isinstance(params, EmbedParams):
        return params
    # Inputs are cut before they are addressed: of an embedding, truncate says nothing more.
    stored = EmbedParams(normalize=params.normalize and adapter not in _RAW_VECTORS)
    return params if params == stored else stored


def input_bytes(value: str | Series) -> bytes:
    """A checked input, unambiguously: a text in UTF-8; a series as its values (float64) and its timestamps."""
    if isinstance(value, str):
        return value.encode()
    count = len(value.y)
    stamps = "\n".join(value.ds).encode()
    return b"".join((struct.pack(f"<I{count}d", count, *value.y), stamps))


class Address:
    """The keys of one kind of question to one revision of a model."""

    __slots__ = ("_begun",)

    def __init__(self, task: str, alias: str, revision: str, canonical: str) -> None:
        """``canonical``: ``Params.canonical()`` of the stored parameters."""
        begun = blake2b(digest_size=KEY_BYTES)
        for part in (_VERSION, task, alias, revision, canonical):
            raw = part.encode()
            begun.update(struct.pack("<Q", len(raw)) + raw)
        # What follows is one last part, so it needs no length.
        self._begun = begun

    def key(self, value: Any) -> bytes:
        """The key of one checked input, KEY_BYTES long."""
        # A copy of the state costs less than hashing the first parts anew for each input.
        digest = self._begun.copy()
        digest.update(value.encode() if isinstance(value, str) else input_bytes(value))
        return digest.digest()

    def keys(self, values: Sequence[Any]) -> list[bytes]:
        """The keys of checked inputs, in order."""
        begin, found = self._begun.copy, list[bytes]()
        for value in values:
            digest = begin()
            digest.update(value.encode() if isinstance(value, str) else input_bytes(value))
            found.append(digest.digest())
        return found
