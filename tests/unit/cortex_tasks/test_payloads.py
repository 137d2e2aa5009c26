"""Parameters and results: canonical forms, bounds, and the views of packed numbers."""

from __future__ import annotations

import copy
import json
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cortex_tasks import payloads as p

TIMES = p.Timings(queue_ms=1, prepare_ms=2, forward_ms=3, finish_ms=4)
HEAD: dict[str, Any] = {"model": "m", "revision": "r", "timings": TIMES}
PARAMS = [
    p.EmbedParams, p.AnnotateParams, p.ClassifyParams, p.FillMaskParams, p.FeaturesParams, p.ForecastParams,
    p.DecomposeParams, p.AnomalyParams,
]  # fmt: skip


@pytest.mark.parametrize("cls", PARAMS)
def test_defaults_written_out_are_the_same_parameters(cls: type[p.Params]) -> None:
    plain = cls()
    written = cls.model_validate(json.loads(plain.canonical()))
    assert plain.canonical() == written.canonical()
    assert plain == written


@given(st.booleans(), st.booleans())
def test_canonical_forms_differ_when_parameters_do(one: bool, other: bool) -> None:
    first, second = p.EmbedParams(normalize=one), p.EmbedParams(normalize=other)
    assert (first.canonical() == second.canonical()) == (one == other)


@pytest.mark.parametrize("cls", PARAMS)
def test_parameters_are_frozen_and_know_their_names(cls: type[p.Params]) -> None:
    with pytest.raises(ValidationError):
        cls.model_validate({"no_such": 1})
    with pytest.raises(ValidationError):
        setattr(cls(), next(iter(cls.model_fields)), None)


@pytest.mark.parametrize(
    ("cls", "wrong"),
    [
        (p.ClassifyParams, {"top_k": 0}),
        (p.ZeroShotParams, {"labels": []}),
        (p.ZeroShotParams, {"labels": [""]}),
        (p.ZeroShotParams, {"labels": ["a"] * 101}),
        (p.ZeroShotParams, {"labels": ["a"], "hypothesis_template": "no place for it"}),
        (p.FillMaskParams, {"top_k": 101}),
        (p.FeaturesParams, {"pooling": "max"}),
        (p.ForecastParams, {"horizon": 0}),
        (p.ForecastParams, {"interval_width": 1.0}),
        (p.ForecastParams, {"frequency": ""}),
        (p.AnomalyParams, {"changepoint_prior_scale": 0}),
        (p.AnnotateParams, {"include": ["verbs"]}),
    ],
)
def test_bounds(cls: type[p.Params], wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        cls.model_validate(wrong)


def test_a_vector_is_a_read_only_view_of_its_bytes() -> None:
    embedding = p.Embedding(**HEAD, data=struct.pack("<3f", 1.0, -2.5, 0.1))
    assert embedding.dimensions == 3
    assert embedding.vector.dtype == np.float32
    assert embedding.vector.tolist() == pytest.approx([1.0, -2.5, 0.1])
    assert not embedding.vector.flags.writeable
    assert "data" not in repr(embedding)


def test_features_have_their_shape() -> None:
    features = p.Features(**HEAD, data=struct.pack("<6f", *range(6)), shape=(2, 3))
    assert features.matrix.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_the_best_comes_first() -> None:
    labels = (p.LabelScore(label="POSITIVE", score=0.9), p.LabelScore(label="NEGATIVE", score=0.1))
    classified = p.Classification(**HEAD, labels=labels)
    assert (classified.label, classified.score) == ("POSITIVE", 0.9)
    fills = (p.Fill(token="a", score=0.5, sequence="a"),)
    assert p.FilledMask(**HEAD, masks=(fills, ())).candidates == fills


def test_timings_add_up() -> None:
    assert TIMES.total_ms == 10


def test_a_forecast_is_a_table() -> None:
    column = (1.0, 2.0)
    days = ("2024-01-01", "2024-01-02T12:00:00")
    forecast = p.Forecast(**HEAD, ds=days, yhat=column, yhat_lower=column, yhat_upper=column, trend=column)
    frame = forecast.to_dataframe()
    assert list(frame.columns) == ["ds", "yhat", "yhat_lower", "yhat_upper", "trend"]
    assert str(frame["ds"].iloc[1]) == "2024-01-02 12:00:00"


def test_a_decomposition_is_a_table_with_a_column_a_seasonality() -> None:
    column = (1.0, 2.0)
    parts = p.Decomposition(
        **HEAD,
        ds=("2024-01-01", "2024-01-02"),
        y=column,
        trend=column,
        seasonalities={"weekly": column},
        residual=column,
    )
    assert list(parts.to_dataframe().columns) == ["ds", "y", "trend", "weekly", "residual"]


def test_a_table_needs_pandas_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    forecast = p.Forecast(**HEAD, ds=(), yhat=(), yhat_lower=(), yhat_upper=(), trend=())
    with pytest.raises(ImportError, match=r"datapunk-cortex\[pandas\]"):
        forecast.to_dataframe()


def test_a_result_of_a_newer_worker_is_refused_not_misread() -> None:
    with pytest.raises(ValidationError):
        p.Embedding.model_validate({**HEAD, "data": b"", "colour": "blue"})


def test_an_unchecked_result_is_like_any_other() -> None:
    fields: dict[str, Any] = {
        "model": "m", "revision": "r", "timings": p.Timings(), "data": b"\0" * 8, "truncated": False,
        "encoding": "float32", "scale": 1.0,
    }  # fmt: skip
    made, plain = p.unchecked(p.Embedding, dict(fields)), p.Embedding(**fields)
    assert made == plain
    assert made.model_dump() == plain.model_dump()
    assert made.model_copy(update={"truncated": True}) == plain.model_copy(update={"truncated": True})
    assert copy.deepcopy(made) == plain
    assert repr(made).startswith("Embedding(")
    with pytest.raises(ValidationError):
        made.truncated = True
