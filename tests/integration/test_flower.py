"""A real Flower, started as the Procfile has it, watches a real worker."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from celery import chain

from cortex_tasks import Cortex, CortexError, ModelUnavailable
from cortex_tasks.app import make_app
from cortex_tasks.config import FleetConfig
from cortex_tasks.procfile import child_environment, default_procfile, read_procfile
from cortex_tasks.settings import Settings
from cortex_tasks.tasks import register
from tests.support.redis_server import RedisServer, free_port
from tests.support.worker_process import WorkerProcess, poll_until

pytestmark = pytest.mark.fleet

#: 5,000 characters; every word but the first few tells whether a document was shown.
DOCUMENT = " ".join(f"word{n:04}" for n in range(556))[:5_000]
#: Characters of arguments that a person reads at a glance.
READABLE_CHARS = 300


class Watched(NamedTuple):
    """A worker of echo models, Flower beside it, and a client of each."""

    worker: WorkerProcess
    flower: httpx.Client
    cortex: Cortex
    fleet: FleetConfig

    def info(self, job_id: str, state: str) -> dict[str, Any]:
        """What Flower knows of a job that is in a state; Flower's events are a moment late."""

        def look() -> dict[str, Any] | None:
            answer = self.flower.get(f"/api/task/info/{job_id}")
            found: dict[str, Any] | None = answer.json() if answer.status_code == 200 else None
            return found if found is not None and found["state"] == state else None

        found: dict[str, Any] = poll_until(look, f"Flower shows job {job_id} as {state}")
        return found

    def node(self) -> str:
        card = self.worker.card()
        assert card is not None
        return card.node


def start_flower(worker: WorkerProcess, directory: Path, port: int) -> subprocess.Popen[bytes]:
    """The Procfile's own command. Its API is off unless it is asked for."""
    env = {**worker.env, "CORTEX_FLOWER_PORT": str(port), "FLOWER_UNAUTHENTICATED_API": "true"}
    command = read_procfile(default_procfile())["flower"]
    with (directory / "flower.log").open("ab") as log:
        return subprocess.Popen(
            ["/bin/sh", "-c", f"exec {command}"], cwd=directory, env=child_environment(env), stdout=log, stderr=log
        )


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, echo_fleet: FleetConfig) -> Iterator[Watched]:
    directory = tmp_path_factory.mktemp("flower")
    with (
        RedisServer(directory=directory) as server,
        WorkerProcess(server.url, directory / "worker.log", arguments=("-I", "tests.support.extra_tasks")) as worker,
        Cortex(server.url, fleet=echo_fleet) as cortex,
    ):
        port = free_port()
        process = start_flower(worker, directory, port)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as flower:

                def sees_the_worker() -> bool:
                    log = (directory / "flower.log").read_text()
                    assert process.poll() is None, f"Flower ended:\n{log}"
                    try:
                        return bool(flower.get("/api/workers", params={"refresh": 1}).json())
                    except httpx.TransportError:
                        return False

                poll_until(sees_the_worker, "Flower sees the worker", 60)
                yield Watched(worker, flower, cortex, echo_fleet)
        finally:
            process.terminate()
            process.wait(20)


def test_the_worker_is_shown_with_its_queues_and_batches(watched: Watched) -> None:
    watched.cortex.embed(["one", "two", "three"], model="echo")
    workers = watched.flower.get("/api/workers", params={"refresh": 1}).json()
    assert list(workers) == [watched.node()]
    shown = workers[watched.node()]
    assert [queue["name"] for queue in shown["active_queues"]] == ["echo", "slow", "poison", "gated"]
    assert "cortex.embed" in shown["registered"]
    pool = shown["stats"]["pool"]
    assert pool["implementation"] == "workers.celery_hooks.pool:BatchingPool"
    assert pool["jobs-in-flight"] == 0
    assert pool["model-echo"].startswith("ready, 1 jobs, 3 items in 1 batches (mean 3.0)")
    assert pool["model-poison"].startswith("idle, 0 jobs")
    page = watched.flower.get(f"/worker/{watched.node()}")
    assert page.status_code == 200
    assert "3 items in 1 batches" in page.text


def test_runtimes_include_the_models_time(watched: Watched) -> None:
    """Model slow takes 20 ms a forward pass; Celery's part of a job is well below a millisecond."""
    jobs = [watched.cortex.submit("embed", f"text {n}", "slow") for n in range(3)]
    for job in jobs:
        job.result()
        shown = watched.info(job.id, "SUCCESS")
        assert shown["name"] == "cortex.embed"
        assert shown["worker"] == watched.node()
        assert shown["runtime"] >= 0.02
        assert shown["result"].startswith("<embed slow@")


def test_the_time_in_the_queue_is_not_part_of_the_runtime(watched: Watched) -> None:
    """Forty batches of 8 take 0.8 s; the last job waited for most of it, and itself took one batch."""
    began = time.perf_counter()
    jobs = [watched.cortex.submit("embed", f"text {n}", "slow") for n in range(320)]
    for job in jobs:
        job.result()
    took_s = time.perf_counter() - began
    assert watched.info(jobs[-1].id, "SUCCESS")["runtime"] < took_s / 2


def test_failures_show_their_type(watched: Watched) -> None:
    job = watched.cortex.submit("embed", "text", "absent")
    with pytest.raises(ModelUnavailable):
        job.result()
    shown = watched.info(job.id, "FAILURE")
    assert shown["exception"].startswith("ModelUnavailable(")
    assert "/nonexistent/model" in shown["exception"]
    page = watched.flower.get(f"/task/{job.id}")
    assert page.status_code == 200
    assert "ModelUnavailable" in page.text


def test_a_bad_input_is_counted_in_the_result(watched: Watched) -> None:
    job = watched.cortex.submit("embed", ["fine", "[[echo:fail]]"], "echo")
    assert isinstance(job.result()[1], CortexError)
    assert "2 items, 1 failed" in watched.info(job.id, "SUCCESS")["result"]


def test_arguments_are_readable_and_documents_are_not_shown(watched: Watched) -> None:
    job = watched.cortex.submit("embed", [DOCUMENT] * 3, "echo", normalize=False)
    job.result()
    shown = watched.info(job.id, "SUCCESS")
    assert shown["args"] == "()"
    assert shown["kwargs"] == "{'inputs': <3 texts, 'word0000 word…'>, 'model': 'echo', 'normalize': False}"
    page = watched.flower.get(f"/task/{job.id}")
    assert page.status_code == 200
    assert "word0000" in page.text
    assert "word0100" not in page.text + repr(shown)


def test_documents_of_celery_native_jobs_are_not_shown(watched: Watched) -> None:
    """Sent by the program itself, and by a worker as the next link of a chain."""
    settings = Settings.model_validate({"broker_url": watched.worker.url})
    app = make_app(settings, watched.fleet, fail_fast=True)
    try:
        embed = register(app, settings, watched.fleet)["embed"]
        sent = embed.delay([DOCUMENT], model="echo")
        first = app.signature("tests.same", args=([DOCUMENT],), options={"queue": "echo"})
        linked = chain(first, embed.s(model="echo"), app=app).apply_async()
        for result in (sent, linked):
            result.get(timeout=20)
            shown = watched.info(result.id, "SUCCESS")
            assert len(shown["args"]) + len(shown["kwargs"]) < READABLE_CHARS
            assert "word0000" in shown["args"] + shown["kwargs"]
    finally:
        app.close()


def test_a_retried_job_stays_readable(watched: Watched) -> None:
    """Model flaky cannot be loaded at its first attempt; Celery itself sends the second message."""
    job = watched.cortex.submit("embed", DOCUMENT, "flaky")
    job.result()
    shown = watched.info(job.id, "SUCCESS")
    assert shown["retries"] == 1
    assert shown["kwargs"] == "{'inputs': <1 text, 'word0000 word…'>, 'model': 'flaky'}"


@pytest.mark.parametrize("page", ["/", "/tasks", "/broker", "/metrics"])
def test_every_page_renders(watched: Watched, page: str) -> None:
    answer = watched.flower.get(page)
    assert answer.status_code == 200, answer.text


def test_metrics_count_the_jobs(watched: Watched) -> None:
    job = watched.cortex.submit("embed", "counted", "echo")
    job.result()
    watched.info(job.id, "SUCCESS")
    metrics = watched.flower.get("/metrics").text
    (line,) = [
        line for line in metrics.splitlines()
        if line.startswith("flower_events_total{") and "task-succeeded" in line and "cortex.embed" in line
    ]  # fmt: skip
    assert float(line.rpartition(" ")[2]) >= 1
    assert f'flower_worker_online{{worker="{watched.node()}"}} 1.0' in metrics
