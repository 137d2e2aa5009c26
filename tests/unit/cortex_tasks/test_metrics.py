"""The fleet for Prometheus, printed and served."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator

import httpx
import pytest
import redis
from click.testing import CliRunner
from prometheus_client.parser import text_string_to_metric_families

from cortex_tasks.cli import main
from cortex_tasks.depths import QueueDepth
from cortex_tasks.errors import BrokerUnavailable
from cortex_tasks.metrics import MetricsServer, exposition
from cortex_tasks.presence import ModelCard, StoreCard, WorkerCard
from tests.support.markdown import ROOT
from tests.support.redis_server import free_port
from tests.support.worker_process import poll_until

NOW_S = 1_000.0
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples(lines: Iterable[str]) -> Samples:
    """As Prometheus reads them."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families("".join(f"{line}\n" for line in lines))
        for sample in family.samples
    }


def of(found: Samples, name: str, **labels: str) -> float:
    return found[name, frozenset(labels.items())]


def card(node: str, seen_at: float = NOW_S) -> WorkerCard:
    return WorkerCard(
        node=node, image="nlp", host="h", pid=1, state="ready", queues=("minilm",), started_at=0.0, seen_at=seen_at,
        models=(ModelCard(alias="minilm", queue="minilm", state="ready", items=70, batches=7, load_ms=1_500, loads=2),),
        jobs=12, errors=3, store=StoreCard(memory_bytes=123_456_789_012),
    )  # fmt: skip


def test_every_figure_is_there() -> None:
    depths = [QueueDepth("minilm", interactive=1, bulk=20, unacked=300, orphaned=4, dead=5)]
    found = samples(exposition([card('a"\\\n@h'), card("b@h", NOW_S - 60)], depths, NOW_S))
    states = ("interactive", "bulk", "unacked")
    assert [of(found, "cortex_queue_jobs", queue="minilm", state=state) for state in states] == [1, 20, 300]
    assert of(found, "cortex_queue_orphaned_jobs", queue="minilm") == 4
    assert of(found, "cortex_queue_dead_letters", queue="minilm") == 5
    assert of(found, "cortex_workers", image="nlp", state="ready") == 1
    assert of(found, "cortex_workers", image="nlp", state="silent") == 1
    assert of(found, "cortex_worker_jobs_total", node='a"\\\n@h', image="nlp") == 12
    assert of(found, "cortex_worker_errors_total", node="b@h", image="nlp") == 3
    assert of(found, "cortex_worker_model_memory_bytes", node="b@h", image="nlp") == 123_456_789_012
    assert of(found, "cortex_model_items_total", node="b@h", model="minilm") == 70
    assert of(found, "cortex_model_ready", node="b@h", model="minilm") == 1
    assert of(found, "cortex_model_load_seconds", node="b@h", model="minilm") == 1.5


@pytest.mark.fleet
def test_the_command_prints_queues_and_the_cache(redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        client.rpush("minilm", "one", "two")
    done = CliRunner().invoke(main, ["metrics"], env={"CORTEX_BROKER_URL": redis_url})
    assert done.exit_code == 0, done.output
    found = samples(done.stdout.splitlines())
    assert sum(of(found, "cortex_queue_jobs", queue="minilm", state=s) for s in ("interactive", "bulk")) == 2
    assert of(found, "cortex_cache_entries") == 0


@pytest.mark.parametrize("listen", ["9540", "127.0.0.1:", "127.0.0.1:http", "127.0.0.1:70000", "192.0.2.1:9540"])
def test_an_address_that_cannot_be_had_is_wrong_usage(listen: str) -> None:
    done = CliRunner().invoke(main, ["metrics", "--listen", listen])
    assert done.exit_code == 2
    assert "--listen" in done.stderr


class Told:
    """Lines, or the error that reading them ends with."""

    error: Exception | None = None

    def __call__(self) -> Iterator[str]:
        yield "a 1"
        if self.error is not None:
            raise self.error

    def queues(self) -> list[QueueDepth]:
        if self.error is not None:
            raise self.error
        return [QueueDepth("minilm", interactive=3, bulk=40, unacked=5, orphaned=1, dead=2)]


def test_it_is_served_and_says_why_not() -> None:
    told = Told()
    with MetricsServer(("127.0.0.1", free_port()), told, told.queues) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{server.server_address[1]}", timeout=20) as client:
                answer = client.get("/metrics")
                assert (answer.status_code, answer.text) == (200, "a 1\n")
                assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
                assert client.get("/healthcheck").text == "OK\n"
                assert [client.get(path).status_code for path in ("/else", "/queues/", "/queues/x")] == [404] * 3
                answer = client.get("/queues/minilm")
                assert answer.headers["content-type"] == "application/json"
                assert {name: answer.json()[name] for name in ("queue", "ready", "unacked", "total")} == {
                    "queue": "minilm", "ready": 43, "unacked": 5, "total": 48,
                }  # fmt: skip
                told.error = BrokerUnavailable("Redis does not answer")
                answer = client.get("/metrics")
                assert (answer.status_code, answer.text) == (503, "Redis does not answer\n")
                assert client.get("/queues/minilm").status_code == 503
        finally:
            server.shutdown()
            thread.join(20)


@pytest.mark.fleet
def test_the_command_serves_queues_until_it_is_told_to_end(redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        client.rpush("minilm", "one", "two")
    port = free_port()
    env = {**os.environ, "CORTEX_BROKER_URL": redis_url, "PYTHONPATH": str(ROOT)}
    listen = ["metrics", "--listen", f"127.0.0.1:{port}"]
    command = [sys.executable, "-c", "from cortex_tasks.cli import main; main()", *listen]
    with subprocess.Popen(command, env=env) as process, httpx.Client(timeout=20) as client_:
        poll_until(lambda: answers(client_, f"http://127.0.0.1:{port}/healthcheck"), "the server answers")
        assert client_.get(f"http://127.0.0.1:{port}/queues/minilm").json()["total"] == 2
        process.terminate()
        assert process.wait(20) == 0


def answers(client: httpx.Client, url: str) -> bool:
    try:
        return client.get(url).status_code == 200
    except httpx.TransportError:
        return False
