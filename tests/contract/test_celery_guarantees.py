"""What Celery promises, kept by every hook and by stock: one suite over all of them.

The client is first a plain Celery app that knows nothing of Cortex but the name of its tasks and queues; then Cortex's
own clients, with each of their switches.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import redis
from celery import Celery, chain, chord, group
from celery.exceptions import TaskRevokedError

import cortex_tasks.errors
from cortex_tasks import DeadlineExceeded, InferenceFailed, InvalidInput, ModelUnavailable, QueueFull
from cortex_tasks.codec import queue_keys
from cortex_tasks.config import FleetConfig
from cortex_tasks.echo import echo_vector
from tests.support.any_client import CLIENTS, AnyClient, any_client
from tests.support.redis_server import RedisServer
from tests.support.worker_process import WorkerProcess, poll_until

pytestmark = pytest.mark.fleet

ALL_HOOKS = {"CORTEX_POOL": "cortex", "CORTEX_BACKEND": "cortex", "CORTEX_TRANSPORT": "cortex"}
SETUPS: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "cortex": (ALL_HOOKS, ()),
    "stock-backend": ({**ALL_HOOKS, "CORTEX_BACKEND": "stock"}, ()),
    "stock-tracer": ({**ALL_HOOKS, "CORTEX_TRACER": "stock"}, ()),
    "stock-transport": ({**ALL_HOOKS, "CORTEX_TRANSPORT": "stock"}, ()),
    "stock-pool-threads": ({**ALL_HOOKS, "CORTEX_POOL": "stock"}, ("-P", "threads", "-c", "4")),
    "all-stock-solo": (
        {"CORTEX_POOL": "stock", "CORTEX_BACKEND": "stock", "CORTEX_TRANSPORT": "stock"},
        ("-P", "solo"),
    ),
    "all-stock-prefork": (
        {"CORTEX_POOL": "stock", "CORTEX_BACKEND": "stock", "CORTEX_TRANSPORT": "stock"},
        ("-P", "prefork", "-c", "2"),
    ),
}


class Bench(NamedTuple):
    """A running worker and a plain Celery client of it."""

    name: str
    worker: WorkerProcess
    app: Celery
    redis: Any
    gate: Path

    def send(self, inputs: Any, model: str = "echo", task: str = "embed", queue: str = "echo", **options: Any) -> Any:
        params = options.pop("params", {})
        kwargs = {"inputs": inputs, "model": model, **params}
        return self.app.send_task(f"cortex.{task}", kwargs=kwargs, queue=queue, **options)

    def sign(self, inputs: Any, model: str = "echo", **options: Any) -> Any:
        kwargs = {"inputs": inputs, "model": model}
        return self.app.signature("cortex.embed", kwargs=kwargs, queue="echo", immutable=True, **options)

    def tell(self, name: str, *args: Any) -> Any:
        return self.app.signature(f"tests.{name}", args=args, queue="echo")


@pytest.fixture(scope="module", params=list(SETUPS))
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    env, arguments = SETUPS[request.param]
    directory = tmp_path_factory.mktemp(request.param)
    gate = directory / "gate"
    with (
        RedisServer(directory=directory) as server,
        WorkerProcess(
            server.url,
            directory / "worker.log",
            env={**env, "CORTEX_TEST_GATE": str(gate)},
            arguments=(*arguments, "-I", "tests.support.extra_tasks"),
            wait=env["CORTEX_POOL"] == "cortex",
        ) as worker,
    ):
        app = Celery("plain", broker=server.url, backend=server.url, set_as_current=False)
        poll_until(lambda: app.control.inspect(timeout=0.5).ping(), f"a ping from the worker\n{worker.tail()}", 60)
        client = redis.Redis.from_url(server.url)
        yield Bench(request.param, worker, app, client, gate)
        app.close()
        client.close()


@pytest.fixture(params=CLIENTS)
def client(request: pytest.FixtureRequest, bench: Bench, echo_fleet: FleetConfig) -> Iterator[AnyClient]:
    """One of Cortex's own clients of the running worker."""
    made = any_client(request.param, bench.worker.url, echo_fleet)
    yield made
    made.close()


def unpack(data: bytes) -> tuple[float, ...]:
    import struct

    return struct.unpack(f"<{len(data) // 4}f", data)


def test_results_are_each_jobs_own(bench: Bench) -> None:
    sent = {f"text {n}": bench.send([f"text {n}"]) for n in range(50)}
    for text, result in sent.items():
        value = result.get(timeout=20)["items"][0]["value"]
        assert unpack(value["data"]) == pytest.approx(echo_vector(text), abs=1e-6)


def test_a_bad_input_fails_alone(bench: Bench) -> None:
    answer = bench.send(["fine", "", "[[echo:fail]]", 7, "fine too"]).get(timeout=20)
    kinds = [next(iter(item)) for item in answer["items"]]
    assert kinds == ["value", "error", "error", "error", "value"]
    assert [item["error"]["code"] for item in answer["items"][1:4]] == [
        "invalid_input", "inference_failed", "invalid_input",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"model": "ecoh"}, "UnknownModel"),
        ({"params": {"normalise": True}}, "InvalidParameter"),
        ({"model": "absent"}, "ModelUnavailable"),
    ],
)
def test_a_wrong_job_fails_with_its_type(bench: Bench, options: dict[str, Any], expected: str) -> None:
    result = bench.send(["text"], **options)
    with pytest.raises(getattr(cortex_tasks.errors, expected)):
        result.get(timeout=30)
    assert result.state == "FAILURE"


def test_a_transient_failure_is_retried(bench: Bench) -> None:
    assert bench.send(["text"], model="flaky").get(timeout=30)["items"][0]["value"]


def test_chain_group_and_chord(bench: Bench) -> None:
    assert chain(bench.sign(["a", "b"]), bench.tell("count_items")).apply_async().get(timeout=20) == 2
    answers = group(bench.sign([f"g{n}"]) for n in range(5)).apply_async().get(timeout=20)
    assert [len(answer["items"]) for answer in answers] == [1] * 5
    header = [bench.sign([f"c{n}", "x"]) for n in range(6)]
    assert chord(header, app=bench.app)(bench.tell("total_items")).get(timeout=20) == 12


def test_a_chord_whose_part_fails_fails(bench: Bench) -> None:
    header = [bench.sign(["a"]), bench.sign(["b"], model="ecoh")]
    result = chord(header, app=bench.app)(bench.tell("total_items"))
    with pytest.raises(Exception, match="unknown model"):
        result.get(timeout=20)


def test_callbacks_of_success_and_failure(bench: Bench) -> None:
    bench.send(["a"], link=bench.tell("note", "notes:ok")).get(timeout=20)
    poll_until(lambda: bench.redis.llen("notes:ok"), "the success callback")
    failed = bench.send(["a"], model="ecoh", link_error=bench.tell("note_error", "notes:bad"))
    with pytest.raises(cortex_tasks.errors.UnknownModel):
        failed.get(timeout=20)
    poll_until(lambda: bench.redis.llen("notes:bad"), "the failure callback")


def test_an_expired_job_is_not_computed(bench: Bench) -> None:
    result = bench.send(["late"], expires=-1)
    with pytest.raises(TaskRevokedError, match="expired"):
        result.get(timeout=20)


def test_an_ignored_result_is_not_stored(bench: Bench) -> None:
    result = bench.send(["a"], ignore_result=True)
    bench.send(["b"]).get(timeout=20)
    assert bench.redis.get(f"celery-task-meta-{result.id}") is None


def test_a_job_that_waits_can_be_revoked(bench: Bench) -> None:
    bench.gate.touch()
    try:
        runs = [bench.send([f"held {n}"], model="gated", queue="gated") for n in range(8)]
        poll_until(lambda: bench.gate.with_suffix(".entered").exists(), "a forward pass at the gate")
        waits = bench.send(["never"], model="gated", queue="gated")
        bench.app.control.revoke(waits.id, reply=True, timeout=2)
    finally:
        bench.gate.unlink()
    with pytest.raises(TaskRevokedError, match="revoked"):
        waits.get(timeout=20)
    assert all(len(run.get(timeout=20)["items"]) == 1 for run in runs)


def test_events_tell_the_life_of_a_job(bench: Bench) -> None:
    seen: dict[str, list[dict[str, Any]]] = {}
    for n in range(3):
        bench.send([f"nobody watches {n}"]).get(timeout=20)

    def note(event: dict[str, Any]) -> None:
        seen.setdefault(event.get("uuid", ""), []).append(event)

    with bench.app.connection() as connection:
        receiver = bench.app.events.Receiver(connection, handlers={"*": note})
        consumer = receiver.itercapture(limit=None, timeout=0.2, wakeup=False)
        result = None
        until = time.monotonic() + 20
        while time.monotonic() < until:
            try:
                next(consumer)
            except (StopIteration, TimeoutError, OSError):
                consumer = receiver.itercapture(limit=None, timeout=0.2, wakeup=False)
            if result is None:
                # It is the first thing that happens after the monitor came.
                result = bench.send(["watched"])
            elif any(event["type"] == "task-succeeded" for event in seen.get(result.id, [])):
                break
        assert result is not None
        events = {event["type"]: event for event in seen.get(result.id, [])}
    assert {"task-received", "task-started", "task-succeeded"} <= set(events)
    assert events["task-succeeded"]["runtime"] >= 0


def test_inspect_answers(bench: Bench) -> None:
    inspect = bench.app.control.inspect(timeout=2)
    (stats,) = (inspect.stats() or {}).values()
    assert stats["total"]["cortex.embed"] >= 1
    (registered,) = (inspect.registered() or {}).values()
    assert "cortex.embed" in registered


# ------------------------------------------------------------------------------------------ Cortex's own clients


def owns(items: Iterable[Any], texts: Iterable[str]) -> bool:
    """Whether these are the embeddings of these texts, in this order."""
    return [item.vector.tolist() for item in items] == [pytest.approx(echo_vector(text), abs=1e-6) for text in texts]


def test_a_clients_answers_are_each_calls_own(bench: Bench, client: AnyClient) -> None:
    fresh = {"model": "echo", "cache": "off"}
    assert owns([client.embed("single", **fresh)], ["single"])
    together = [f"together {n}" for n in range(20)]
    assert owns(client.embed_at_once(together, **fresh), together)
    listed = [f"listed {n}" for n in range(300)]
    assert owns(client.embed(listed, **fresh), listed)
    mapped = [f"mapped {n}" for n in range(100)]
    assert owns(client.map(iter(mapped), chunk=8, window=8, **fresh), mapped)
    job = client.submit(["one", "two"], **fresh)
    assert owns(client.result(job), ["one", "two"])
    # Whatever the client's and the worker's switches: a plain Celery app reads what is stored.
    stored = bench.app.AsyncResult(job.id).get(timeout=20)["items"]
    assert [unpack(item["value"]["data"]) for item in stored] == [
        pytest.approx(echo_vector(text), abs=1e-6) for text in ("one", "two")
    ]


def test_a_clients_errors_are_typed_and_its_neighbours_answered(client: AnyClient) -> None:
    for text, error in (("", InvalidInput), ("[[echo:fail]]", InferenceFailed)):
        with pytest.raises(error):
            client.embed(text, model="echo")
    fine, empty, failed, last = client.embed(["fine", "", "[[echo:fail]]", "last"], model="echo", cache="off")
    assert owns([fine, last], ["fine", "last"])
    assert [type(empty), type(failed)] == [InvalidInput, InferenceFailed]
    with pytest.raises(ModelUnavailable):
        client.embed("text", model="absent")


def test_a_clients_job_past_its_deadline_is_not_computed(client: AnyClient) -> None:
    with pytest.raises(DeadlineExceeded):
        client.result(client.submit("late", model="slow", deadline_s=1e-6, cache="off"))


def test_nothing_is_left_unacknowledged(bench: Bench) -> None:
    bench.send(["last"]).get(timeout=20)
    poll_until(lambda: bench.redis.hlen("unacked") == 0, "every message acknowledged", 20)


# ------------------------------------------------------------------------------------------- no worker needed


@pytest.mark.parametrize("name", CLIENTS)
def test_a_clients_queue_has_its_limit(name: str, redis_url: str, echo_fleet: FleetConfig) -> None:
    raw = echo_fleet.model_dump(mode="json")
    raw["models"]["orphan"]["limits"]["queue_jobs"] = 5
    client = any_client(name, redis_url, FleetConfig.model_validate(raw))

    def depth() -> int:
        with redis.Redis.from_url(redis_url) as server:
            return sum(server.llen(key) for key in queue_keys("orphan"))  # type: ignore[misc]

    try:
        with pytest.raises(QueueFull, match="holds 0 jobs of at most 5: 6 more were refused"):
            client.embed([f"listed {n}" for n in range(6 * 256)], model="orphan")
        assert depth() == 0, "all or none"
        answers = client.submit_at_once([f"job {n}" for n in range(12)], model="orphan")
        assert sum(isinstance(answer, QueueFull) for answer in answers) == 7
        assert depth() == 5
        with pytest.raises(QueueFull, match="holds 5 jobs") as refused:
            client.embed("one more", model="orphan")
        assert refused.value.details["retry_after_s"] > 0
    finally:
        client.close()
