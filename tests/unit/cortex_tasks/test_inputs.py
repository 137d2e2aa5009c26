"""Every input and parameter is judged before it travels; the verdict says which, why and what to do."""

from __future__ import annotations

import contextlib
import json
import math
import re
from datetime import date, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortex_tasks.catalog import TASKS
from cortex_tasks.config import Limits
from cortex_tasks.errors import CortexError, InvalidInput, InvalidParameter, UnknownTask
from cortex_tasks.inputs import check_input, check_params, is_single
from cortex_tasks.payloads import EmbedParams, ForecastParams, Series

LIMITS = Limits(text_chars=20, history_points=5, horizon_points=10)
DAYS = [f"2024-01-0{day}" for day in range(1, 10)]


def series_error(value: Any) -> str:
    with pytest.raises(InvalidInput) as caught:
        check_input("forecast", value, LIMITS)
    return str(caught.value)


# ----------------------------------------------------------------------------------------------------- texts


@pytest.mark.parametrize("text", ["a", "twenty characters!!!", "héllo", "😀", " padded ", "\x00"])
def test_a_good_text_is_passed_on_as_it_is(text: str) -> None:
    assert check_input("embed", text, LIMITS) == text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty"),
        ("   \n\t ", "white space"),
        ("x" * 21, "21 characters is over the model's limit of 20"),
        ("a\ud800b", "lone surrogate at character 1"),
        (None, "not NoneType"),
        (b"bytes", "not bytes"),
        (7, "not int"),
        (["a"], "not list"),
    ],
)
def test_a_bad_text_is_refused(text: Any, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        check_input("embed", text, LIMITS)


def test_the_limit_of_ten_thousand_characters_is_exact() -> None:
    assert len(str(check_input("embed", "x" * 10_000, Limits()))) == 10_000
    with pytest.raises(InvalidInput) as caught:
        check_input("embed", "x" * 10_001, Limits())
    assert caught.value.details == {"limit": 10_000, "got": 10_001}


def test_truncation_happens_only_when_asked_for() -> None:
    assert check_input("embed", "x" * 30, LIMITS, truncate=True) == "x" * 20
    with pytest.raises(InvalidInput, match="white space"):
        check_input("embed", " " * 20 + "x", LIMITS, truncate=True)


@given(st.text(st.characters(exclude_categories=()), max_size=30))
def test_an_accepted_text_always_survives_the_wire(text: str) -> None:
    try:
        checked = check_input("embed", text, LIMITS)
    except InvalidInput:
        return
    assert json.loads(json.dumps(checked, ensure_ascii=False).encode()) == text


# ---------------------------------------------------------------------------------------------------- series

GOOD = Series(ds=("2024-01-01T00:00:00", "2024-01-02T00:00:00"), y=(1.0, 2.0))


@pytest.mark.parametrize(
    "value",
    [
        GOOD,
        {"ds": ["2024-01-01", "2024-01-02"], "y": [1, 2]},
        {"ds": ("20240101", "2024-01-02 00:00"), "y": (Decimal(1), 2.0), "other": ["ignored"]},
        [("2024-01-01", 1), ("2024-01-02", 2)],
        [["2024-01-01", 1], ["2024-01-02", 2]],
        [(date(2024, 1, 1), 1), (datetime(2024, 1, 2), 2)],
    ],
)
def test_every_form_of_a_series_becomes_the_same_series(value: Any) -> None:
    assert check_input("forecast", value, LIMITS) == GOOD


def test_frames_and_arrays_are_read_without_being_imported_here() -> None:
    pd = pytest.importorskip("pandas")
    np = pytest.importorskip("numpy")
    stamps = pd.to_datetime(["2024-01-01", "2024-01-02"])
    frame = pd.DataFrame({"ds": stamps, "y": [1, 2], "other": "x"})
    assert check_input("forecast", frame, LIMITS) == GOOD
    assert check_input("forecast", {"ds": stamps.to_numpy(), "y": np.array([1, 2], "f4")}, LIMITS) == GOOD
    assert check_input("forecast", [(np.datetime64("2024-01-01"), 1), (stamps[1], np.int64(2))], LIMITS) == GOOD
    exact = check_input("forecast", [(pd.Timestamp("2024-01-01T00:00:00.123456789"), 1), (stamps[1], 2)], LIMITS)
    assert isinstance(exact, Series)
    assert exact.ds[0] == "2024-01-01T00:00:00.123456"
    assert "index 1 is missing" in series_error({"ds": [stamps[0], pd.NaT], "y": [1, 2]})
    assert "NaT" in series_error({"ds": [np.datetime64("NaT"), stamps[0]], "y": [1, 2]})
    assert "time zone" in series_error(frame.assign(ds=stamps.tz_localize("UTC")))
    assert "has no 'ds'; did you mean 'dss'" in series_error(frame.rename(columns={"ds": "dss"}))
    assert "not a number" in series_error({"ds": stamps, "y": np.array([True, False])})
    assert "index 0" in series_error({"ds": [np.array([1, 2]), stamps[0]], "y": [1, 2]})


def test_what_pandas_and_numpy_refuse_to_convert_is_a_bad_series() -> None:
    pd = pytest.importorskip("pandas")
    np = pytest.importorskip("numpy")
    late = np.array(["2020-01-01", "20000-01-01"], "M8[s]")
    days = np.array(["2020", "2021"], "M8[D]")
    for stamps in (pd.DatetimeIndex(late), pd.Series(late), late):
        assert "index 1 is" in series_error({"ds": stamps, "y": [1, 2]})
        assert "index 1 is" in series_error(pd.DataFrame({"ds": stamps, "y": [1, 2]}))
    for stamp in (days, pd.Series(days), pd.DatetimeIndex(days), pd.Timestamp.min):
        assert "index 1 is" in series_error([("2020-01-01", 1), (stamp, 2)])
    assert "'ds' cannot be read: iteration over a 0-d array" in series_error({"ds": np.array(5), "y": [1]})
    assert "'y' cannot be read: iteration over a 0-d array" in series_error({"ds": DAYS[:2], "y": np.array(5)})


def test_a_column_that_fails_as_it_is_read_is_a_bad_series() -> None:
    class Torn(list[float]):
        def __iter__(self) -> Any:
            raise RuntimeError("the file is gone")

    assert "'y' cannot be read: the file is gone" in series_error({"ds": DAYS[:2], "y": Torn()})


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("2024-01-01", "must be a Series, a mapping"),
        (None, "not NoneType"),
        ([], "at least 2 points, not 0"),
        ([("2024-01-01", 1)], "at least 2 points, not 1"),
        ([1, 2, 3], "must hold"),
        ({"ds": DAYS[:2]}, "no 'y'"),
        ({"ds": "2024-01-01", "y": [1]}, "'ds' must be a list, not str"),
        ({"ds": DAYS[:3], "y": [1, 2]}, "3 timestamps but 2 values"),
        ({"ds": DAYS[:6], "y": range(6)}, "6 points is over the model's limit of 5"),
        ({"ds": DAYS[:2], "y": [1, math.nan]}, "index 1 is nan, not a finite"),
        ({"ds": DAYS[:2], "y": [math.inf, 1]}, "index 0 is inf"),
        ({"ds": DAYS[:2], "y": [10**400, 1]}, "integer of 1,329 bits"),
        ({"ds": DAYS[:2], "y": [True, 1]}, "index 0 is True, not a number"),
        ({"ds": DAYS[:2], "y": ["1", 1]}, "not a number"),
        ({"ds": DAYS[:2], "y": [None, 1]}, "not a number"),
        ({"ds": [DAYS[1], DAYS[0]], "y": [1, 2]}, "unsorted at index 1"),
        ({"ds": [DAYS[0], DAYS[1], DAYS[1]], "y": [1, 2, 3]}, "duplicate timestamp at index 2"),
        ({"ds": [DAYS[0], "2024-01-01T00:00"], "y": [1, 2]}, "duplicate timestamp at index 1"),
        ({"ds": ["yesterday", DAYS[1]], "y": [1, 2]}, "index 0 is 'yesterday'"),
        ({"ds": [1704067200, DAYS[1]], "y": [1, 2]}, "index 0 is 1704067200"),
        ({"ds": [None, DAYS[1]], "y": [1, 2]}, "index 0 is missing"),
        ({"ds": ["2024-01-01T00:00Z", DAYS[1]], "y": [1, 2]}, "time zone"),
    ],
)
def test_a_bad_series_is_refused(value: Any, said: str) -> None:
    assert said in series_error(value)


@given(
    st.lists(st.datetimes(), min_size=2, max_size=5, unique=True),
    st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=5, max_size=5),
)
def test_a_series_is_canonical_and_checking_it_again_changes_nothing(stamps: list[datetime], y: list[float]) -> None:
    stamps.sort()
    checked = check_input("decompose", {"ds": stamps, "y": y[: len(stamps)]}, LIMITS)
    assert isinstance(checked, Series)
    assert [datetime.fromisoformat(stamp) for stamp in checked.ds] == stamps
    assert check_input("decompose", json.loads(json.dumps(checked.model_dump())), LIMITS) == checked


@given(st.permutations([datetime(2024, 1, 1) + timedelta(hours=h) for h in range(4)]))
def test_only_the_ascending_order_of_timestamps_is_accepted(stamps: list[datetime]) -> None:
    value = [(stamp, 1.0) for stamp in stamps]
    if stamps == sorted(stamps):
        check_input("forecast", value, LIMITS)
    else:
        assert "unsorted at index" in series_error(value)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=3) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["ds", "y", "z"]), inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from(sorted(TASKS)), JUNK)
def test_anything_at_all_is_either_accepted_or_refused_by_a_typed_error(task: str, value: Any) -> None:
    is_single(task, value)
    with contextlib.suppress(InvalidInput):
        check_input(task, value, LIMITS)


# -------------------------------------------------------------------------------------------- one or several


@pytest.mark.parametrize(
    ("task", "inputs", "single"),
    [
        ("embed", "a text", True),
        ("embed", b"bytes", True),
        ("embed", None, True),
        ("embed", {"text": "x"}, True),
        ("embed", ["a"], False),
        ("embed", [], False),
        ("embed", ("a", "b"), False),
        ("forecast", GOOD, True),
        ("forecast", {"ds": [], "y": []}, True),
        ("forecast", [("2024-01-01", 1.0)], True),
        ("forecast", [[date(2024, 1, 1), 1.0]], True),
        ("forecast", [], False),
        ("forecast", [GOOD], False),
        ("forecast", [[("2024-01-01", 1.0), ("2024-01-02", 1.0)]], False),
        ("forecast", [{"ds": [], "y": []}], False),
    ],
)
def test_one_input_is_told_from_several(task: str, inputs: Any, single: bool) -> None:
    assert is_single(task, inputs) is single


# ------------------------------------------------------------------------------------------------ parameters


def test_good_parameters_become_the_tasks_own_class() -> None:
    assert check_params("embed", {}, LIMITS) == EmbedParams()
    assert check_params("cortex.forecast", {"horizon": 10}, LIMITS) == ForecastParams(horizon=10)


@pytest.mark.parametrize(
    ("task", "params", "said"),
    [
        ("embed", {"normalise": False}, "unknown parameter 'normalise'; did you mean 'normalize'?"),
        ("embed", {"normalize": "perhaps"}, "parameter 'normalize' is 'perhaps'"),
        ("zero_shot", {}, "parameter 'labels' is required"),
        ("zero_shot", {"labels": []}, "at least 1 item"),
        ("fill_mask", {"top_k": 0}, "parameter 'top_k' is 0: input should be greater than or equal to 1"),
        ("features", {"pooling": "max"}, "'none', 'mean' or 'cls'"),
        ("forecast", {"horizon": 11}, "horizon is 11, over the model's limit of 10 points"),
        ("forecast", {"horizon": 0}, "'horizon' is 0"),
        ("forecast", {"interval_width": 1.0}, "less than 1"),
        ("forecast", {"changepoint_prior_scale": math.nan}, "changepoint_prior_scale"),
        ("forecast", {"frequency": "x" * 500}, "frequency"),
    ],
)
def test_a_bad_parameter_is_named(task: str, params: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        check_params(task, params, LIMITS)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"dimensions": 0}, "parameter 'dimensions' is 0"),
        ({"dimensions": "64"}, "parameter 'dimensions' is '64'"),
        ({"dimensions": 64.0}, "parameter 'dimensions' is 64.0"),
        ({"dimensions": True}, "parameter 'dimensions' is True"),
        ({"encoding": "int4"}, "'float32', 'int8' or 'binary'"),
        ({"dimensions": 385}, "dimensions is 385, over the 384 of model 'minilm'"),
        ({"dimensions": 100, "encoding": "binary"}, "multiple of 8"),
    ],
)
def test_a_form_that_an_embedding_cannot_have_is_refused(params: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidParameter, match=re.escape(said)):
        check_params("embed", params, Limits(dimensions=384), "minilm")
    assert check_params("embed", {"dimensions": 384}, Limits(dimensions=384)) == EmbedParams(dimensions=384)
    assert check_params("embed", {"dimensions": 385}, Limits()) == EmbedParams(dimensions=385)


def test_an_unknown_task_names_the_nearest() -> None:
    for call in (lambda: check_params("embedd", {}, LIMITS), lambda: check_input("embedd", "a", LIMITS)):
        with pytest.raises(UnknownTask, match="did you mean 'embed'"):
            call()
    assert issubclass(UnknownTask, CortexError)
