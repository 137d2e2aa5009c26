"""Celery-native signatures: checked at the call, routed by their model, answered through stock results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from celery import Celery, Task, chain, chord, group

from cortex_tasks import codec, parse
from cortex_tasks import tasks as module
from cortex_tasks.app import make_app
from cortex_tasks.catalog import TASKS
from cortex_tasks.config import FleetConfig
from cortex_tasks.errors import (
    BrokerUnavailable,
    InvalidInput,
    InvalidParameter,
    QueueFull,
    RequestError,
    UnknownModel,
)
from cortex_tasks.settings import Settings
from cortex_tasks.tasks import register
from tests.support.fake_worker import answer_message
from tests.support.redis_server import free_port


def tasks_of(url: str, fleet: FleetConfig) -> dict[str, Task]:
    settings = Settings.model_validate({"broker_url": url})
    return register(make_app(settings, fleet, fail_fast=True), settings, fleet)


@pytest.fixture
def tasks(redis_url: str, echo_fleet: FleetConfig) -> Iterator[dict[str, Task]]:
    tasks = tasks_of(redis_url, echo_fleet)
    yield tasks
    tasks["embed"].app.close()


@pytest.fixture
def raw(redis_url: str) -> Iterator[Any]:
    with redis.Redis.from_url(redis_url) as raw:
        yield raw


def answer_one(raw: Any, *, stock: bool = False, queue: str = "echo") -> dict[str, Any]:
    """Answer the next job as a worker does; returns its headers."""
    message = raw.rpop(queue)
    assert message is not None, "no job in the queue"
    job_id, _, meta = answer_message(message)
    meta = {**meta, "result": meta["result"].__json__()} if stock else meta
    raw.setex(codec.result_key(job_id), 60, codec.dumps(meta))
    headers: dict[str, Any] = json.loads(message)["headers"]
    return headers


def test_there_is_one_task_a_row_of_the_catalogue(tasks: dict[str, Task]) -> None:
    assert set(tasks) == set(TASKS)
    assert set(TASKS) <= set(module.__all__)
    assert {task.name for task in tasks.values()} == {spec.celery_name for spec in TASKS.values()}


@pytest.mark.parametrize("stock", [True, False])
def test_delay_and_get(tasks: dict[str, Task], raw: Any, stock: bool) -> None:
    result = tasks["embed"].delay(inputs=["one", "two"], model="echo")
    headers = answer_one(raw, stock=stock)
    assert [len(item.data) for item in parse(result.get(timeout=5)).values()] == [32, 32]
    assert headers["kwargsrepr"] == "{'inputs': <2 texts, 'one'>, 'model': 'echo'}"
    assert headers["cortex"].keys() == {"sent_at"}
    assert tasks["embed"].AsyncResult(result.id).successful()


def test_arguments_by_position_other_forms_and_options(tasks: dict[str, Task], raw: Any) -> None:
    pairs = [("2024-01-01", 1), ("2024-01-02", 2)]
    tasks["forecast"].apply_async((pairs, "echo"), {"horizon": 2}, priority=9, headers={"cortex": {"packed": True}})
    message = json.loads(raw.rpop(codec.queue_key("echo", 9)))
    args, kwargs, _ = json.loads(message["body"])
    series = {"ds": ["2024-01-01T00:00:00", "2024-01-02T00:00:00"], "y": [1.0, 2.0]}
    assert (args, kwargs) == ([], {"inputs": [series], "model": "echo", "horizon": 2})
    assert message["headers"]["cortex"]["packed"] is True


def test_signatures_groups_and_an_app_of_ones_own(tasks: dict[str, Task], raw: Any, redis_url: str) -> None:
    other = Celery("other", broker=redis_url, backend=redis_url)
    other.set_current()
    embed = tasks["embed"]
    results = group(embed.s([f"text {n}"], model="echo") for n in range(3))()
    texts = [json.loads(json.loads(raw.lindex("echo", -1 - n))["body"])[1]["inputs"] for n in range(3)]
    assert texts == [["text 0"], ["text 1"], ["text 2"]]
    for _ in range(3):
        answer_one(raw)
    assert len(results.get(timeout=5, interval=0.01)) == 3


def test_any_celery_app_may_send_and_read_without_our_code(raw: Any, redis_url: str) -> None:
    other = Celery("other", broker=redis_url, backend=redis_url, set_as_current=False)
    other.conf.broker_transport_options = {"body_encoding": "utf-8"}
    result = other.send_task("cortex.embed", kwargs={"inputs": ["x"], "model": "echo"}, queue="echo")
    answer_one(raw)
    answer = result.get(timeout=5)
    assert parse(answer).values()[0].dimensions == 8


def test_chains_and_chords_carry_their_links(tasks: dict[str, Task], raw: Any) -> None:
    embed = tasks["embed"]
    chain(embed.s(["a"], model="echo"), embed.si(["b"], model="echo"))()
    body = json.loads(json.loads(raw.rpop("echo"))["body"])
    assert body[1]["inputs"] == ["a"]
    assert body[2]["chain"][0]["kwargs"] == {"model": "echo"}
    chord([embed.s([text], model="echo") for text in "ab"], embed.si(["c"], model="echo"))()
    bodies = [json.loads(json.loads(raw.rpop("echo"))["body"]) for _ in range(2)]
    assert all(body[2]["chord"]["task"] == "cortex.embed" for body in bodies)


@pytest.mark.parametrize(
    ("args", "kwargs", "kind", "said"),
    [
        ((), {}, InvalidInput, "needs inputs"),
        ((["a"], "echo", 1), {}, InvalidParameter, "not 3 arguments"),
        ((["a"],), {"inputs": ["b"]}, InvalidParameter, "'inputs' was given by position and by name"),
        ((["a", ""],), {"model": "echo"}, InvalidInput, "input 1: a text is empty"),
        ((["a"] * 1_001,), {"model": "echo"}, InvalidInput, "over the model's limit of 1,000"),
        ((None,), {"model": "echo"}, InvalidInput, "input 0: a text must be a str"),
        ((["a"], 123), {}, InvalidParameter, "model must be an alias, not int"),
        ((["a"], "eco"), {}, UnknownModel, "did you mean 'echo'"),
        ((["a"],), {"model": "echo", "normalise": 1}, InvalidParameter, "did you mean 'normalize'"),
    ],
)
def test_a_wrong_call_fails_here(
    tasks: dict[str, Task], raw: Any, args: Any, kwargs: Any, kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind, match=said):
        tasks["embed"].apply_async(args, kwargs)
    assert raw.keys("*") == []


def test_a_full_queue_refuses(tasks: dict[str, Task], raw: Any, echo_fleet: FleetConfig) -> None:
    raw.lpush(codec.queue_key("echo", 9), *range(echo_fleet.models["echo"].limits.queue_jobs))
    with pytest.raises(QueueFull):
        tasks["embed"].delay(["a"], model="echo")


def test_the_body_is_elsewhere(tasks: dict[str, Task]) -> None:
    with pytest.raises(RequestError, match=r"call \.delay\(\)"):
        tasks["embed"](["a"])


def test_an_absent_redis_is_named(echo_fleet: FleetConfig) -> None:
    embed = tasks_of(f"redis://me:secret@127.0.0.1:{free_port()}/0", echo_fleet)["embed"]
    with pytest.raises(BrokerUnavailable) as caught:
        embed.delay(["a"], model="echo")
    assert "me:***@127.0.0.1" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_only_the_nine_are_made_on_demand() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        _ = module.nonsense  # type: ignore[attr-defined]
