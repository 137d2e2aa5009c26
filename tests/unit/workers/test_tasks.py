"""A message as a Job: every way to write it, every way to get it wrong."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortex_tasks.catalog import TASKS
from cortex_tasks.config import FleetConfig, load_fleet
from cortex_tasks.errors import CortexError, InvalidInput, RequestError, UnknownModel, UnknownTask
from cortex_tasks.payloads import EmbedParams, Series
from tests.support.worker_process import QUEUES_FILE
from workers import tasks
from workers.runtime import Job
from workers.tasks import to_job

FLEET: FleetConfig = load_fleet(QUEUES_FILE)


def read(*args: Any, task: str = "cortex.embed", headers: dict[str, Any] | None = None, **kwargs: Any) -> Job:
    return to_job("id", task, args, kwargs, FLEET, headers or {})


# ------------------------------------------------------------------------------------------------- good


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((), {"inputs": ["a", "b"], "model": "echo"}),
        ((["a", "b"],), {"model": "echo"}),
        ((["a", "b"], "echo"), {}),
        ((["a", "b"], None), {}),
        ((), {"inputs": ["a", "b"]}),
    ],
)
def test_arguments_by_position_and_by_name(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    job = read(*args, **kwargs)
    assert (job.id, job.model, job.task, list(job.inputs)) == ("id", "echo", "embed", ["a", "b"])
    assert job.params == EmbedParams()
    assert (job.lane, job.deadline_s, job.sent_at_s, job.packed, job.suspect) == (
        "interactive", math.inf, None, False, False,
    )  # fmt: skip


def test_a_single_input_needs_no_list() -> None:
    assert list(read("text").inputs) == ["text"]
    series = {"ds": ["2024-01-01", "2024-01-02"], "y": [1, 2]}
    (only,) = read(series, task="cortex.decompose").inputs
    assert only == Series(ds=("2024-01-01T00:00:00", "2024-01-02T00:00:00"), y=(1.0, 2.0))


def test_parameters_make_the_group() -> None:
    plain, same, other = read("a"), read("a", normalize=True), read("a", normalize=False)
    assert plain.group == same.group != other.group


def test_parameters_that_compare_equal_are_told_apart() -> None:
    """1 == True == 1.0: what was seen before must not answer for another."""
    assert read("a", normalize=True).params == EmbedParams()
    forecast = {"task": "cortex.forecast", "horizon": 1}
    series = {"ds": ["2024-01-01", "2024-01-02"], "y": [1, 2]}
    assert read(series, **forecast).params.model_dump()["horizon"] == 1
    with pytest.raises(RequestError):
        read(series, task="cortex.forecast", horizon=1.5)


def test_seen_parameters_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "_SEEN_MAX", 4)
    monkeypatch.setattr(tasks, "_seen", {})
    for number in range(10):
        read("x [MASK]", task="cortex.fill_mask", top_k=number + 1)
    assert len(tasks._seen) <= 4


def test_delivery_options() -> None:
    headers = {
        "cortex": {"packed": True, "sent_at": 12.5, "cache": "use"},
        "delivery_info": {"priority": 9},
        "expires": "2030-01-01T00:00:00+00:00",
    }
    job = read("a", headers=headers)
    assert (job.packed, job.sent_at_s, job.lane) == (True, 12.5, "bulk")
    assert job.deadline_s == datetime(2030, 1, 1, tzinfo=UTC).timestamp()


def test_a_moment_without_a_zone_is_utc_wherever_the_worker_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        job = read("a", headers={"expires": "2030-01-01T00:00:00"})
        assert job.deadline_s == datetime(2030, 1, 1, tzinfo=UTC).timestamp()
    finally:
        monkeypatch.undo()
        time.tzset()


# -------------------------------------------------------------------------------------------- malformed


@pytest.mark.parametrize(
    "headers",
    [
        {"cortex": "text"},
        {"cortex": [1]},
        {"cortex": {"sent_at": "noon"}},
        {"cortex": {"sent_at": 10**400}},
        {"cortex": {"sent_at": math.nan}},
        {"delivery_info": [1]},
        {"delivery_info": {"priority": "high"}},
        {"delivery_info": {"priority": [1]}},
        {"delivery_info": {"priority": math.nan}},
        {"expires": "never"},
        {"expires": 5},
        {"expires": "9999-12-31T23:59:59-14:00"},
        {"expires": ""},
    ],
)
def test_delivery_options_of_a_wrong_type_are_as_good_as_none(headers: dict[str, Any]) -> None:
    job = read("a", headers=headers)
    assert (job.lane, job.sent_at_s) == ("interactive", None)
    assert job.deadline_s > datetime(2100, 1, 1, tzinfo=UTC).timestamp()


@pytest.mark.parametrize(
    ("args", "kwargs", "expected"),
    [
        ((), {}, InvalidInput),
        ((), {"model": "echo"}, InvalidInput),
        ((["a"], "echo", 3), {}, InvalidInput),
        ((["a"],), {"inputs": ["b"]}, InvalidInput),
        ((["a"], "echo"), {"model": "echo"}, InvalidInput),
        ((["a"], "ecoh"), {}, UnknownModel),
        ((["a"], ["echo"]), {}, UnknownModel),
        ((["a"], {}), {}, UnknownModel),
        ((["a"], 5), {}, UnknownModel),
        ((["a"], "slow"), {"task": "cortex.annotate"}, UnknownModel),
        ((["a"],), {"task": "cortex.emebd"}, UnknownTask),
        ((["a"],), {"normalise": True}, RequestError),
        ((["a"],), {"self": 1}, RequestError),
        ((["a"] * 1001,), {}, InvalidInput),
    ],
)
def test_a_wrong_job_is_refused(args: tuple[Any, ...], kwargs: dict[str, Any], expected: type[RequestError]) -> None:
    given_ = dict(kwargs)
    task = given_.pop("task", "cortex.embed")
    with pytest.raises(expected):
        to_job("id", task, args, given_, FLEET, {})


@pytest.mark.parametrize(("args", "kwargs"), [("text", {}), (None, {}), ([], [1]), ([], None), ({}, {})])
def test_arguments_of_a_wrong_type_are_refused(args: Any, kwargs: Any) -> None:
    with pytest.raises(InvalidInput):
        to_job("id", "cortex.embed", args, kwargs, FLEET, {})


def test_a_bad_input_is_its_own_outcome() -> None:
    job = read(["fine", "", 7, None, "x" * 10_001, {"a": 1}, ["nested"]])
    assert [isinstance(outcome, CortexError) for outcome in job.outcomes] == [False] + [True] * 6
    assert job.open_items == 1


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
names = st.sampled_from(["inputs", "model", "horizon", "labels", "top_k", "include", "truncate", "normalize", "self"])


@given(
    st.sampled_from([spec.celery_name for spec in TASKS.values()]) | st.text(max_size=10),
    st.lists(json_values, max_size=3),
    st.dictionaries(names | st.text(max_size=5), json_values, max_size=5),
    st.dictionaries(st.sampled_from(["cortex", "expires", "delivery_info"]), json_values),
)
def test_whatever_comes_is_a_job_or_a_request_error(
    task: str, args: list[Any], kwargs: dict[str, Any], headers: dict[str, Any]
) -> None:
    try:
        job = to_job("id", task, args, kwargs, FLEET, headers)
    except RequestError:
        return
    assert len(job.outcomes) == len(job.inputs)
    assert not math.isnan(job.deadline_s)


@given(json_values)
def test_any_model_name_is_one_or_an_error(model: Any) -> None:
    try:
        assert read("a", model).model == "echo"
    except UnknownModel:
        assert model not in ("echo", None)


@given(st.sampled_from(list(TASKS.values())), json_values)
def test_any_inputs_are_each_fine_or_refused(spec: Any, inputs: Any) -> None:
    params = {"labels": ["a"]} if spec.name == "zero_shot" else {}
    # As they come: through JSON.
    given_ = json.loads(json.dumps(inputs))
    job = to_job("id", spec.celery_name, [given_], params, FLEET, {})
    for value in job.inputs:
        assert isinstance(value, str | Series | InvalidInput)
