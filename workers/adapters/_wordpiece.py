"""BERT's tokenizer for plain texts, in a dictionary's look-ups.

``tokenizers`` does for a text of ten ASCII words what it does for any: Unicode's normal forms, accents, character
classes, offsets. On a worker that was idle that takes 150 µs, since each of its tables has left the caches; with the
words of a vocabulary in a ``dict`` it is 35 (docs/performance.md). The ids are the same, or there are none: whatever is
not plainly simple is the library's, and so are many texts at once, for which it lets go of the interpreter.
"""

from __future__ import annotations

import json
import logging
import re
from typing import Any, Final, Self

from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

__all__ = ["FEW_TEXTS", "MOST_CHARS", "PlainWordPiece"]

logger = logging.getLogger(__name__)

#: The library reads more texts at once without the interpreter, which this would hold.
FEW_TEXTS: Final = 8
#: A longer text would keep the interpreter from other threads for too long.
MOST_CHARS: Final = 2_000
#: BertPreTokenizer on printable ASCII: white space parts words, each punctuation mark is one of its own.
_words: Final = re.compile(r"[0-9A-Za-z]+|[^0-9A-Za-z ]").findall
#: What it must agree on with the library before it is used.
_SAMPLES: Final = (
    "",
    " ",
    "a",
    "The quick brown fox jumps over the lazy dog.",
    "antidisestablishmentarianism, floccinaucinihilipilification!",
    "e-mail: someone_else@example.org (or not?) 'quoted' \"twice\" 3.14159 $5 100% a/b\\c ~^`|{}<>=+*&;#",
    "x" * 101 + " " + "q" * 100 + " zzzzqqqq",
    "UPPER lower MiXeD iPhone 42nd don't",
)


class PlainWordPiece:
    """Thread-safe."""

    def __init__(self, backend: Tokenizer, described: dict[str, Any]) -> None:
        """``described``: the tokenizer as JSON."""
        model = described["model"]
        self._vocab: dict[str, int] = model["vocab"]
        self._unknown = self._vocab[model["unk_token"]]
        self._next = model["continuing_subword_prefix"]
        self._most_chars = model["max_input_chars_per_word"]
        self._lower = described["normalizer"]["lowercase"]
        #: Special and added tokens, which are found in a text before anything else is.
        self._added = [token["content"].lower() for token in described["added_tokens"]]
        whole, bare = backend.encode("a").ids, backend.encode("a", add_special_tokens=False).ids
        first = next(at for at in range(len(whole)) if whole[at : at + len(bare)] == bare)
        self._before, self._after = whole[:first], whole[first + len(bare) :]

    @classmethod
    def of(cls, backend: Tokenizer) -> Self | None:
        """For a tokenizer of this kind, set up without truncation or padding; None for any other."""
        parts: Any = (backend.normalizer, backend.pre_tokenizer, backend.model)
        if not all(map(isinstance, parts, (BertNormalizer, BertPreTokenizer, WordPiece))):
            return None
        described = json.loads(backend.to_str())
        # One beyond ASCII may be found where its accents are left out, one with a tab where a blank is.
        added = [token["content"] for token in described["added_tokens"]]
        if not all(content.isascii() and content.isprintable() for content in added):
            return None
        try:
            made = cls(backend, described)
        except (KeyError, StopIteration):
            return None
        for text in _SAMPLES:
            encoding = backend.encode(text)
            if made.ids(text) not in (None, encoding.ids) or any(encoding.type_ids):
                logger.info("a tokenizer of BERT's kind has ways of its own; its library reads every text")
                return None
        return made

    def ids(self, text: str) -> list[int] | None:
        """The ids of a text, special ones included; None when it takes the library to tell."""
        if len(text) > MOST_CHARS or not (text.isascii() and text.isprintable()):
            return None
        lowered = text.lower()
        for token in self._added:
            if token in lowered:
                return None
        ids = self._before.copy()
        known = self._vocab.get
        for word in _words(lowered if self._lower else text):
            found = known(word)
            if found is not None and len(word) <= self._most_chars:
                ids.append(found)
            else:
                ids += self._pieces(word)
        return ids + self._after

    def _pieces(self, word: str) -> list[int]:
        """The longest piece that is known, and so on with the rest."""
        if len(word) > self._most_chars:
            return [self._unknown]
        pieces: list[int] = []
        begin = 0
        while begin < len(word):
            for end in range(len(word), begin, -1):
                piece = word[begin:end] if begin == 0 else self._next + word[begin:end]
                found = self._vocab.get(piece)
                if found is not None:
                    pieces.append(found)
                    begin = end
                    break
            else:
                return [self._unknown]
        return pieces
