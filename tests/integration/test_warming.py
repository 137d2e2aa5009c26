"""Warming by real workers: what was asked for often is known again after a scheduled moment, for one forward pass."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from cortex_tasks import Cortex
from cortex_tasks.cache.names import stats_key
from cortex_tasks.config import FleetConfig, load_fleet
from cortex_tasks.echo import echo_vector
from tests.support.redis_server import RedisServer
from tests.support.worker_process import QUEUES_FILE, WorkerProcess, forget_answers, poll_until

pytestmark = pytest.mark.fleet

OFTEN = [f"often {number}" for number in range(40)]


@pytest.fixture
def queues_file(tmp_path: Path) -> Path:
    """The test fleet, warmed every minute."""
    file = tmp_path / "queues.yaml"
    warming = '\ncache_warming: {schedule: "* * * * *", models: 2, inputs: 40, time_limit_s: 20}\n'
    file.write_text(QUEUES_FILE.read_text(encoding="utf-8") + warming, encoding="utf-8")
    return file


@pytest.fixture
def workers(tmp_path: Path, queues_file: Path) -> Iterator[list[WorkerProcess]]:
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(RedisServer(directory=tmp_path))
        yield [
            stack.enter_context(
                WorkerProcess(server.url, tmp_path / f"{name}.log", queues="echo", queues_file=queues_file)
            )
            for name in ("one", "other")
        ]


def computed(workers: list[WorkerProcess]) -> int:
    """Inputs computed so far, as each worker's next card says."""
    seen = time.time()
    cards = [
        poll_until(lambda worker=worker: (card := worker.card()) and card.seen_at > seen and card, "a new card")
        for worker in workers
    ]
    return sum(int(card.items) for card in cards)


def counts(raw: Any) -> dict[bytes, int]:
    return {name: int(value) for name, value in raw.hgetall(stats_key("echo")).items()}


def ask(url: str, fleet: FleetConfig, texts: list[str]) -> list[str | None]:
    """By whom each text was answered, of a client of its own, which tells what it asked when it is closed."""
    with Cortex(url, fleet=fleet) as client:
        found = client.embed(texts, model="echo").values()
    assert all(
        item.vector.tolist() == pytest.approx(echo_vector(text)) for text, item in zip(texts, found, strict=True)
    )
    return [item.timings.cached for item in found]


def test_frequent_inputs_that_were_lost_are_known_again_after_a_scheduled_moment(
    workers: list[WorkerProcess], queues_file: Path
) -> None:
    fleet, url = load_fleet(queues_file), workers[0].url
    with redis.Redis.from_url(url) as raw:
        ask(url, fleet, [*OFTEN, *(f"once {number}" for number in range(60))])
        # Asked for again, and answered without a worker: clients tell of these.
        assert set(ask(url, fleet, OFTEN)) == {"l2"}
        poll_until(lambda: counts(raw).get(b"computed", 0) >= 100, "the workers tell what they were asked")
        # A moment may come between these two: then all is known again by the next.
        forget_answers(url)
        before, runs = computed(workers), counts(raw).get(b"warmings", 0)
        poll_until(lambda: counts(raw).get(b"warmings", 0) > runs, "a scheduled moment", 100.0)
        assert counts(raw)[b"warmed"] == len(OFTEN)
        after = computed(workers)
        assert after - before in (0, len(OFTEN))
        assert set(ask(url, fleet, OFTEN)) == {"l2"}
        # Not a single pass for them, and what was asked for once was not worth one.
        assert ask(url, fleet, ["once 7"]) == [None]
        assert computed(workers) - after == 1
        # One of the two workers did it, at every moment that there was.
        assert counts(raw)[b"warmings"] <= len(raw.keys("cortex:cache:warm:echo:*"))
