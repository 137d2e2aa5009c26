"""Fixtures that every test may use: a real Redis, a fleet of echo models, a real worker."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from celery.result import AsyncResult
from hypothesis import HealthCheck, settings

from cortex_tasks.config import FleetConfig, load_fleet
from tests.support.redis_server import RedisServer, redis_executable
from tests.support.worker_process import QUEUES_FILE, WorkerProcess
from workers.resources import calm_openmp

# Tests share the cores with the workers they start.
calm_openmp()

# It unsubscribes a result that is collected. A result that outlives its test's Redis would try that for seconds and
# warn, wherever the collection happens: within ``ast.parse``, CPython 3.11 dies of it.
del AsyncResult.__del__


# How long an example takes depends on what else the machine does: that is no finding.
settings.register_profile("cortex", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.load_profile("cortex")


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One server for the session. A missing one skips on a laptop and fails in CI."""
    try:
        redis_executable()
    except FileNotFoundError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
    with RedisServer(directory=tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    """The session's Redis, emptied."""
    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
    return redis_server.url


@pytest.fixture(scope="session")
def echo_fleet() -> FleetConfig:
    """The configuration of tests/support/queues.test.yaml."""
    return load_fleet(QUEUES_FILE)


@pytest.fixture(scope="module")
def echo_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    """A worker of echo models with a Redis of its own, shared by a module's tests."""
    directory = tmp_path_factory.mktemp("worker")
    with RedisServer(directory=directory) as server, WorkerProcess(server.url, directory / "worker.log") as worker:
        yield worker


@pytest.fixture
def worker_log(tmp_path: Path) -> Path:
    return tmp_path / "worker.log"
