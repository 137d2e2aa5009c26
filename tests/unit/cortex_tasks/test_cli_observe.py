"""``cortex models`` and ``cortex status``, over a real Redis with the cards of workers that are made up."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from click.testing import CliRunner, Result

from cortex_tasks.cli import main
from cortex_tasks.config import load_fleet
from cortex_tasks.presence import WORKERS_KEY, ModelCard, WorkerCard, worker_key
from tests.support.redis_server import RedisServer, free_port

pytestmark = pytest.mark.fleet


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer() as running:
        yield running


@pytest.fixture
def client(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[redis.Redis]:
    monkeypatch.setenv("CORTEX_BROKER_URL", server.url)
    with redis.Redis.from_url(server.url) as connected:
        connected.flushall()
        yield connected


def model(alias: str, state: str, **more: Any) -> ModelCard:
    queue = load_fleet().models[alias].queue
    return ModelCard.model_validate({"alias": alias, "queue": queue, "state": state, **more})


@pytest.fixture
def worker(client: redis.Redis) -> Callable[..., None]:
    def put(node: str, *models: ModelCard, state: str = "ready", **more: Any) -> None:
        queues = tuple(dict.fromkeys(entry.queue for entry in models))
        card = WorkerCard.model_validate({
            "node": node, "image": "nlp", "host": "h", "pid": 1, "state": state, "queues": queues, "models": models,
            "started_at": time.time() - 3_700, "seen_at": time.time(), **more,
        })  # fmt: skip
        client.set(worker_key(node), card.model_dump_json())
        client.zadd(WORKERS_KEY, {node: card.seen_at})

    return put


def cortex(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def test_models_that_no_worker_holds(client: redis.Redis) -> None:
    rows = json.loads(cortex("models", "--json").stdout)
    assert [row["alias"] for row in rows] == list(load_fleet().models)
    assert {row["state"] for row in rows} == {"no worker"}
    assert rows[0]["tasks"] == ["embed"]


def test_models_over_several_workers(worker: Callable[..., None]) -> None:
    worker("a@h", model("minilm", "ready", revision="abc123"), model("sentiment", "unavailable", reason="no weights"))
    worker("b@h", model("minilm", "loading"), model("spacy", "idle"))
    rows = {row["alias"]: row for row in json.loads(cortex("models", "--json").stdout)}
    assert (rows["minilm"]["state"], rows["minilm"]["nodes"], rows["minilm"]["revision"]) == (
        "ready",
        ["a@h"],
        "abc123",
    )
    assert (rows["sentiment"]["state"], rows["sentiment"]["reason"]) == ("unavailable", "no weights")
    assert rows["spacy"]["state"] == "idle"
    text = cortex("models").stdout
    assert "sentiment: no weights" in text
    assert text.splitlines()[0].split() == ["model", "state", "revision", "tasks", "queue", "images", "on"]


def test_models_show_the_engine_that_runs_and_why_it_is_not_the_one_asked_for(worker: Callable[..., None]) -> None:
    refused = "openvino int8 is refused: mean cosine 0.9900 < 0.995; runs in fp32"
    worker("a@h", model("minilm", "ready", engine="openvino int8 cos 0.9980 top10 0.965"),
           model("sentiment", "ready", engine="torch fp32"))  # fmt: skip
    worker("b@h", model("minilm", "ready", engine="openvino fp32 cos 1.0000 top10 1.000", reason=refused))
    rows = {row["alias"]: row for row in json.loads(cortex("models", "--json").stdout)}
    assert rows["minilm"]["engine"] == "openvino int8 cos 0.9980 top10 0.965, openvino fp32 cos 1.0000 top10 1.000"
    text = cortex("models").stdout
    assert f"minilm: {rows['minilm']['engine']}; {refused}" in text
    assert "sentiment: " not in text


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_models_show_the_default_engine_where_it_was_chosen(
    worker: Callable[..., None], backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    declared = (
        (Path(__file__).resolve().parents[3] / "queues.yaml")
        .read_text()
        .replace("backend: torch", f"backend: {backend}", 1)
    )
    (tmp_path / "queues.yaml").write_text(declared)
    monkeypatch.setenv("CORTEX_QUEUES_FILE", str(tmp_path / "queues.yaml"))
    worker("a@h", model("minilm", "ready", engine="torch fp32"))
    assert ("minilm: torch fp32" in cortex("models").stdout) == (backend == "auto")


def test_models_without_redis_are_the_declared_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORTEX_BROKER_URL", f"redis://:hunter2@127.0.0.1:{free_port()}/0")
    result = cortex("models", "--json")
    assert result.exit_code == 0
    assert len(json.loads(result.stdout)) == 6
    assert "showing only what queues.yaml declares" in result.stderr
    assert "hunter2" not in result.output


def test_status_without_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORTEX_BROKER_URL", f"redis://:hunter2@127.0.0.1:{free_port()}/0")
    result = cortex("status")
    assert (result.exit_code, result.stdout) == (3, "")
    assert "redis://:***@127.0.0.1" in result.stderr
    assert "hunter2" not in result.output


def test_status_of_workers_and_queues(worker: Callable[..., None], client: redis.Redis) -> None:
    worker("a@h", model("minilm", "ready"), jobs=12, errors=1, items_per_s=3.25)
    client.lpush("minilm", "x", "y")
    client.lpush("cortex:dead:minilm", "z")
    answer = json.loads(cortex("status", "--json").stdout)
    assert answer["workers"][0]["node"] == "a@h"
    minilm = answer["queues"][0]
    assert (minilm["queue"], minilm["ready"], minilm["total"], minilm["dead"]) == ("minilm", 2, 2, 1)
    assert answer["redis"]["used_memory_bytes"] > 0
    lines = cortex("status").stdout.splitlines()
    assert lines[1].split() == ["a@h", "nlp", "ready", "minilm", "12", "1", "3.2", "1", "h", "01", "min"]
    assert ["minilm", "2", "0", "0", "2", "0", "1"] in [line.split() for line in lines]


def ready_fleet(worker: Callable[..., None], *, but: str = "", **more: Any) -> None:
    """One ready worker for every queue of queues.yaml; none for the queue ``but``."""
    for queue in load_fleet().queues:
        if queue != but:
            worker(
                f"{queue}@h", *(model(a, "ready") for a, m in load_fleet().models.items() if m.queue == queue), **more
            )


def test_a_healthy_fleet_passes_the_check(worker: Callable[..., None]) -> None:
    ready_fleet(worker)
    worker("a@h", model("minilm", "ready"), model("sentiment", "unavailable", reason="lazy ones may be"))
    worker("b@h", model("prophet", "loading"), state="starting")
    result = cortex("status", "--check")
    assert (result.exit_code, result.stderr) == (0, "")


@pytest.mark.parametrize(
    ("put", "fault"),
    [
        (lambda worker, client: None, "no worker is ready"),
        (lambda worker, client: None, "queue 'prophet' (models: prophet): no worker consumes it"),
        (lambda worker, client: worker("a@h", model("minilm", "loading"), state="starting"), "no worker is ready"),
        (
            lambda worker, client: (
                ready_fleet(worker, but="spacy"),
                worker("b@h", model("spacy", "loading"), state="starting"),
            ),
            "queue 'spacy' (models: spacy): no ready worker consumes it (b@h is starting)",
        ),
        (
            lambda worker, client: (
                ready_fleet(worker, but="spacy"),
                worker("b@h", model("spacy", "ready"), seen_at=time.time() - 7),
            ),
            "queue 'spacy' (models: spacy): no ready worker consumes it (b@h is silent)",
        ),
        (
            lambda worker, client: (
                ready_fleet(worker),
                worker("a@h", model("minilm", "unavailable", reason="no weights")),
            ),
            "pinned model 'minilm' is unavailable on a@h: no weights",
        ),
        (
            lambda worker, client: (ready_fleet(worker, but="prophet"), client.lpush("prophet", "x", "y")),
            "queue 'prophet' (models: prophet): no worker consumes it, 2 jobs wait",
        ),
    ],
)
def test_what_the_check_finds(
    worker: Callable[..., None], client: redis.Redis, put: Callable[..., object], fault: str
) -> None:
    put(worker, client)
    result = cortex("status", "--check")
    assert result.exit_code == 1
    assert f"cortex: {fault}\n" in result.stderr
    assert cortex("status").exit_code == 0
    assert fault in json.loads(cortex("status", "--json").stdout)["faults"]


def test_dead_letters_are_a_warning_and_fail_when_strict(worker: Callable[..., None], client: redis.Redis) -> None:
    ready_fleet(worker)
    client.lpush("cortex:dead:minilm", "x", "y")
    found = "2 dead letters on queue 'minilm': see `cortex dead list minilm`"
    lenient = cortex("status", "--check")
    assert (lenient.exit_code, lenient.stderr) == (0, f"cortex: warning: {found}\n")
    for strict in (cortex("status", "--strict"), cortex("status", "--check", "--strict")):
        assert (strict.exit_code, strict.stderr) == (1, f"cortex: {found}\n")
    assert json.loads(cortex("status", "--json").stdout)["warnings"] == [found]


def test_a_killed_worker_is_silent(worker: Callable[..., None]) -> None:
    worker("a@h", model("minilm", "ready"), seen_at=time.time() - 7)
    worker("b@h", model("spacy", "ready"), seen_at=time.time() - 7)
    worker("c@h", model("spacy", "ready"))
    shown = json.loads(cortex("status", "--json").stdout)["workers"]
    assert [card["silent"] for card in shown] == [True, True, False]
    assert cortex("status").stdout.splitlines()[1].split()[:3] == ["a@h", "nlp", "silent"]
    rows = {row["alias"]: row for row in json.loads(cortex("models", "--json").stdout)}
    assert (rows["minilm"]["state"], rows["minilm"]["nodes"]) == ("silent", [])
    assert (rows["spacy"]["state"], rows["spacy"]["nodes"]) == ("ready", ["c@h"])


def test_models_tell_each_workers_memory_and_tiers(worker: Callable[..., None]) -> None:
    store = {
        "memory_bytes": 91_000_000, "memory_limit_bytes": 2_000_000_000, "evictions": 3, "reloads": 2,
        "tiers": {"memory": {"hits": 3, "misses": 1}, "l2": {"hits": 1, "misses": 1, "faults": 2, "mean_ms": 530.4}},
    }  # fmt: skip
    loaded = model("minilm", "ready", size_bytes=91_000_000, load_ms=121.4, tier="local")
    worker("a@h", loaded, model("sentiment", "idle"), store=store)
    text = cortex("models").stdout
    assert "a@h: minilm 91 MB (load 121 ms, from local); 91 of 2,000 MB; 3 evictions, 2 reloads" in text
    assert "hits: memory 75 %, l2 50 % (530 ms) 2 faults" in text
    rows = {row["alias"]: row for row in json.loads(cortex("models", "--json").stdout)}
    assert (rows["minilm"]["size_bytes"], rows["minilm"]["load_ms"], rows["minilm"]["tiers"]) == (
        91_000_000,
        121.4,
        ["local"],
    )


def test_the_commands_of_a_host_without_workers_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "workers.commands", None)
    result = cortex("models", "list")
    assert result.exit_code == 2
    assert "models list` needs 'workers.commands', which is not installed here" in result.stderr
