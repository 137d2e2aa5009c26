"""The adapter against transformers.pipeline, on tiny DistilBERT models built from a seed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import pipeline

from cortex_tasks.catalog import TASKS
from cortex_tasks.errors import ConfigError, CortexError, InvalidInput, InvalidParameter, ModelUnavailable
from tests.support import tiny_models
from workers.adapters._heads import MAX_MASKS
from workers.adapters._torch import TokensReader, chunks, collate
from workers.adapters.base import LoadContext
from workers.adapters.transformers import TransformersAdapter

pytestmark = pytest.mark.models

TOLERANCE = 1e-5
TEXTS = [
    "The cat sat on the mat.",
    "music",
    "A great film about politics in Paris, the capital of France!",
    "naïve café 🎉 一个",
    "   spaces   and\ttabs\n",
    "slow queue, fast worker " * 30,
    "?",
    "not [SEP] special [PAD] at all",
]
MASKED = [
    "Paris is the [MASK] of France.",
    "[MASK]",
    "the [MASK] sat on the [MASK] with a [MASK]",
    "A good, good [MASK]",
    "[MASK] [MASK] [PAD] !",
]
LABELS = ["sport", "politics", "a slow queue", "London"]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("models")
    return {
        "encoder": tiny_models.encoder(directory / "encoder"),
        "masked_lm": tiny_models.masked_lm(directory / "masked_lm"),
        "classifier": tiny_models.classifier(directory / "classifier"),
        "multi_label": tiny_models.classifier(directory / "multi_label", multi_label=True),
        "nli": tiny_models.nli(directory / "nli"),
        "nli_last": tiny_models.nli(directory / "nli_last", entailment_id=2),
    }


@pytest.fixture(scope="module")
def adapters(paths: dict[str, Path]) -> dict[str, TransformersAdapter]:
    return {
        "masked_lm": _load(paths["masked_lm"], "fill_mask", "features"),
        "classifier": _load(paths["classifier"], "classify", "features"),
        "multi_label": _load(paths["multi_label"], "classify"),
        "nli": _load(paths["nli"], "zero_shot", "classify"),
        "nli_last": _load(paths["nli_last"], "zero_shot", chunk_tokens=50),
    }


def _load(path: Path | None, *tasks: str, **options: Any) -> TransformersAdapter:
    return TransformersAdapter.load(LoadContext("tiny", path, "0" * 64, tasks, options))


def _run(adapter: TransformersAdapter, task: str, texts: Sequence[Any], **params: Any) -> list[dict[str, Any]]:
    checked = TASKS[task].params.model_validate(params)
    items = []
    for entry in adapter.prepare(task, texts, checked):
        assert not isinstance(entry, CortexError), entry
        items.append(entry)
    return adapter.finish(task, items, adapter.forward(task, items, checked), checked)


def _refused(adapter: TransformersAdapter, task: str, texts: Sequence[Any], **params: Any) -> list[CortexError]:
    entries = adapter.prepare(task, texts, TASKS[task].params.model_validate(params))
    assert all(isinstance(entry, CortexError) for entry in entries)
    return [entry for entry in entries if isinstance(entry, CortexError)]


def _assert_same_labels(got: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [entry["label"] for entry in got] == [entry["label"] for entry in expected]
    assert [entry["score"] for entry in got] == pytest.approx([entry["score"] for entry in expected], abs=TOLERANCE)


# --------------------------------------------------------------------------------------------------- classify


@pytest.mark.parametrize("model", ["classifier", "multi_label"])
@pytest.mark.parametrize("top_k", [None, 1, 2, 10])
def test_classify_answers_as_the_pipeline(
    paths: dict[str, Path], adapters: dict[str, TransformersAdapter], model: str, top_k: int | None
) -> None:
    library = pipeline("text-classification", str(paths[model]), device="cpu")
    for value, expected in zip(
        _run(adapters[model], "classify", TEXTS, top_k=top_k), library(TEXTS, top_k=top_k, truncation=True), strict=True
    ):
        _assert_same_labels(value["labels"], expected)


@pytest.mark.parametrize(("multi_label", "function"), [(True, "sigmoid"), (False, "softmax")])
@pytest.mark.parametrize("model", ["classifier", "multi_label"])
def test_classify_takes_the_function_it_is_told(
    paths: dict[str, Path], adapters: dict[str, TransformersAdapter], model: str, multi_label: bool, function: str
) -> None:
    library = pipeline("text-classification", str(paths[model]), device="cpu")
    expected = library(TEXTS, top_k=None, truncation=True, function_to_apply=function)
    for value, labels in zip(_run(adapters[model], "classify", TEXTS, multi_label=multi_label), expected, strict=True):
        _assert_same_labels(value["labels"], labels)


def test_classify_says_which_texts_were_cut(adapters: dict[str, TransformersAdapter]) -> None:
    values = _run(adapters["classifier"], "classify", TEXTS)
    assert [value["truncated"] for value in values] == [text.startswith("slow queue") for text in TEXTS]


# --------------------------------------------------------------------------------------------------- features


@pytest.mark.parametrize("model", ["masked_lm", "classifier"])
def test_features_are_the_pipelines_hidden_states(
    paths: dict[str, Path], adapters: dict[str, TransformersAdapter], model: str
) -> None:
    library = pipeline("feature-extraction", str(paths[model]), device="cpu")
    expected = [np.array(rows[0]) for rows in library(TEXTS, truncation=True)]
    for pooling, pooled in {
        "none": expected,
        "mean": [rows.mean(axis=0) for rows in expected],
        "cls": [rows[0] for rows in expected],
    }.items():
        for value, array in zip(_run(adapters[model], "features", TEXTS, pooling=pooling), pooled, strict=True):
            assert tuple(value["shape"]) == array.shape
            got = np.frombuffer(value["data"], "<f4").reshape(value["shape"])
            np.testing.assert_allclose(got, array, atol=TOLERANCE)


def test_features_of_a_bare_encoder_are_those_of_the_pipeline(paths: dict[str, Path]) -> None:
    library = pipeline("feature-extraction", str(paths["encoder"]), device="cpu")
    value = _run(_load(paths["encoder"], "features"), "features", TEXTS[:1])[0]
    np.testing.assert_allclose(np.frombuffer(value["data"], "<f4"), np.ravel(library(TEXTS[0])), atol=TOLERANCE)


def test_two_tasks_share_one_copy_of_the_weights(paths: dict[str, Path]) -> None:
    alone, both = _load(paths["masked_lm"], "fill_mask"), _load(paths["masked_lm"], "features", "fill_mask")
    assert both.size_bytes == alone.size_bytes > 0
    both.close()
    assert both.size_bytes == 0


# -------------------------------------------------------------------------------------------------- fill_mask


@pytest.mark.parametrize("top_k", [1, 5, 60])
def test_fill_mask_answers_as_the_pipeline(
    paths: dict[str, Path], adapters: dict[str, TransformersAdapter], top_k: int
) -> None:
    library = pipeline("fill-mask", str(paths["masked_lm"]), device="cpu")
    for text, value in zip(MASKED, _run(adapters["masked_lm"], "fill_mask", MASKED, top_k=top_k), strict=True):
        expected = library(text, top_k=top_k)
        expected = [expected] if isinstance(expected[0], dict) else expected
        assert len(value["masks"]) == len(expected)
        for got, mask in zip(value["masks"], expected, strict=True):
            assert [(fill["token"], fill["sequence"]) for fill in got] == [
                (fill["token_str"], fill["sequence"]) for fill in mask
            ]
            assert [fill["score"] for fill in got] == pytest.approx([fill["score"] for fill in mask], abs=TOLERANCE)


def test_fill_mask_gives_no_more_candidates_than_there_are_words(tmp_path: Path) -> None:
    adapter = _load(tiny_models.masked_lm(tmp_path), "fill_mask")
    assert len(tiny_models.tokenizer()) > 100
    assert len(_run(adapter, "fill_mask", ["a [MASK]"], top_k=100)[0]["masks"][0]) == 100


def test_mask_stands_for_the_mask_token_of_any_tokenizer(paths: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoTokenizer, DistilBertForMaskedLM

    DistilBertForMaskedLM.from_pretrained(paths["masked_lm"]).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(paths["masked_lm"])
    file = tmp_path / "tokenizer.json"
    tokenizer.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        file = tmp_path / name
        file.write_text(file.read_text().replace("[MASK]", "<mask>"))
    renamed = _load(tmp_path, "fill_mask")
    ours, theirs = (_run(renamed, "fill_mask", [f"Paris is the {mask} of France."]) for mask in ("[MASK]", "<mask>"))
    assert ours == theirs


def test_a_text_without_a_mask_is_refused_before_it_is_computed(adapters: dict[str, TransformersAdapter]) -> None:
    refused = _refused(adapters["masked_lm"], "fill_mask", ["no mask", "[mask]", "[MASK] " * (MAX_MASKS + 1)])
    assert all(isinstance(error, InvalidInput) for error in refused)
    assert "needs a [MASK] in the text" in str(refused[0])
    assert f"{MAX_MASKS + 1} masks; the limit is {MAX_MASKS}" in str(refused[2])


def test_a_masked_text_over_the_window_is_cut_only_when_asked(adapters: dict[str, TransformersAdapter]) -> None:
    early, late = "the [MASK] " + "cat " * 60, "cat " * 60 + "[MASK]"
    refused = _refused(adapters["masked_lm"], "fill_mask", [early, late])
    assert all("more than the 48 tokens" in str(error) for error in refused)
    assert len(_run(adapters["masked_lm"], "fill_mask", [early], truncate=True)[0]["masks"]) == 1
    (error,) = _refused(adapters["masked_lm"], "fill_mask", [late], truncate=True)
    assert "first 48 tokens" in str(error)


# -------------------------------------------------------------------------------------------------- zero_shot


@pytest.mark.parametrize("model", ["nli", "nli_last"])
@pytest.mark.parametrize("multi_label", [True, False])
@pytest.mark.parametrize("labels", [LABELS, ["music"]])
def test_zero_shot_answers_as_the_pipeline(
    paths: dict[str, Path],
    adapters: dict[str, TransformersAdapter],
    model: str,
    multi_label: bool,
    labels: list[str],
) -> None:
    library = pipeline("zero-shot-classification", str(paths[model]), device="cpu")
    for template in ("This example is {}.", "{}!", "it is about {} and not about {}".replace("{}", "{0}")):
        ours = template.replace("{0}", "{}")
        values = _run(
            adapters[model], "zero_shot", TEXTS, labels=labels, multi_label=multi_label, hypothesis_template=ours
        )
        for text, value in zip(TEXTS, values, strict=True):
            expected = library(text, labels, multi_label=multi_label, hypothesis_template=template)
            pairs = zip(expected["labels"], expected["scores"], strict=True)
            _assert_same_labels(value["labels"], [{"label": label, "score": score} for label, score in pairs])


def test_zero_shot_cuts_the_text_and_not_the_hypothesis(
    paths: dict[str, Path], adapters: dict[str, TransformersAdapter]
) -> None:
    library = pipeline("zero-shot-classification", str(paths["nli"]), device="cpu")
    template, text = "the day and the night and " * 5 + "{}", "cat film music " * 12
    (value,) = _run(adapters["nli"], "zero_shot", [text], labels=LABELS, hypothesis_template=template)
    expected = library(text, LABELS, hypothesis_template=template)
    assert [entry["label"] for entry in value["labels"]] == expected["labels"]
    assert [entry["score"] for entry in value["labels"]] == pytest.approx(expected["scores"], abs=TOLERANCE)
    values = _run(adapters["nli"], "zero_shot", ["cat " * 30, "cat " * 60], labels=LABELS)
    assert [value["truncated"] for value in values] == [False, True]


def test_the_cost_of_zero_shot_counts_every_label(adapters: dict[str, TransformersAdapter]) -> None:
    few, many = (
        adapters["nli"].prepare("zero_shot", ["cat"], TASKS["zero_shot"].params(labels=labels))[0]
        for labels in (("sport",), ("sport",) * 7)
    )
    assert not isinstance(few, CortexError)
    assert not isinstance(many, CortexError)
    # [CLS] cat [SEP] this example is sport . [SEP]
    assert (few.cost_tokens, many.cost_tokens) == (9, 63)


def test_a_label_that_leaves_no_room_for_a_text_is_refused(adapters: dict[str, TransformersAdapter]) -> None:
    refused = _refused(adapters["nli"], "zero_shot", ["a", "b"], labels=["sport", "very " * 38])
    assert all(isinstance(error, InvalidParameter) for error in refused)
    assert "'very very" in str(refused[0])


def test_a_template_is_filled_in_and_nothing_else_of_it_is_interpreted(
    adapters: dict[str, TransformersAdapter],
) -> None:
    hostile = "{} {0.__class__} {x} }{"
    (value,) = _run(adapters["nli"], "zero_shot", ["cat"], labels=["a", "b"], hypothesis_template=hostile)
    assert sum(entry["score"] for entry in value["labels"]) == pytest.approx(1)


# ------------------------------------------------------------------------------- neighbours, bad input, loading


def _texts() -> st.SearchStrategy[str]:
    words = st.sampled_from(["cat", "film", "Paris", "slow", "queue", ".", "é", "🎉", "xyz", "the"])
    return st.lists(words, min_size=1, max_size=60).map(" ".join)


@settings(max_examples=20, deadline=None)
@given(neighbours=st.lists(_texts(), max_size=6), place=st.integers(0, 6), text=_texts())
@pytest.mark.parametrize(
    ("model", "task", "params"),
    [
        ("masked_lm", "fill_mask", {"truncate": True}),
        ("masked_lm", "features", {"pooling": "mean"}),
        ("classifier", "classify", {}),
        ("multi_label", "classify", {}),
        ("nli", "zero_shot", {"labels": LABELS}),
        ("nli_last", "zero_shot", {"labels": LABELS, "multi_label": True}),
    ],
)
def test_an_answer_does_not_depend_on_neighbours_or_place(
    adapters: dict[str, TransformersAdapter],
    model: str,
    task: str,
    params: dict[str, Any],
    neighbours: list[str],
    place: int,
    text: str,
) -> None:
    place = min(place, len(neighbours))
    batch = [*neighbours[:place], text, *neighbours[place:]]
    if task == "fill_mask":
        batch = [f"[MASK] {entry}" for entry in batch]
    (alone,) = _run(adapters[model], task, [batch[place]], **params)
    among = _run(adapters[model], task, batch, **params)[place]
    if task == "features":
        np.testing.assert_allclose(
            np.frombuffer(among["data"], "<f4"), np.frombuffer(alone["data"], "<f4"), atol=TOLERANCE
        )
    elif task == "fill_mask":
        assert [fill["token"] for fill in among["masks"][0]] == [fill["token"] for fill in alone["masks"][0]]
    else:
        _assert_same_labels(among["labels"], alone["labels"])


@pytest.mark.parametrize("task", ["classify", "zero_shot"])
def test_a_bad_text_fails_alone(adapters: dict[str, TransformersAdapter], task: str) -> None:
    params = TASKS[task].params.model_validate({"labels": ["a"]} if task == "zero_shot" else {})
    entries = adapters["nli"].prepare(task, ["good", "\udfff", None, "fine"], params)
    assert [isinstance(entry, InvalidInput) for entry in entries] == [False, True, True, False]


@pytest.mark.parametrize(
    ("model", "task", "lacks"),
    [
        ("encoder", "classify", "classifier.weight"),
        ("encoder", "fill_mask", "vocab_"),
        ("masked_lm", "zero_shot", "classifier.bias"),
        ("classifier", "fill_mask", "vocab_"),
    ],
)
def test_a_model_without_the_tasks_head_is_refused_at_load(
    paths: dict[str, Path], model: str, task: str, lacks: str
) -> None:
    with pytest.raises(ConfigError, match=f"cannot serve {task}: its files hold DistilBert.*lack .*{lacks}"):
        _load(paths[model], task)


def test_zero_shot_needs_an_entailment_label(paths: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"none of its labels \(music, politics, sport\) is an entailment"):
        _load(paths["classifier"], "zero_shot")


def test_options_tasks_and_snapshots_are_checked_at_load(paths: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"models\.tiny\.options\.max_len .*did you mean 'max_length'"):
        _load(paths["encoder"], "features", max_len=8)
    with pytest.raises(ConfigError, match=r"models\.tiny\.tasks.*not embed"):
        _load(paths["encoder"], "embed")
    with pytest.raises(ModelUnavailable, match="cannot be loaded"):
        _load(tmp_path, "features")
    with pytest.raises(ModelUnavailable, match="needs weights"):
        _load(None, "features")


def test_a_shorter_window_can_be_asked_for(paths: dict[str, Path]) -> None:
    adapter = _load(paths["encoder"], "features", max_length=8)
    (value,) = _run(adapter, "features", ["cat " * 20])
    assert (value["shape"], value["truncated"]) == ([8, tiny_models.HIDDEN], True)


# ------------------------------------------------------------------------------------------------ shared parts


@given(lengths=st.lists(st.integers(1, 50), max_size=40), budget=st.integers(1, 200))
def test_chunks_cover_the_rows_in_order_within_the_budget(lengths: list[int], budget: int) -> None:
    parts = [list(range(len(lengths)))[part] for part in chunks(lengths, budget)]
    assert [index for part in parts for index in part] == list(range(len(lengths)))
    assert all(len(part) == 1 or len(part) * max(lengths[i] for i in part) <= budget for part in parts)
    assert all(parts)


def test_padding_and_segments_are_the_tokenizers_own() -> None:
    from transformers import BertTokenizer

    tokenizer = BertTokenizer(vocab=tiny_models.tokenizer().get_vocab(), model_max_length=16)
    firsts, seconds = ["cat", "the cat sat on the mat " * 4, "é"], ["a film", "sport", "one two"]
    expected = tokenizer(firsts, seconds, padding=True, truncation="only_first", return_tensors="pt")
    bare, pairs = TokensReader(tokenizer, None), TokensReader(tokenizer, 16, "only_first")
    rows = [pairs.pair(a, b) for a, b in zip(bare.bare(firsts), bare.bare(seconds), strict=True)]
    got = collate(rows, tokenizer, "cpu")
    assert got.keys() == expected.keys() == {"input_ids", "attention_mask", "token_type_ids"}
    assert all((got[name] == expected[name]).all() for name in got)


def test_a_tokenizer_that_pads_on_the_left_changes_no_answer(
    adapters: dict[str, TransformersAdapter], tmp_path: Path
) -> None:
    path = tiny_models.masked_lm(tmp_path)
    file = path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "padding_side": "left"}))
    expected = _run(adapters["masked_lm"], "fill_mask", MASKED)
    assert _run(_load(path, "fill_mask"), "fill_mask", MASKED) == expected
