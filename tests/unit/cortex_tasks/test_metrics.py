"""The fleet in figures: what is told, over HTTP and on the command line."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
import redis
from click.testing import CliRunner

from cortex_tasks.cache.report import CacheReport
from cortex_tasks.cli import main
from cortex_tasks.codec import queue_key
from cortex_tasks.depths import QueueDepth
from cortex_tasks.errors import BrokerUnavailable
from cortex_tasks.exporter import Exporter
from cortex_tasks.metrics import Snapshot, flops_per_token, render
from cortex_tasks.presence import ModelCard, WorkerCard
from tests.support.markdown import ROOT

NOW_S = 1_000.0


def card(node: str, *models: ModelCard, state: str = "ready", seen_at: float = NOW_S) -> WorkerCard:
    return WorkerCard.model_validate({
        "node": node, "image": "nlp", "host": "h", "pid": 1, "state": state, "queues": ("minilm",), "models": models,
        "started_at": 0.0, "seen_at": seen_at, "jobs": 7, "items": 9, "errors": 1,
    })  # fmt: skip


def model(state: str = "ready", **more: object) -> ModelCard:
    return ModelCard.model_validate({"alias": "minilm", "queue": "minilm", "state": state, **more})


def snapshot(*cards: WorkerCard) -> Snapshot:
    depth = QueueDepth("minilm", interactive=3, bulk=40, unacked=5, orphaned=1, dead=2)
    return Snapshot(NOW_S, [depth], cards, CacheReport([], 0, 0, 0, 0))


def samples(text: str) -> dict[str, float]:
    """Name with labels -> value; every line is a comment or a sample."""
    found = {}
    for line in text.splitlines():
        if not line.startswith("# "):
            name, value = re.fullmatch(r"([a-z0-9_]+(?:\{.*\})?) ([0-9.e+]+)", line).groups()  # type: ignore[union-attr]
            assert name not in found, name
            found[name] = float(value)
    return found


def test_every_figure_of_a_queue() -> None:
    said = samples(render(snapshot()))
    assert said['cortex_queue_ready_jobs{queue="minilm",lane="interactive"}'] == 3
    assert said['cortex_queue_ready_jobs{queue="minilm",lane="bulk"}'] == 40
    figures = {"unacked": 5, "total": 48, "orphaned": 1, "dead": 2}
    for name, value in figures.items():
        assert said[f'cortex_queue_{name}_jobs{{queue="minilm"}}'] == value


def test_workers_and_models_are_counted_by_state() -> None:
    text = render(
        snapshot(card("a", model()), card("b", model("loading"), state="starting"), card("c", model(), seen_at=0.0))
    )
    said = samples(text)
    assert said['cortex_workers{image="nlp",state="ready"}'] == 1
    assert said['cortex_workers{image="nlp",state="starting"}'] == 1
    assert said['cortex_workers{image="nlp",state="silent"}'] == 1
    assert said['cortex_model_workers{model="minilm",state="ready"}'] == 1
    assert said['cortex_worker_items_total{worker="a"}'] == 9
    assert 'worker="c"' not in text


def test_a_workers_name_cannot_forge_a_sample() -> None:
    said = samples(render(snapshot(card('x"} 1\ncortex_queue_total_jobs{queue="minilm'))))
    assert said['cortex_queue_total_jobs{queue="minilm"}'] == 48


def test_operations_are_counted_by_the_size_of_a_weight() -> None:
    cards = [card("a", model(size_bytes=400), model("loading", size_bytes=999))]
    assert flops_per_token(cards) == {"minilm": 200}
    assert flops_per_token([card("a", model(size_bytes=400, precision="int8"))]) == {"minilm": 800}


def test_prometheus_own_parser_takes_it() -> None:
    """Flower brings the library along; clients need not have it."""
    parser = pytest.importorskip("prometheus_client.parser", reason="prometheus_client is not installed")
    families = {family.name for family in parser.text_string_to_metric_families(render(snapshot(card("a", model()))))}
    assert {"cortex_queue_total_jobs", "cortex_workers", "cortex_worker_jobs", "cortex_cache_bytes"} <= families


# --------------------------------------------------------------------------------------------------- HTTP


@contextmanager
def served(exporter: Exporter) -> Iterator[httpx.Client]:
    thread = threading.Thread(target=exporter.serve_forever, daemon=True)
    thread.start()
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{exporter.server_address[1]}", trust_env=False) as client:
            yield client
    finally:
        exporter.shutdown()
        exporter.server_close()
        thread.join(10)


def test_an_autoscaler_gets_ready_and_unacked_of_a_queue() -> None:
    with served(Exporter(("127.0.0.1", 0), snapshot)) as client:
        answer = client.get("/queues/minilm")
        assert answer.headers["content-type"] == "application/json"
        assert {name: answer.json()[name] for name in ("ready", "unacked", "total")} == {
            "ready": 43, "unacked": 5, "total": 48,
        }  # fmt: skip
        assert samples(client.get("/metrics").text) == samples(render(snapshot()))
        assert client.get("/healthz").status_code == 200
        assert [client.get(path).status_code for path in ("/", "/queues/", "/queues/x", "/metricss")] == [404] * 4
        assert client.post("/metrics").status_code == 501


def test_redis_is_read_once_a_second() -> None:
    reads, clock = [], [0.0]
    exporter = Exporter(("127.0.0.1", 0), lambda: reads.append(1) or snapshot(), lambda: clock[0])
    try:
        for now_s in (0.0, 0.5, 1.0, 1.5, 2.0):
            clock[0] = now_s
            exporter.snapshot()
        assert len(reads) == 2
    finally:
        exporter.server_close()


def test_a_redis_that_is_away_is_told_and_forgotten() -> None:
    away = [True]

    def read() -> Snapshot:
        if away[0]:
            raise BrokerUnavailable("Redis at redis://:***@h does not answer")
        return snapshot()

    with served(Exporter(("127.0.0.1", 0), read)) as client:
        assert [client.get(path).status_code for path in ("/metrics", "/queues/minilm", "/healthz")] == [503, 503, 200]
        away[0] = False
        assert client.get("/metrics").status_code == 200


# -------------------------------------------------------------------------------------------- command line


@pytest.mark.fleet
def test_the_command_prints_the_figures_of_a_real_redis(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORTEX_BROKER_URL", redis_url)
    with redis.Redis.from_url(redis_url) as client:
        client.lpush(queue_key("minilm", 0), "a", "b")
    result = CliRunner().invoke(main, ["metrics"])
    assert result.exit_code == 0, result.output
    assert samples(result.output)['cortex_queue_total_jobs{queue="minilm"}'] == 2


@pytest.mark.fleet
def test_the_command_serves_until_it_is_told_to_end(redis_url: str) -> None:
    env = {**os.environ, "CORTEX_BROKER_URL": redis_url, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-c", "from cortex_tasks.cli import main; main()", "metrics", "--port", "0"]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        queue = httpx.get(url.replace("/metrics", "/queues/prophet"), trust_env=False).json()
        assert (queue["queue"], queue["total"]) == ("prophet", 0)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def test_a_redis_that_does_not_answer_is_an_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORTEX_BROKER_URL", "redis://127.0.0.1:1/0")
    began_s = time.monotonic()
    assert CliRunner().invoke(main, ["metrics"]).exit_code == 3
    assert time.monotonic() - began_s < 20
