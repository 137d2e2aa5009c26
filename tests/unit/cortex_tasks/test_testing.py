"""The in-process fleet that users' tests rely on does what its page says."""

from __future__ import annotations

import re
import struct
import threading
from typing import Any

import pytest

from cortex_tasks import InferenceFailed, InvalidInput, InvalidParameter, ModelUnavailable, QueueFull, testing
from cortex_tasks.catalog import TASKS
from cortex_tasks.config import FleetConfig, load_fleet
from cortex_tasks.payloads import EmbedParams, Series
from cortex_tasks.testing import LocalFleet, RecordedJob, echo_fleet
from tests.support.stub_models import PATIENCE_S
from tests.support.worker_process import QUEUES_FILE


def test_the_examples_of_its_page_run() -> None:
    examples = re.findall(r"\n\n((?:    .*\n|\n)+)", testing.__doc__ or "")
    names: dict[str, Any] = {"build_index": lambda client, texts: client.embed(texts)}
    for example in examples:
        exec("\n".join(line[4:] for line in example.splitlines()), names)
    with testing.fleet() as fleet:
        names["test_search"](fleet)


def test_every_alias_of_queues_yaml_answers_and_echo_serves_every_task() -> None:
    config = echo_fleet()
    assert set(config.models["echo"].tasks) == set(TASKS)
    with testing.fleet() as fleet:
        client = fleet.client()
        series = {"ds": ["2024-01-01", "2024-01-02"], "y": [1, 2]}
        for alias, model in config.models.items():
            for task in model.tasks:
                value = series if TASKS[task].input == "series" else "A [MASK]"
                params = {"labels": ["a"]} if task == "zero_shot" else {}
                assert client.submit(task, value, alias, **params).result().ok


def test_a_fleet_of_ones_own_is_used() -> None:
    config: FleetConfig = load_fleet(QUEUES_FILE)
    with testing.fleet(fleet=config) as fleet:
        assert fleet.client().embed("x").model == "echo"


def test_jobs_are_recorded_as_they_travelled() -> None:
    with testing.fleet(clock=lambda: 1_000.0) as fleet:
        client = fleet.client()
        client.forecast([("2024-01-01", 1), ("2024-01-02", 2)], horizon=2, lane="bulk", deadline_s=9, cache="off")
        job = fleet.jobs[0]
    assert job == RecordedJob(
        id=job.id,
        task="forecast",
        model="prophet",
        inputs=[{"ds": ["2024-01-01T00:00:00", "2024-01-02T00:00:00"], "y": [1.0, 2.0]}],
        params={"horizon": 2},
        queue="prophet",
        lane="bulk",
        cache="off",
        expires_at=1_009.0,
        sent_at=1_000.0,
        reply_to=job.reply_to,
    )


def test_a_handler_gets_checked_inputs_and_parameters() -> None:
    seen: list[Any] = []

    def handler(task: str, model: str, inputs: Any, params: Any) -> list[Any]:
        seen.append((task, model, list(inputs), params))
        return [InferenceFailed("no"), {"data": b"\x00\x00\x80?"}]

    with testing.fleet(handler) as fleet:
        first, second = fleet.client().embed(["a", "b"], normalize=False)
    assert seen == [("embed", "minilm", ["a", "b"], EmbedParams(normalize=False))]
    assert isinstance(first, InferenceFailed)
    assert not isinstance(second, Exception)
    assert second.vector.tolist() == [1.0]


def test_a_handlers_vectors_are_given_in_the_form_that_was_asked_for() -> None:
    def handler(task: str, model: str, inputs: Any, params: Any) -> list[Any]:
        return [{"data": struct.pack("<2f", 3, 4)} for _ in inputs]

    with testing.fleet(handler) as fleet:
        client = fleet.client()
        assert client.embed("a", dimensions=1).vector.tolist() == [1.0]
        found = client.embed("a", encoding="int8", model="echo")
        assert (found.codes.tolist(), found.dimensions) == ([95, 127], 2)
        with pytest.raises(InvalidParameter, match="over the 2 of model 'echo'"):
            client.embed("a", dimensions=3, model="echo")


def test_a_handler_gets_series() -> None:
    def handler(task: str, model: str, inputs: Any, params: Any) -> list[Any]:
        assert all(isinstance(value, Series) for value in inputs)
        return [{"points": [], "checked": len(value.y)} for value in inputs]

    with testing.fleet(handler) as fleet:
        assert fleet.client().detect_anomalies([("2024-01-01", 1), ("2024-01-02", 2)]).checked == 2


def test_a_raising_handler_fails_the_job() -> None:
    def handler(*_: Any) -> list[Any]:
        raise ModelUnavailable("gone")

    with testing.fleet(handler) as fleet, pytest.raises(ModelUnavailable, match="gone"):
        fleet.client().embed("a")


def test_a_handler_may_ask_for_something_itself() -> None:
    def handler(task: str, model: str, inputs: Any, params: Any) -> list[dict[str, Any]]:
        inner = len(client.embed("inner").data) if inputs == ["outer"] else 0
        return [{"data": struct.pack("f", inner)}]

    with testing.fleet(handler) as fleet:
        client = fleet.client()
        answered: list[Any] = []
        asking = threading.Thread(target=lambda: answered.append(client.embed("outer")), daemon=True)
        asking.start()
        asking.join(PATIENCE_S)
        assert [answer.vector.tolist() for answer in answered] == [[4.0]]


def test_inputs_that_bypassed_the_clients_checks_are_judged_as_a_worker_would() -> None:
    with testing.fleet() as fleet:
        client = fleet.client()
        plan = client._link().core.plan("embed")
        assert plan.envelope.queue == "minilm"
        draft = plan.order(["good"]).drafts[0]
        bad = draft.message.replace(b"good", b"    ")
        assert fleet.push(plan.envelope, [bad], partial=False) == (1, 1)
        raw = fleet.fetch([draft.id])[0]
    assert raw is not None
    assert b"invalid_input" in raw
    assert InvalidInput.code == "invalid_input"


def test_interactive_jobs_are_answered_before_bulk_ones() -> None:
    order: list[str] = []

    def handler(task: str, model: str, inputs: Any, params: Any) -> list[Any]:
        order.extend(inputs)
        return [{"data": b"\x00" * 4} for _ in inputs]

    with testing.fleet(handler) as fleet:
        client = fleet.client()
        fleet.hold()
        client.submit("embed", ["bulk"], lane="bulk")
        client.submit("embed", ["now"])
        fleet.release()
    assert order == ["now", "bulk"]


def test_what_waits_without_workers_is_taken_when_they_come() -> None:
    with testing.fleet() as fleet:
        with fleet.without_workers():
            job = fleet.client().submit("embed", "a")
            assert job.state == "PENDING"
        assert job.result().ok


def test_a_queue_has_its_configured_limit() -> None:
    raw = echo_fleet().model_dump(mode="json")
    raw["models"]["echo"]["limits"]["queue_jobs"] = 2
    with testing.fleet(fleet=FleetConfig.model_validate(raw)) as fleet:
        fleet.hold()
        client = fleet.client()
        jobs = [client.submit("embed", "a", "echo") for _ in range(2)]
        with pytest.raises(QueueFull, match="holds 2 jobs of at most 2"):
            client.embed("a", model="echo")
        fleet.release()
        assert all(job.result().ok for job in jobs)


async def test_release_from_another_thread_reaches_a_loop() -> None:
    fleet = LocalFleet()
    fleet.hold()
    async with fleet.aclient() as client:
        job = await client.submit("embed", "a")
        threading.Thread(target=fleet.release).start()
        assert (await job.result()).ok


def test_threads_end_with_the_fleet() -> None:
    before = set(threading.enumerate())
    with testing.fleet() as fleet:
        fleet.client().embed("a")
        assert len(set(threading.enumerate()) - before) == 1
    assert set(threading.enumerate()) <= before
