"""What the queue costs: an echo model through a real worker and a real Redis, next to stock Celery with a no-op.

``python -m benchmarks.overhead [--seconds 20] [--json-only]``
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, Final

import redis

from benchmarks.card import Benchmark, Figures, Row, command_line
from benchmarks.cpu import cpu_s
from benchmarks.processes import ROOT, Peer, Process, fleet, only_redis
from benchmarks.stats import percentile
from cortex_tasks.codec import queue_keys

__all__ = ["BENCHMARK", "IN_FLIGHT", "STOCK_POOLS"]

#: Single texts in flight, as in the rivals' figures.
IN_FLIGHT: Final = 64
#: Celery's pools that need nothing beside it.
STOCK_POOLS: Final = ("solo", "threads", "prefork")
#: Jobs in flight of the bulk submission, each of one text.
_WINDOW: Final = 4096
_SUBMIT_TIMEOUT_S: Final = 60.0
_QUEUES: Final = ROOT / "benchmarks" / "queues.bench.yaml"


def measure(seconds: float, say: Callable[[str], None]) -> Figures:
    figures: Figures = {}
    with fleet("echo", _QUEUES) as local:
        sessions = {name: process.pid for name, process in local.processes.items()}
        with Peer("benchmarks.client", local.env) as client:
            client.ask("hello")
            say(f"single texts, {IN_FLIGHT} in flight")
            figures |= _singles(client, sessions, seconds)
            say("one text at a time")
            figures |= _idle(client, seconds)
            say("jobs of one text, submitted in bulk")
            figures |= _jobs(client, sessions, seconds)
    say("submission alone")
    figures |= _submission(figures["jobs_per_s"], seconds)
    pools = {}
    for pool in STOCK_POOLS:
        say(f"stock Celery, {pool} pool")
        pools[pool] = _stock(pool, seconds / 2)
    best = max(pools.values(), key=lambda figures: figures["jobs_per_s"])
    return figures | {f"stock_{name}": value for name, value in best.items()} | {"stock_pools": pools}


def _singles(client: Peer, sessions: dict[str, int], seconds: float) -> Figures:
    found = client.ask(
        "singles",
        model="echo",
        kind="short",
        seed=1,
        in_flight=IN_FLIGHT,
        warm_s=min(2.0, seconds / 4),
        seconds=seconds,
        sessions=sessions,
    )
    parts = {f"async_singles_{name}_cpu_us": value for name, value in found["cpu_us"].items()}
    return {
        "async_singles_per_s": found["per_s"],
        "async_singles_cpu_us": sum(found["cpu_us"].values()),
        **parts,
    }


def _idle(client: Peer, seconds: float) -> Figures:
    found = client.ask("one_by_one", model="echo", kind="short", seed=2, count=max(20, int(50 * seconds)))
    return {f"idle_p{at}_ms": percentile(found["latencies_ms"], at) for at in (50, 99)}


def _stream(client: Peer, sessions: dict[str, int], seed: int, count: int, window: int) -> dict[str, Any]:
    arguments = {"model": "echo", "kind": "short", "chunk": 1, "window": window, "sessions": sessions}
    return client.ask("stream", seed=seed, count=count, **arguments)


def _jobs(client: Peer, sessions: dict[str, int], seconds: float) -> Figures:
    trial = _stream(client, sessions, 3, 2_000, _WINDOW)
    found = _stream(client, sessions, 4, max(2_000, int(trial["per_s"] * seconds)), _WINDOW)
    cpu_us = found["cpu_us"]
    return {
        "jobs_per_s": found["per_s"],
        "worker_cpu_us_per_job": cpu_us["worker"],
        "client_cpu_us_per_job": cpu_us["client"],
        "redis_cpu_us_per_job": cpu_us["redis"],
    }


def _submission(jobs_per_s: float, seconds: float) -> Figures:
    """The client's CPU until all jobs are queued. No worker is about, so nothing comes back."""
    count = max(2_000, int(jobs_per_s * min(seconds, 4.0)))
    with only_redis(_QUEUES) as local, Peer("benchmarks.client", local.env) as client:
        client.ask("hello")
        before = cpu_s({"client": client.pid})["client"]
        # Until this context stops it: it waits for answers in vain.
        arguments = {"model": "echo", "kind": "short", "seed": 5, "count": count, "chunk": 1, "window": 4 * count}
        client.tell("stream", sessions={}, **arguments)
        _await_depth(local.url, "echo", count)
        after = cpu_s({"client": client.pid})["client"]
    return {"client_submit_cpu_us_per_job": (after - before) * 1e6 / count}


def _await_depth(url: str, queue: str, count: int) -> None:
    until = time.monotonic() + _SUBMIT_TIMEOUT_S
    with redis.Redis.from_url(url) as broker:
        while sum(int(broker.llen(key)) for key in queue_keys(queue)) < count:
            if time.monotonic() > until:
                raise RuntimeError(f"{count} jobs were not queued within {_SUBMIT_TIMEOUT_S} s")
            time.sleep(0.01)


def _stock(pool: str, seconds: float) -> Figures:
    with only_redis() as local:
        env = {"STOCK_URL": local.url}
        command = [sys.executable, "-m", "celery", "-A", "benchmarks.stock", "worker", f"--pool={pool}"]
        with Process(command, env) as worker, Peer("benchmarks.stock", env) as client:
            client.ask("hello", task="stock.noop", count=50)
            pids = {"worker": worker.pid, "redis": local.processes["redis"].pid}
            trial = client.ask("tasks", task="stock.noop", kind="short", seed=6, count=100, **pids)
            count = max(100, int(trial["per_s"] * seconds))
            found = client.ask("tasks", task="stock.noop", kind="short", seed=7, count=count, **pids)
    return {
        "jobs_per_s": found["per_s"],
        "worker_cpu_us_per_job": found["cpu_us"]["worker"],
        "client_cpu_us_per_job": found["cpu_us"]["client"],
        "redis_cpu_us_per_job": found["cpu_us"]["redis"],
        "client_submit_cpu_us_per_job": found["submit_cpu_us"],
    }


BENCHMARK: Final = Benchmark(
    "overhead",
    "What the queue costs: an echo model through a real worker and Redis",
    (
        Row("async_singles_per_s", f"single texts from one asyncio client, {IN_FLIGHT} in flight", "/s", at_least=5000),
        Row("async_singles_cpu_us", "  CPU each: client + worker + Redis", "µs"),
        Row("async_singles_client_cpu_us", "  of it the client", "µs"),
        Row("async_singles_worker_cpu_us", "  of it the worker", "µs"),
        Row("async_singles_redis_cpu_us", "  of it Redis", "µs"),
        Row("idle_p50_ms", "one text at a time, median", "ms"),
        Row("jobs_per_s", "jobs of one text, submitted in bulk", "/s"),
        Row("worker_cpu_us_per_job", "  CPU each: worker", "µs", at_most=250),
        Row("client_cpu_us_per_job", "  client, submission and answer", "µs"),
        Row("client_submit_cpu_us_per_job", "  client, submission alone", "µs", at_most=50),
        Row("stock_jobs_per_s", "stock Celery, its best pool, a no-op", "/s"),
        Row("stock_worker_cpu_us_per_job", "  CPU each: worker", "µs"),
        Row("stock_client_cpu_us_per_job", "  client, submission and answer", "µs"),
        Row("stock_client_submit_cpu_us_per_job", "  client, submission alone", "µs"),
    ),
    measure,
)

if __name__ == "__main__":
    command_line(BENCHMARK)
