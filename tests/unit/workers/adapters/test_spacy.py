"""The adapter against ``nlp(text)`` itself: the rules, and a trained pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cortex_tasks.errors import ConfigError, CortexError, InvalidInput, ModelUnavailable
from cortex_tasks.payloads import AnnotateParams, Document, Timings
from tests.support.tiny_spacy import tagger_and_ner
from workers.adapters._spacy_rules import STAGES, blank_pipeline
from workers.adapters.base import Item, LoadContext
from workers.adapters.spacy import FALLBACK_NOTE, SpacyAdapter, load_pipeline
from workers.children import ChildHost

pytestmark = pytest.mark.models

ALL = AnnotateParams()
TEXTS = [
    "Dr. Ada Lovelace paid $5 million to Acme Inc. in London on 10 December 1842. She did!",
    "one",
    ".",
    "  leading,  double  and trailing white space \n\n",
    "Zürich – naïve café: ﬁ ligature, e\u0301 composed, ß",
    "👩‍👩‍👧‍👦 costs €20 🎉. 漢字とかな。 مرحبا بالعالم 5%",
    "\x00\x01 control \u200b\ufeff\u2028 and \U0010ffff",
    "Bob sold Acme Corp. Rain fell in Paris, 3 times, at 5 p.m.; see https://example.org or a@b.com",
    "A" * 3000,
    "word " * 1500,
]
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60).filter(lambda t: not t.isspace())
WORDS = st.sampled_from(["Paris", "Mr.", "Smith", "$", "5", "million", "%", "in", "May", "2024", ",", "Inc.", "first"])
PHRASE = st.lists(WORDS, min_size=1, max_size=12).map(" ".join)


def context(snapshot: Path | None = None, **options: Any) -> LoadContext:
    return LoadContext("spacy", snapshot, "d" if snapshot else "", ("annotate",), options)


@pytest.fixture(scope="module")
def trained_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tagger_and_ner(tmp_path_factory.mktemp("package") / "en_tiny" / "en_tiny-0.0.0")


@pytest.fixture(scope="module")
def rules() -> SpacyAdapter:
    return SpacyAdapter.load(context())


@pytest.fixture(scope="module")
def trained(trained_path: Path) -> SpacyAdapter:
    return SpacyAdapter.load(context(trained_path))


@pytest.fixture(params=["rules", "trained"])
def adapter(request: pytest.FixtureRequest) -> SpacyAdapter:
    loaded: SpacyAdapter = request.getfixturevalue(request.param)
    return loaded


def run(adapter: SpacyAdapter, texts: Sequence[str], params: AnnotateParams = ALL) -> list[dict[str, Any]]:
    items = [item for item in adapter.prepare("annotate", texts, params) if isinstance(item, Item)]
    assert len(items) == len(texts)
    return adapter.finish("annotate", items, adapter.forward("annotate", items, params), params)


def reference(nlp: Any, text: str) -> dict[str, Any]:
    """The library's own answer, alone and outside of any batch."""
    doc = nlp(text)
    return {
        "tokens": [
            {"text": t.text, "start": t.idx, "end": t.idx + len(t)}
            | {"lemma": t.lemma_, "pos": t.pos_, "tag": t.tag_, "dep": t.dep_}
            for t in doc
        ],
        "sentences": [{"text": s.text, "start": s.start_char, "end": s.end_char} for s in doc.sents],
        "entities": [{"text": e.text, "label": e.label_, "start": e.start_char, "end": e.end_char} for e in doc.ents],
    }


def entities(adapter: SpacyAdapter, text: str) -> list[tuple[str, str]]:
    (value,) = run(adapter, [text], AnnotateParams(include=("entities",)))
    return [(entity["text"], entity["label"]) for entity in value["entities"]]


# ---------------------------------------------------------------------------------------------- fidelity


def test_the_rules_answer_as_their_pipeline_does(rules: SpacyAdapter) -> None:
    nlp = blank_pipeline()
    assert run(rules, TEXTS) == [reference(nlp, text) for text in TEXTS]


def test_a_trained_pipeline_answers_as_it_does_by_itself(trained: SpacyAdapter, trained_path: Path) -> None:
    import spacy

    nlp = spacy.load(trained_path)
    nlp.add_pipe("sentencizer")
    answers = run(trained, TEXTS)
    assert answers == [reference(nlp, text) for text in TEXTS]
    assert [entity["label"] for entity in answers[7]["entities"]] != []
    assert {token["tag"] for token in answers[0]["tokens"]} != {""}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(ANY_TEXT | PHRASE, min_size=1, max_size=5))
def test_an_answer_does_not_depend_on_its_neighbours(adapter: SpacyAdapter, texts: list[str]) -> None:
    together = run(adapter, texts)
    assert together == [run(adapter, [text])[0] for text in texts]
    assert run(adapter, texts[::-1]) == together[::-1]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ANY_TEXT | PHRASE)
def test_offsets_are_characters_of_the_submitted_text(adapter: SpacyAdapter, text: str) -> None:
    (value,) = run(adapter, [text])
    for part in ("tokens", "sentences", "entities"):
        for span in value[part]:
            assert text[span["start"] : span["end"]] == span["text"]
    assert value["tokens"][0]["start"] == 0
    assert "".join(token["text"] for token in value["tokens"]).replace(" ", "") == text.replace(" ", "")
    document = Document(model="spacy", revision="r", timings=Timings(), **value)
    assert document.tokens[-1].end <= len(text)


def test_only_what_is_asked_for_is_answered(adapter: SpacyAdapter) -> None:
    (whole,) = run(adapter, [TEXTS[0]])
    for part in ("tokens", "sentences", "entities"):
        (value,) = run(adapter, [TEXTS[0]], AnnotateParams.model_validate({"include": [part]}))
        assert value == {part: whole[part]}


def test_children_answer_alike(rules: SpacyAdapter) -> None:
    hosted = ChildHost("spacy", context(), 2, time_limit_s=120.0)
    try:
        items: list[Any] = hosted.prepare("annotate", TEXTS, ALL)
        assert list(hosted.forward("annotate", items, ALL)) == run(rules, TEXTS)
        assert hosted.note == FALLBACK_NOTE
        assert hosted.version == rules.version
        assert hosted.library == rules.library
    finally:
        hosted.close()


# ------------------------------------------------------------------------------------------------- rules


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It cost $5.50, US$ 5 million, €3bn or five million dollars.",
         [("$5.50", "MONEY"), ("US$ 5 million", "MONEY"), ("€3bn", "MONEY"), ("five million dollars", "MONEY")]),
        ("Sales rose 20%, ten percent, or 20-30%.", [("20%", "PERCENT"), ("ten percent", "PERCENT"),
                                                     ("20-30%", "PERCENT")]),
        ("Be there on 2024-01-31, 31/01/2024, the 3rd of May, 2024 or Jan. 5th.",
         [("2024-01-31", "DATE"), ("31/01/2024", "DATE"), ("3rd of May, 2024", "DATE"), ("Jan. 5th", "DATE")]),
        ("Next Monday, five days ago, in the 1990s, in Q3 2024, in 1984.",
         [("Next Monday", "DATE"), ("five days ago", "DATE"), ("1990s", "DATE"), ("Q3 2024", "DATE"),
          ("1984", "DATE")]),
        ("At 3pm, 10:30am, 5 p.m., noon; it took two hours.",
         [("3pm", "TIME"), ("10:30am", "TIME"), ("5 p.m.", "TIME"), ("noon", "TIME"), ("two hours", "TIME")]),
        ("Write to ada@example.com or see https://example.org/a?b=1",
         [("ada@example.com", "EMAIL"), ("https://example.org/a?b=1", "URL")]),
        ("Dr. Angela Maria Merkel met John F. Kennedy and Mr. O'Brien.",
         [("Dr. Angela Maria Merkel", "PERSON"), ("John F. Kennedy", "PERSON"), ("Mr. O'Brien", "PERSON")]),
        ("Acme, Inc. bought Johnson & Johnson Ltd. and Müller GmbH from the Bank of England.",
         [("Acme, Inc.", "ORG"), ("Johnson & Johnson Ltd.", "ORG"), ("Müller GmbH", "ORG"),
          ("Bank of England", "ORG")]),
        ("From New York City to the U.S. and South Korea via Zürich.",
         [("New York City", "GPE"), ("U.S.", "GPE"), ("South Korea", "GPE"), ("Zürich", "GPE")]),
        ("The first and the 2nd of 1,234 people; twenty five thousand men ran 5 km at 25°C.",
         [("first", "ORDINAL"), ("2nd", "ORDINAL"), ("1,234", "CARDINAL"), ("twenty five thousand", "CARDINAL"),
          ("5 km", "QUANTITY"), ("25°C", "QUANTITY")]),
        ("The Company said that I may march. A Bank is a bank; Our Group agrees.", []),
        ("She may go, he will, and the march was long.", []),
    ],
)  # fmt: skip
def test_the_rules_find(rules: SpacyAdapter, text: str, expected: list[tuple[str, str]]) -> None:
    assert entities(rules, text) == expected


def test_no_rule_repeats_without_bound() -> None:
    patterns = [p for stage in STAGES for patterns in stage.values() for p in patterns if not isinstance(p, str)]
    assert len(patterns) > 40
    assert {token.get("OP", "1")[0] for pattern in patterns for token in pattern} <= {"1", "?", "{"}


def test_sentences_end_at_punctuation(rules: SpacyAdapter) -> None:
    (value,) = run(rules, ["It rains. Does it? It does!"])
    assert [sentence["text"] for sentence in value["sentences"]] == ["It rains.", "Does it?", "It does!"]


# ------------------------------------------------------------------------------------------ load and limits


def test_operators_learn_what_they_have(rules: SpacyAdapter, trained: SpacyAdapter) -> None:
    assert SpacyAdapter.weights_optional
    assert rules.note == FALLBACK_NOTE
    assert rules.library.startswith("spacy 3.")
    assert rules.size_bytes > 10_000
    assert trained.note == ""
    assert "(en_tiny 0.0.0)" in trained.library
    assert trained.size_bytes > 1_000_000


def test_new_words_are_forgotten_after_each_batch(rules: SpacyAdapter) -> None:
    run(rules, ["warm up"])
    strings = rules._nlp.vocab.strings
    before = len(strings)
    run(rules, [f"neverseen{number}word" for number in range(500)])
    assert len(strings) == before


def test_a_package_is_loaded_from_the_directory_above_its_pipeline(trained_path: Path) -> None:
    assert load_pipeline(trained_path.parent).meta["name"] == "tiny"


def test_components_can_be_left_out(trained_path: Path) -> None:
    slim = SpacyAdapter.load(context(trained_path, exclude=["ner"]))
    (value,) = run(slim, [TEXTS[7]])
    assert value["entities"] == []
    assert {token["tag"] for token in value["tokens"]} != {""}


@pytest.mark.parametrize("options", [{"exclud": ["ner"]}, {"exclude": "ner"}])
def test_unknown_and_unusable_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="options"):
        SpacyAdapter.load(context(**options))


def test_what_is_no_pipeline_is_unavailable(tmp_path: Path, trained_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match=r"0 config\.cfg"):
        SpacyAdapter.load(context(tmp_path))
    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / "config.cfg").write_text((trained_path / "config.cfg").read_text())
    (torn / "meta.json").write_text((trained_path / "meta.json").read_text())
    with pytest.raises(ModelUnavailable, match="cannot load the pipeline"):
        SpacyAdapter.load(context(torn))


def test_a_text_beyond_the_librarys_limit_is_refused_by_itself(rules: SpacyAdapter) -> None:
    long, short = rules.prepare("annotate", ["a" * 1_000_001, "a"], ALL)
    assert isinstance(long, InvalidInput)
    assert not isinstance(short, CortexError)
    assert short.cost_tokens == 1
