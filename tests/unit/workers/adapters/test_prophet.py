"""The adapter against ``Prophet(...).fit(history).predict(times)`` itself."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cortex_tasks.catalog import TASKS
from cortex_tasks.errors import ConfigError, CortexError, InferenceFailed, InvalidInput, InvalidParameter
from cortex_tasks.payloads import (
    Anomalies,
    AnomalyParams,
    DecomposeParams,
    Decomposition,
    Forecast,
    ForecastParams,
    Params,
    Series,
    Timings,
)
from workers.adapters import prophet as module
from workers.adapters.base import Item, LoadContext
from workers.adapters.prophet import ProphetAdapter, future_of, seed_of, times_of
from workers.children import ChildHost

pytestmark = pytest.mark.models

TASK_OF = {spec.params: name for name, spec in TASKS.items() if spec.input == "series"}
TOLERANCE = 1e-6


def context(**options: Any) -> LoadContext:
    return LoadContext("prophet", None, "", tuple(TASK_OF.values()), options)


def series(y: Iterable[float], start: str = "2023-01-01", step: timedelta = timedelta(days=1)) -> Series:
    first, values = datetime.fromisoformat(start), tuple(map(float, y))
    return Series(ds=tuple((first + step * i).isoformat() for i in range(len(values))), y=values)


def noisy(points: int, seed: int = 0, weekly: float = 1.0) -> np.ndarray[Any, np.dtype[np.float64]]:
    """A trend, a weekly swing and noise."""
    t = np.arange(points)
    return 10 + t / 20 + weekly * np.sin(2 * np.pi * t / 7) + np.random.default_rng(seed).normal(0, 0.3, points)


DAILY = series(noisy(120))
HOURLY = series(noisy(24 * 5, 1), step=timedelta(hours=1))
YEARS = series(noisy(800, 2)[::7], step=timedelta(days=7))
SHORT = series([3.0, 1.0])


@pytest.fixture(scope="module")
def adapter() -> ProphetAdapter:
    return ProphetAdapter.load(context())


def run(adapter: ProphetAdapter, inputs: Sequence[Series], params: Params) -> list[Any]:
    """A wire value or an error an input."""
    task = TASK_OF[type(params)]
    outcomes: list[Any] = adapter.prepare(task, inputs, params)
    items = {i: entry for i, entry in enumerate(outcomes) if isinstance(entry, Item)}
    for i, value in zip(items, adapter.forward(task, list(items.values()), params), strict=True):
        outcomes[i] = value
    return outcomes


def one(adapter: ProphetAdapter, history: Series, params: Params) -> dict[str, Any]:
    (value,) = run(adapter, [history], params)
    assert not isinstance(value, CortexError), value
    result: dict[str, Any] = value
    return result


def frame(history: Series) -> pd.DataFrame:
    return pd.DataFrame({"ds": pd.to_datetime(list(history.ds)), "y": list(history.y)})


def fitted(history: Series, **options: Any) -> Any:
    from prophet import Prophet

    return Prophet(**options).fit(frame(history))


def close(got: Sequence[float], expected: Any) -> None:
    np.testing.assert_allclose(np.array(got), np.asarray(expected), rtol=TOLERANCE, atol=1e-9)


# ---------------------------------------------------------------------------------------------- fidelity


@pytest.mark.parametrize(
    ("history", "frequency", "options"),
    [
        (DAILY, "D", {}),
        (DAILY, "D", {"seasonality_mode": "multiplicative", "interval_width": 0.5}),
        (DAILY, "D", {"growth": "flat", "weekly_seasonality": False, "changepoint_prior_scale": 0.5}),
        (HOURLY, "h", {"daily_seasonality": True}),
        (YEARS, "7D", {}),
        (SHORT, "D", {}),
    ],
    ids=["daily", "multiplicative", "flat", "hourly", "years", "two points"],
)
@pytest.mark.parametrize("include_history", [False, True])
def test_a_forecast_is_prophets(
    adapter: ProphetAdapter, history: Series, frequency: str, options: dict[str, Any], include_history: bool
) -> None:
    params = ForecastParams(horizon=10, include_history=include_history, **options)
    value = one(adapter, history, params)
    model = fitted(history, **options)
    np.random.seed(seed_of(history, params))
    expected = model.predict(model.make_future_dataframe(10, freq=frequency, include_history=include_history))
    for name in ("yhat", "trend", "yhat_lower", "yhat_upper"):
        close(value[name], expected[name])
    result = Forecast(model="prophet", revision="r", timings=Timings(), **value)
    assert result.to_dataframe()["ds"].tolist() == expected["ds"].tolist()


@pytest.mark.parametrize("mode", ["additive", "multiplicative"])
@pytest.mark.parametrize("history", [DAILY, HOURLY, YEARS, SHORT], ids=["daily", "hourly", "years", "two points"])
def test_a_decomposition_is_prophets_and_adds_up(adapter: ProphetAdapter, history: Series, mode: str) -> None:
    value = one(adapter, history, DecomposeParams.model_validate({"seasonality_mode": mode}))
    model = fitted(history, seasonality_mode=mode)
    expected = model.predict(frame(history)[["ds"]])
    assert list(value["seasonalities"]) == list(model.seasonalities)
    close(value["trend"], expected["trend"])
    for name, values in value["seasonalities"].items():
        close(values, expected[name])
    trend, residual = np.array(value["trend"]), np.array(value["residual"])
    swing = np.sum([np.zeros(len(trend)), *map(np.array, value["seasonalities"].values())], axis=0)
    close(trend + swing + residual if mode == "additive" else trend * (1 + swing) + residual, history.y)
    result = Decomposition(model="prophet", revision="r", timings=Timings(), **value)
    assert result.ds == history.ds
    assert len(result.to_dataframe()) == len(history.y)


def test_seasonalities_are_those_the_history_has(adapter: ProphetAdapter) -> None:
    assert list(one(adapter, DAILY, DecomposeParams())["seasonalities"]) == ["weekly"]
    assert list(one(adapter, HOURLY, DecomposeParams())["seasonalities"]) == ["daily"]
    assert list(one(adapter, YEARS, DecomposeParams())["seasonalities"]) == ["yearly"]
    assert one(adapter, DAILY, DecomposeParams(weekly_seasonality=False))["seasonalities"] == {}


def test_anomalies_are_the_points_outside_prophets_interval(adapter: ProphetAdapter) -> None:
    y = noisy(120)
    y[[30, 77]] += [8.0, -8.0]
    history, params = series(y), AnomalyParams(interval_width=0.9)
    value = one(adapter, history, params)
    model = fitted(history, interval_width=0.9)
    np.random.seed(seed_of(history, params))
    expected = model.predict(frame(history)[["ds"]])
    outside = (y < expected["yhat_lower"]) | (y > expected["yhat_upper"])
    assert [point["ds"] for point in value["points"]] == [history.ds[i] for i in np.flatnonzero(outside)]
    result = Anomalies(model="prophet", revision="r", timings=Timings(), **value)
    assert result.checked == 120
    worst = sorted(result.points, key=lambda point: -point.score)[:2]
    assert {point.ds for point in worst} == {history.ds[30], history.ds[77]}
    for point in result.points:
        nearer = point.yhat_upper if point.y > point.yhat else point.yhat_lower
        assert point.score == pytest.approx(abs(point.y - nearer) / ((point.yhat_upper - point.yhat_lower) / 2))


@pytest.mark.parametrize("y", [[5.0] * 50, [0.0] * 50, list(range(60)), [1.0, 2.0], [2.5, 2.5]])
def test_a_perfect_fit_has_no_anomalies(adapter: ProphetAdapter, y: list[float]) -> None:
    assert one(adapter, series(y), AnomalyParams()) == {"points": [], "checked": len(y)}


# ----------------------------------------------------------------------------- neighbours and repetition

SERIES = st.builds(
    lambda points, seed, weekly: series(noisy(points, seed, weekly)),
    st.integers(2, 40), st.integers(0, 5), st.sampled_from([0.0, 2.0]),
)  # fmt: skip


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(SERIES, min_size=2, max_size=3),
    st.sampled_from([ForecastParams(horizon=3), AnomalyParams(interval_width=0.3), DecomposeParams()]),
)
def test_an_answer_does_not_depend_on_its_neighbours(
    adapter: ProphetAdapter, histories: list[Series], params: Params
) -> None:
    together = run(adapter, histories, params)
    assert together == [one(adapter, history, params) for history in histories]
    assert run(adapter, histories[::-1], params) == together[::-1]


def test_the_interval_is_reproducible_and_the_global_generator_left_alone(adapter: ProphetAdapter) -> None:
    params = ForecastParams(horizon=5)
    np.random.seed(7)
    expected = np.random.random()
    np.random.seed(7)
    first = one(adapter, DAILY, params)
    assert np.random.random() == expected
    np.random.seed(99)
    assert one(adapter, DAILY, params) == first
    assert seed_of(DAILY, params) != seed_of(SHORT, params)
    assert seed_of(DAILY, params) != seed_of(DAILY, ForecastParams(horizon=6))


def test_children_answer_alike(adapter: ProphetAdapter) -> None:
    hosted = ChildHost("prophet", context(), 2, time_limit_s=120.0)
    try:
        for params in (ForecastParams(horizon=4, include_history=True), AnomalyParams(), DecomposeParams()):
            items: list[Any] = hosted.prepare(TASK_OF[type(params)], [DAILY, SHORT, HOURLY], params)
            answers = list(hosted.forward(TASK_OF[type(params)], items, params))
            assert answers == run(adapter, [DAILY, SHORT, HOURLY], params)
        bad = ForecastParams(frequency="fortnight")
        (error,) = hosted.forward("forecast", [Item(DAILY)], bad)
        assert isinstance(error, InvalidParameter)
    finally:
        hosted.close()


def test_a_long_history_is_predicted_in_blocks(adapter: ProphetAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    params = ForecastParams(horizon=10, include_history=True)
    whole = one(adapter, DAILY, params)
    monkeypatch.setattr(module, "_PREDICT_ROWS", 50)
    blocks = one(adapter, DAILY, params)
    assert blocks["ds"] == whole["ds"]
    for name in ("yhat", "trend"):
        close(blocks[name], whole[name])
    # Other random draws of the same distribution.
    for name in ("yhat_lower", "yhat_upper"):
        np.testing.assert_allclose(blocks[name], whole[name], atol=0.3)


# --------------------------------------------------------------------------------------------- frequency


def after(dates: Sequence[str], frequency: str | None = None, horizon: int = 2) -> list[str]:
    times = times_of(Series(ds=tuple(dates), y=(0.0,) * len(dates)))
    return [stamp.isoformat() for stamp in future_of(times, horizon, frequency).to_pydatetime()]


@pytest.mark.parametrize(
    ("dates", "frequency", "expected"),
    [
        (["2024-01-01", "2024-01-02", "2024-01-03"], None, ["2024-01-04T00:00:00", "2024-01-05T00:00:00"]),
        (["2024-01-01", "2024-02-01", "2024-03-01"], None, ["2024-04-01T00:00:00", "2024-05-01T00:00:00"]),
        (["2023-11-30", "2023-12-31", "2024-01-31"], None, ["2024-02-29T00:00:00", "2024-03-31T00:00:00"]),
        # Business days: the next after a Friday is a Monday.
        ([f"2024-01-{d:02}" for d in (1, 2, 3, 4, 5, 8, 9, 10, 11, 12)], None,
         ["2024-01-15T00:00:00", "2024-01-16T00:00:00"]),
        # A gap in the middle: the end is regular.
        (["2023-01-01", "2024-01-01", "2024-02-01", "2024-03-01", "2024-04-01", "2024-05-01"], None,
         ["2024-06-01T00:00:00", "2024-07-01T00:00:00"]),
        # No rule at all: the median spacing, two days.
        (["2024-01-01", "2024-01-02", "2024-01-04", "2024-01-06", "2024-01-13"], None,
         ["2024-01-15T00:00:00", "2024-01-17T00:00:00"]),
        (["2024-01-01", "2024-01-01T06:00"], None, ["2024-01-01T12:00:00", "2024-01-01T18:00:00"]),
        (["2024-01-15", "2024-01-16"], "MS", ["2024-02-01T00:00:00", "2024-03-01T00:00:00"]),
        (["2024-01-15", "2024-01-16"], "1.5h", ["2024-01-16T01:30:00", "2024-01-16T03:00:00"]),
        (["0001-01-01", "0001-01-02"], "YS", ["0002-01-01T00:00:00", "0003-01-01T00:00:00"]),
    ],
)  # fmt: skip
def test_the_future_goes_on_as_the_history_went(dates: list[str], frequency: str | None, expected: list[str]) -> None:
    assert after(dates, frequency) == expected


@pytest.mark.parametrize(
    ("frequency", "said"),
    [
        ("fortnight", "cannot be used"),
        ("M", "'ME'"),
        ("", "cannot be used"),
        ("0D", "cannot be used"),
        ("-1D", "does not lead"),
        ("1ns", "does not lead"),
        ("5000YS", "frequency '5000YS'"),
        ("999999999999D", "frequency '999999999999D'"),
        ("99999999999999999999h", "frequency '99999999999999999999h'"),
    ],
)
def test_a_frequency_that_leads_nowhere_fails_each_item_at_once(
    adapter: ProphetAdapter, frequency: str, said: str
) -> None:
    params = ForecastParams.model_construct(horizon=3, frequency=frequency)
    for error in adapter.prepare("forecast", [DAILY, SHORT], params):
        assert isinstance(error, InvalidParameter)
        assert said in str(error)
        assert error.details["frequency"] == frequency


@settings(max_examples=200, deadline=None)
@example("800ns")
@given(
    st.text(min_size=1, max_size=20)
    | st.from_regex(r"-?[0-9]{0,6}(D|h|min|s|us|ns|W|MS|ME|YE|QS|B|bh|C|SMS)", fullmatch=True)
)
def test_any_frequency_gives_a_future_or_a_typed_error(frequency: str) -> None:
    times = times_of(DAILY)
    try:
        future = future_of(times, 5, frequency)
    except InvalidParameter:
        return
    assert len(future) == 5
    assert (np.diff([times[-1], *future]) > pd.Timedelta(0)).all()
    assert len({stamp.isoformat() for stamp in future.to_pydatetime()}) == 5


def test_a_history_at_the_end_of_time_has_no_future(adapter: ProphetAdapter) -> None:
    (error,) = run(adapter, [series([1, 2, 3], "9999-12-29")], ForecastParams(horizon=3))
    assert isinstance(error, InvalidParameter)
    assert "9999" in str(error) or "10000" in str(error)


# ---------------------------------------------------------------------------------------- limits and failure


@pytest.mark.parametrize(
    "y",
    [[1.0, 2.0], [3.0, 3.0], [1.0, 2.0, 1.0], [0.0] * 30, [5e-324, 1e-310, 0.0] * 5, [1e300, -1e300, 2e299] * 10],
    ids=["two", "two equal", "three", "zeros", "tiny", "huge"],
)
@pytest.mark.parametrize("params", [ForecastParams(horizon=3), DecomposeParams(), AnomalyParams()], ids=TASK_OF.get)
def test_unusual_series_are_answered(adapter: ProphetAdapter, y: list[float], params: Params) -> None:
    one(adapter, series(y), params)


def test_an_answer_that_is_not_finite_fails_its_series_only(adapter: ProphetAdapter) -> None:
    overflow = series([1.7e308, -1.7e308] * 20)
    for params in (AnomalyParams(), ForecastParams(horizon=40)):
        before, error, after_it = run(adapter, [SHORT, overflow, SHORT], params)
        assert isinstance(error, InferenceFailed)
        assert "not finite" in str(error)
        assert before == after_it == one(adapter, SHORT, params)


def test_a_fit_that_takes_too_long_fails_its_series_only() -> None:
    hasty = ProphetAdapter.load(context(fit_timeout_s=0.001))
    constant = series([4.0] * 10)
    error, value = run(hasty, [series(noisy(5_000), step=timedelta(hours=1)), constant], ForecastParams(horizon=2))
    assert isinstance(error, InferenceFailed)
    assert "5,000 points: TimeoutError" in str(error)
    assert value["yhat"] == [4.0, 4.0]


def test_a_failed_fit_is_told_without_the_machines_paths(
    adapter: ProphetAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prophet import Prophet

    def fail(self: Any, *_: Any, **__: Any) -> None:
        raise RuntimeError(
            "Error during optimization! Command '/opt/x/prophet_model.bin id=1\nfile' failed: line search"
        )

    monkeypatch.setattr(Prophet, "fit", fail)
    (error,) = run(adapter, [DAILY], DecomposeParams())
    assert isinstance(error, InferenceFailed)
    assert str(error).endswith("120 points: RuntimeError: Error during optimization! line search")


def test_what_no_configuration_may_allow_is_refused_before_anything_is_fitted(
    adapter: ProphetAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_HISTORY_POINTS", 100)
    monkeypatch.setattr(module, "MAX_HORIZON_POINTS", 100)
    long, short = adapter.prepare("forecast", [DAILY, SHORT], ForecastParams(horizon=100))
    assert isinstance(long, InvalidInput)
    assert isinstance(short, Item)
    assert short.cost_tokens == 102
    (error,) = adapter.prepare("forecast", [SHORT], ForecastParams(horizon=101))
    assert isinstance(error, InvalidParameter)


def test_a_fit_leaves_no_files(adapter: ProphetAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import cmdstanpy

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = set(Path(cmdstanpy._TMPDIR).iterdir())
    one(adapter, DAILY, ForecastParams(horizon=2))
    assert list(tmp_path.iterdir()) == []
    assert set(Path(cmdstanpy._TMPDIR).iterdir()) == before


TALKATIVE = """
from cortex_tasks.payloads import DecomposeParams
from workers.adapters.base import LoadContext
from workers.adapters.prophet import ProphetAdapter

adapter = ProphetAdapter.load(LoadContext("prophet", None, "", ("decompose",)))
inputs, _ = adapter.example("decompose")
params = DecomposeParams(yearly_seasonality=True)
assert "trend" in adapter.forward("decompose", adapter.prepare("decompose", inputs, params), params)[0]
"""


def test_a_fit_says_nothing() -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", TALKATIVE], capture_output=True, text=True, env=env, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_it_says_what_computes_its_answers(adapter: ProphetAdapter) -> None:
    assert adapter.library.startswith("prophet 1.")
    assert "cmdstanpy" in adapter.library
    assert adapter.size_bytes > 100_000


@pytest.mark.parametrize("options", [{"fit_timeout": 3.0}, {"fit_timeout_s": -1.0}, {"fit_timeout_s": "long"}])
def test_unknown_and_unusable_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="options"):
        ProphetAdapter.load(context(**options))


# ----------------------------------------------------------------------------------------- remembered fits


class Memo:
    """Keeps everything."""

    def __init__(self) -> None:
        self.kept: dict[str, bytes] = {}

    def recall(self, key: str) -> bytes | None:
        return self.kept.get(key)

    def keep(self, key: str, value: bytes) -> None:
        self.kept[key] = value


def odd_times() -> Series:
    """Timestamps of whole microseconds, which are not whole milliseconds."""
    first = datetime.fromisoformat("2024-03-01T00:00:00.000007")
    stamps = tuple((first + timedelta(hours=i, microseconds=13 * i)).isoformat() for i in range(60))
    return Series(ds=stamps, y=tuple(map(float, noisy(60, 3))))


@pytest.mark.parametrize("given_series", [DAILY, HOURLY, odd_times()], ids=["daily", "hourly", "odd times"])
@pytest.mark.parametrize(
    "params", [ForecastParams(horizon=5, include_history=True), DecomposeParams(), AnomalyParams(interval_width=0.5)]
)
def test_a_remembered_fit_answers_as_a_new_one_and_is_not_fitted(
    given_series: Series, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = ProphetAdapter.load(context())
    [item] = adapter.prepare(TASK_OF[type(params)], [given_series], params)
    assert isinstance(item, Item)

    def forward() -> Any:
        return adapter.forward(TASK_OF[type(params)], [item], params)[0]

    fresh = forward()
    adapter.memo = Memo()
    assert forward() == fresh
    fits: list[Any] = []
    monkeypatch.setattr(adapter, "_fit_anew", lambda *given: fits.append(given))
    assert forward() == fresh
    assert fits == []


def test_the_tasks_of_a_series_share_one_fit_and_other_parameters_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, memo = ProphetAdapter.load(context()), Memo()
    adapter.memo = memo
    for params in (
        ForecastParams(horizon=3),
        ForecastParams(horizon=9, interval_width=0.5),
        DecomposeParams(),
        AnomalyParams(),
    ):
        [item] = adapter.prepare(TASK_OF[type(params)], [DAILY], params)
        assert isinstance(item, Item)
        assert not isinstance(adapter.forward(TASK_OF[type(params)], [item], params)[0], CortexError)
    assert len(memo.kept) == 1
    for other, of in ((DecomposeParams(changepoint_prior_scale=0.5), DAILY), (DecomposeParams(), HOURLY)):
        [item] = adapter.prepare("decompose", [of], other)
        assert isinstance(item, Item)
        adapter.forward("decompose", [item], other)
    assert len(memo.kept) == 3


def test_a_fit_that_cannot_be_read_is_made_again() -> None:
    adapter, memo = ProphetAdapter.load(context()), Memo()
    adapter.memo = memo
    [item] = adapter.prepare("decompose", [DAILY], DecomposeParams())
    assert isinstance(item, Item)
    fresh = adapter.forward("decompose", [item], DecomposeParams())[0]
    [key] = memo.kept
    for damaged in (b"", b"{}", memo.kept[key][:-10]):
        memo.kept[key] = damaged
        assert adapter.forward("decompose", [item], DecomposeParams())[0] == fresh
        assert len(memo.kept[key]) > 1_000, "the good one is kept again"


def test_children_remember_by_their_worker() -> None:
    memo = Memo()
    host = ChildHost("prophet", context(), 2, time_limit_s=120)
    try:
        host.memo = memo
        items = host.prepare("decompose", [DAILY, HOURLY], DecomposeParams())
        first = host.forward("decompose", [item for item in items if isinstance(item, Item)], DecomposeParams())
        assert len(memo.kept) == 2
        kept = dict(memo.kept)
        again = host.forward("decompose", [item for item in items if isinstance(item, Item)], DecomposeParams())
        assert list(again) == list(first)
        assert memo.kept == kept, "nothing was fitted again"
    finally:
        host.close()
