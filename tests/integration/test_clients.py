"""Clients of every kind against a real worker: threads, coroutines, Celery's canvas, a foreign Celery app."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from celery import Celery, Task, chain, chord, group

from cortex_tasks import (
    AsyncCortex,
    Cortex,
    InferenceFailed,
    JobCancelled,
    ModelUnavailable,
    NoConsumer,
    Settings,
    parse,
)
from cortex_tasks.app import make_app
from cortex_tasks.catalog import TASKS
from cortex_tasks.config import FleetConfig
from cortex_tasks.echo import FAIL, echo_vector
from cortex_tasks.tasks import register
from tests.support.worker_process import WorkerProcess

pytestmark = pytest.mark.fleet

SERIES = {"ds": ["2024-01-01", "2024-01-02"], "y": [1.0, 2.0]}


@pytest.fixture
def client(echo_worker: WorkerProcess, echo_fleet: FleetConfig) -> Iterator[Cortex]:
    with Cortex(echo_worker.url, fleet=echo_fleet) as client:
        yield client


@pytest.fixture(scope="module")
def tasks(echo_worker: WorkerProcess, echo_fleet: FleetConfig) -> Iterator[dict[str, Task]]:
    settings = Settings.model_validate({"broker_url": echo_worker.url})
    app = make_app(settings, echo_fleet, fail_fast=True)
    yield register(app, settings, echo_fleet)
    app.close()


def vector(text: str) -> object:
    return pytest.approx(echo_vector(text))


@pytest.mark.parametrize("task", sorted(TASKS))
def test_every_task_is_answered_with_its_timings(client: Cortex, task: str) -> None:
    value = SERIES if TASKS[task].input == "series" else "A [MASK] text"
    params = {"labels": ["a", "b"]} if task == "zero_shot" else {}
    result = client.submit(task, [value, value], "echo", **params).result()
    assert [type(item) for item in result.values()] == [TASKS[task].result] * 2
    assert result.revision
    assert result.timings.total_ms > 0


def test_items_fail_alone(client: Cortex) -> None:
    result = client.embed(["one", FAIL, "", "two"], model="echo")
    assert sorted(result.errors) == [1, 2]
    assert isinstance(result[1], InferenceFailed)


def test_threads_get_their_own_answers(client: Cortex) -> None:
    def ask(text: str) -> bool:
        return bool(client.embed(text, model="echo").vector.tolist() == vector(text))

    with ThreadPoolExecutor(20) as pool:
        assert all(pool.map(ask, (f"text {number}" for number in range(400))))


def test_a_stream_comes_back_in_order(client: Cortex) -> None:
    texts = [f"text {number}" for number in range(3_000)]
    for text, item in zip(texts, client.map("embed", texts, "echo", chunk=7), strict=True):
        assert item.vector.tolist() == vector(text)


async def test_coroutines_get_their_own_answers(echo_worker: WorkerProcess, echo_fleet: FleetConfig) -> None:
    async with AsyncCortex(echo_worker.url, fleet=echo_fleet) as client:
        texts = [f"text {number}" for number in range(400)]
        found = await asyncio.gather(*(client.embed(text, model="echo") for text in texts))
        assert [item.vector.tolist() for item in found] == [vector(text) for text in texts]
        streamed = [item async for item in client.map("embed", texts, "echo", chunk=7)]
        assert [item.vector.tolist() for item in streamed] == [vector(text) for text in texts]


def test_an_unavailable_model_says_so(client: Cortex) -> None:
    with pytest.raises(ModelUnavailable):
        client.embed("x", model="absent")


def test_a_queue_that_this_fleet_does_not_serve_is_named(client: Cortex, echo_fleet: FleetConfig) -> None:
    queue = echo_fleet.models["orphan"].queue
    with pytest.raises(NoConsumer, match=f"queue '{queue}'"):
        client.embed("x", model="orphan", timeout_s=0.2)


def test_a_cancelled_job_is_never_computed(client: Cortex) -> None:
    job = client.submit("embed", "x", "orphan")
    assert job.cancel()
    with pytest.raises(JobCancelled):
        job.result()


# -------------------------------------------------------------------------------------------- Celery's own ways


def test_delay_groups_chains_and_chords(tasks: dict[str, Task]) -> None:
    embed, classify = tasks["embed"], tasks["classify"]
    answer = parse(embed.delay(inputs=["one", "two"], model="echo").get(timeout=20))
    assert [item.vector.tolist() for item in answer.values()] == [vector("one"), vector("two")]
    several = group(embed.s([f"text {n}"], model="echo") for n in range(10))().get(timeout=20, interval=0.05)
    assert [parse(one).values()[0].vector.tolist() for one in several] == [vector(f"text {n}") for n in range(10)]
    linked = chain(embed.s(["first"], model="echo"), classify.si(["second"], model="echo"))()
    assert parse(linked.get(timeout=20)).task == "classify"
    joined = chord([embed.s([text], model="echo") for text in "ab"], classify.si(["c"], model="echo"))()
    assert parse(joined.get(timeout=20)).ok


def test_a_failed_job_raises_its_own_error_from_get(tasks: dict[str, Task]) -> None:
    with pytest.raises(ModelUnavailable):
        tasks["embed"].delay(["x"], model="absent").get(timeout=20)


def test_any_celery_app_at_the_same_redis_may_send_and_read(echo_worker: WorkerProcess) -> None:
    other = Celery("other", broker=echo_worker.url, backend=echo_worker.url, set_as_current=False)
    result = other.send_task("cortex.embed", kwargs={"inputs": ["x"], "model": "echo"}, queue="echo")
    assert parse(result.get(timeout=20)).values()[0].vector.tolist() == vector("x")
    other.close()
