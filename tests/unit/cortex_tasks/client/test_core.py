"""The clients' common part: what it makes of what it is given, without a network."""

from __future__ import annotations

import math
from typing import Any

import pytest

from cortex_tasks import (
    AsyncCortex,
    ConfigError,
    Cortex,
    InvalidInput,
    InvalidParameter,
    ModelError,
    UnknownTask,
    testing,
)
from cortex_tasks.client.core import Core
from cortex_tasks.testing import echo_fleet


@pytest.mark.parametrize(
    "outcome",
    [
        {},
        {"result": None},
        {"result": 7},
        {"result": {"cortex": 1}},
        {"result": {"cortex": 1, "task": [], "model": "m", "revision": "r", "items": []}},
        {"result": {"cortex": 1, "task": "embed", "model": "m", "revision": "r", "items": None}},
        {"result": {"cortex": 1, "task": "embed", "model": "m", "revision": "r", "items": [None]}},
    ],
)
def test_a_stored_answer_without_a_readable_result_is_the_models_error(outcome: dict[str, Any]) -> None:
    order = Core(echo_fleet(), 30.0).plan("embed").order(["text"])
    with pytest.raises(ModelError, match="cannot be read"):
        order.entries([{"status": "SUCCESS", **outcome}]).values()


@pytest.mark.parametrize("client", [Cortex, AsyncCortex])
def test_a_client_names_the_parameter_of_its_url_that_is_wrong(client: type[Cortex | AsyncCortex]) -> None:
    with pytest.raises(ConfigError, match="unknown parameter 'socket_timout'") as caught:
        client("redis://:s3cret@h/0?socket_timout=5&pasword=s3cret", fleet=echo_fleet())
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("timeout_s", [0, -1, math.nan, -math.inf, 1e9, None, "30", True])
def test_a_client_refuses_a_time_out_that_nobody_can_wait_for(timeout_s: Any) -> None:
    with testing.fleet() as fleet:
        for make in (fleet.client, fleet.aclient):
            with pytest.raises(InvalidParameter, match="timeout_s must be a number of seconds above 0"):
                make(timeout_s)
    for client in (Cortex, AsyncCortex):
        with pytest.raises(InvalidParameter, match="timeout_s must be a number of seconds above 0"):
            client(fleet=echo_fleet(), timeout_s=timeout_s)


@pytest.mark.parametrize("timeout_s", [5, 0.5, math.inf])
def test_a_client_may_wait_for_as_long_as_its_caller_likes(timeout_s: float) -> None:
    with testing.fleet() as fleet:
        assert fleet.client(timeout_s).embed("x").model == "minilm"
    AsyncCortex(fleet=echo_fleet(), timeout_s=timeout_s)


@pytest.mark.parametrize("model", [123, [], {}, b"echo", 1.5])
def test_a_model_that_is_no_name_is_refused(model: Any) -> None:
    with testing.fleet() as fleet, pytest.raises(InvalidParameter, match="model must be an alias, not"):
        fleet.client().embed("x", model=model)


@pytest.mark.parametrize("task", [None, 123, b"embed", [], {}, object()])
async def test_a_task_that_is_no_name_is_unknown(task: Any) -> None:
    with testing.fleet() as fleet:
        client, other = fleet.client(), fleet.aclient()
        for call in (client.submit, client.map, other.map):
            with pytest.raises(UnknownTask, match="a task is named by a str"):
                call(task, ["x"])
        with pytest.raises(UnknownTask, match="a task is named by a str"):
            await other.submit(task, ["x"])
        assert fleet.jobs == []


@pytest.mark.parametrize("inputs", [None, 123, object(), b"text", "one text"])
async def test_what_a_stream_cannot_go_through_is_refused_at_once(inputs: Any) -> None:
    with testing.fleet() as fleet:
        for call in (fleet.client().map, fleet.aclient().map):
            with pytest.raises(InvalidInput, match="map takes an iterable of inputs, not"):
                call("embed", inputs)


@pytest.mark.parametrize("value", [b"x", [], {}, object(), "", math.nan, True])
async def test_what_is_no_number_of_seconds_is_refused(value: Any) -> None:
    with testing.fleet() as fleet:
        client, other = fleet.client(), fleet.aclient()
        for option in ("deadline_s", "timeout_s"):
            with pytest.raises(InvalidParameter, match=f"{option} must be a number of seconds"):
                client.embed("x", **{option: value})
        with pytest.raises(InvalidParameter, match="timeout_s must be a number of seconds"):
            client.submit("embed", "x").result(value)
        with pytest.raises(InvalidParameter, match="timeout_s must be a number of seconds"):
            await (await other.submit("embed", "x")).result(value)
        await other.aclose()


@pytest.mark.parametrize("option", ["lane", "cache", "deadline_s", "timeout_s", "model"])
def test_an_array_is_no_option(option: str) -> None:
    np = pytest.importorskip("numpy")
    with testing.fleet() as fleet, pytest.raises(InvalidParameter, match=option):
        fleet.client().embed("x", **{option: np.array([1, 2])})


def test_a_series_with_a_timestamp_that_no_datetime_can_hold_fails_alone() -> None:
    np = pytest.importorskip("numpy")
    good = {"ds": ["2024-01-01", "2024-01-02", "2024-01-03"], "y": [1, 2, 3]}
    bad = {"ds": [np.array(["2020", "2021"], "M8[D]")] * 2, "y": [1, 2]}
    with testing.fleet() as fleet:
        result = fleet.client().forecast([good, bad, good], model="echo", horizon=2)
    assert {index: type(error) for index, error in result.errors.items()} == {1: InvalidInput}
