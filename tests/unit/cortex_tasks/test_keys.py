"""Content addresses: equal questions share a key, and nothing else does."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortex_tasks.keys import KEY_BYTES, Address, input_bytes, stored_params
from cortex_tasks.payloads import ClassifyParams, EmbedParams, Encoding, ForecastParams, Params, Series, ZeroShotParams

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
parts = st.tuples(texts, texts, texts, texts, texts)


def key(task: str, alias: str, revision: str, canonical: str, value: Any) -> bytes:
    return Address(task, alias, revision, canonical).key(value)


@given(parts, parts)
def test_two_questions_share_a_key_only_when_they_are_one(one: tuple[str, ...], other: tuple[str, ...]) -> None:
    assert (key(*one) == key(*other)) == (one == other)


@given(texts, texts, texts)
def test_moving_a_character_from_one_part_to_the_next_changes_the_key(a: str, b: str, c: str) -> None:
    assert key(a + "x", b, c, "{}", "t") != key(a, "x" + b, c, "{}", "t")
    assert key("embed", a, b + "x", c, "t") != key("embed", a, b, "x" + c, "t")
    assert key("embed", a, b, c + "x", "t") != key("embed", a, b, c, "xt")


def test_a_payload_sent_to_two_models_has_two_keys() -> None:
    """MLServer leaves the model's name out of its cache's key: the second model gets the first one's answer."""
    assert key("embed", "minilm", "rev", "{}", "text") != key("embed", "other", "rev", "{}", "text")


def test_two_revisions_and_two_tasks_have_keys_of_their_own() -> None:
    keys = {key(task, "m", revision, "{}", "text") for task in ("embed", "features") for revision in ("fp32", "int8")}
    assert len(keys) == 4


@given(st.lists(texts, max_size=5))
def test_keys_are_long_enough_and_those_of_many_inputs_are_each_ones_own(values: list[str]) -> None:
    address = Address("embed", "m", "r", "{}")
    assert address.keys(values) == [address.key(value) for value in values]
    assert all(len(found) == KEY_BYTES >= 16 for found in address.keys(values))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (ZeroShotParams(labels=("a", "b")), ZeroShotParams.model_validate({"labels": ["a", "b"], "multi_label": 0})),
        (ForecastParams(horizon=30), ForecastParams.model_validate({"changepoint_prior_scale": 0.05})),
        (ClassifyParams(top_k=None), ClassifyParams()),
    ],
)
def test_parameters_written_differently_are_one_question(one: Params, other: Params) -> None:
    assert one.canonical() == other.canonical()


finite = st.floats(allow_nan=False, allow_infinity=False)


@given(st.lists(finite, min_size=2, max_size=5), st.lists(finite, min_size=2, max_size=5))
def test_series_are_told_apart_by_each_value(one: list[float], other: list[float]) -> None:
    def series(values: list[float]) -> Series:
        return Series(ds=tuple(f"2024-01-{day + 1:02}" for day in range(len(values))), y=tuple(values))

    same = [value.hex() for value in one] == [value.hex() for value in other]
    assert (input_bytes(series(one)) == input_bytes(series(other))) == same


def test_series_are_told_apart_by_their_timestamps() -> None:
    one, other = Series(ds=("2024-01-01", "2024-01-02"), y=(1, 2)), Series(ds=("2024-01-01", "2024-01-03"), y=(1, 2))
    assert input_bytes(one) != input_bytes(other)


any_form = st.builds(
    EmbedParams,
    normalize=st.booleans(),
    truncate=st.booleans(),
    dimensions=st.none() | st.integers(1, 4096),
    encoding=st.sampled_from(get_args(Encoding)),
)


@given(any_form, texts)
def test_all_forms_of_one_embedding_share_a_key(form: EmbedParams, text: str) -> None:
    stored = stored_params(form, "sentence_transformers")
    assert stored == EmbedParams(normalize=False)
    own, other = stored.canonical(), EmbedParams(normalize=False).canonical()
    assert key("embed", "minilm", "r", own, text) == key("embed", "minilm", "r", other, text)


@given(any_form, any_form, st.tuples(texts, texts), st.tuples(texts, texts))
def test_no_form_of_two_models_or_revisions_shares_a_key(
    one: EmbedParams, other: EmbedParams, here: tuple[str, str], there: tuple[str, str]
) -> None:
    first, second = (stored_params(form, "sentence_transformers").canonical() for form in (one, other))
    assert (key("embed", *here, first, "t") == key("embed", *there, second, "t")) == (here == there)


def test_a_model_whose_raw_vector_is_not_known_to_be_the_source_stores_each_form() -> None:
    assert stored_params(EmbedParams(), "echo") != stored_params(EmbedParams(normalize=False), "echo")


def test_other_parameters_are_stored_as_they_are() -> None:
    params = ClassifyParams(top_k=3, truncate=True)
    assert stored_params(params, "transformers") is params
