"""Make-believe answers: of the right shape, and only their own input's."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortex_tasks.catalog import TASKS, InputKind, TaskSpec
from cortex_tasks.echo import DIMENSIONS, FAIL, echo, echo_vector
from cortex_tasks.errors import CortexError, InferenceFailed, InvalidInput
from cortex_tasks.payloads import (
    AnnotateParams,
    ClassifyParams,
    EmbedParams,
    FeaturesParams,
    FillMaskParams,
    ForecastParams,
    Params,
    Series,
    Timings,
    ZeroShotParams,
)

series = st.lists(st.floats(-1e9, 1e9), min_size=2, max_size=30).map(
    lambda ys: Series(ds=tuple(f"2024-01-{day + 1:02}T00:00:00" for day in range(len(ys))), y=tuple(ys))
)


def default_params(spec: TaskSpec) -> Params:
    return spec.params.model_validate({"labels": ["a", "b"]} if spec.name == "zero_shot" else {})


@pytest.mark.parametrize("spec", TASKS.values(), ids=TASKS)
@given(data=st.data())
def test_every_task_gives_a_result_of_its_class_or_an_error(spec: TaskSpec, data: st.DataObject) -> None:
    value = data.draw(st.text(min_size=1) if spec.input is InputKind.TEXT else series)
    outcome = echo(spec.name, value, default_params(spec))
    if isinstance(outcome, CortexError):
        assert isinstance(outcome, InvalidInput | InferenceFailed)
    else:
        spec.result.model_validate({**outcome, "model": "echo", "revision": "r", "timings": Timings()})


@given(st.text(), st.text())
def test_a_vector_is_its_texts_alone(one: str, other: str) -> None:
    assert len(echo_vector(one)) == DIMENSIONS
    assert all(-1 <= value <= 1 for value in echo_vector(one))
    assert (echo_vector(one) == echo_vector(other)) == (one == other)


def test_a_text_may_ask_to_fail() -> None:
    assert isinstance(echo("embed", f"please {FAIL}", EmbedParams()), InferenceFailed)


def test_a_text_without_a_mask_cannot_be_filled() -> None:
    assert isinstance(echo("fill_mask", "no mask", FillMaskParams()), InvalidInput)
    filled = echo("fill_mask", "[MASK] and [MASK]", FillMaskParams(top_k=2))
    assert isinstance(filled, dict)
    assert [len(mask) for mask in filled["masks"]] == [2, 2]


def test_parameters_are_followed() -> None:
    only = echo("annotate", "Ada writes", AnnotateParams(include=("entities",)))
    assert only == {"entities": [{"text": "Ada", "start": 0, "end": 3, "label": "ECHO"}]}
    best = echo("classify", "x", ClassifyParams(top_k=1))
    assert isinstance(best, dict)
    assert len(best["labels"]) == 1
    shape = echo("features", "x", FeaturesParams(pooling="none"))
    assert isinstance(shape, dict)
    assert shape["shape"] == [1, DIMENSIONS]


def test_labels_come_best_first() -> None:
    scored = echo("zero_shot", "x", ZeroShotParams(labels=("a", "b", "c")))
    assert isinstance(scored, dict)
    scores = [entry["score"] for entry in scored["labels"]]
    assert scores == sorted(scores, reverse=True)
    assert sum(scores) == pytest.approx(1)


def test_a_forecast_goes_on_with_the_last_step() -> None:
    history = Series(ds=("2024-01-01T00:00:00", "2024-01-02T00:00:00"), y=(1.0, 2.0))
    future = echo("forecast", history, ForecastParams(horizon=2))
    assert isinstance(future, dict)
    assert future["ds"] == ["2024-01-03T00:00:00", "2024-01-04T00:00:00"]
    whole = echo("forecast", history, ForecastParams(horizon=2, include_history=True))
    assert isinstance(whole, dict)
    assert whole["ds"] == [*history.ds, *future["ds"]]


def test_a_task_it_does_not_know_is_an_error() -> None:
    assert isinstance(echo("new", "x", Params()), InferenceFailed)
