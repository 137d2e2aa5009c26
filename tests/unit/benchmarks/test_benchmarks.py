"""Each benchmark, run as a program for a moment: its card, and the fields of its last line."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
FIELDS = {
    "overhead": (
        "async_singles_per_s",
        "async_singles_cpu_us",
        "worker_cpu_us_per_job",
        "client_cpu_us_per_job",
        "jobs_per_s",
        "stock_worker_cpu_us_per_job",
        "stock_client_cpu_us_per_job",
        "stock_jobs_per_s",
    ),
    "throughput": (
        "raw_per_s",
        "map_ratio",
        "singles_ratio",
        "singles_8_clients_ratio",
        "naive_celery_ratio",
        "encode_ratio",
        "raw_apart_ratio",
        "map_of_faster_raw_ratio",
        "singles_of_faster_raw_ratio",
    ),
    "latency": (
        "idle_overhead_ms",
        "idle_p99_ms",
        "interactive_p99_under_bulk_ms",
        "bulk_batch_ms",
        "bulk_batch_next_to_interactive_ms",
        "interactive_limit_ms",
        "interactive_brief_limit_ms",
    ),
    "memory": ("pss_copies_4", "warm_load_ratio", "cold_load_ms", "l2_load_ms", "l2_mb_per_s", "redis_mb_per_s"),
    "cache": (
        "map_hits_per_s",
        "near_hit_us",
        "l2_hit_over_get_ms",
        "miss_cost_ratio",
        "zipf_speedup",
        "single_flight_forwards",
    ),
    "startup": ("import_ms", "load_ms", "warm_ms", "first_answer_ms"),
    "carry": ("carried_per_s", "cpu_us", "worker_cpu_us", "tokenise_cpu_us", "around_cpu_us", "cores_for_goal"),
    "gpu": ("raw_per_s", "map_per_s", "map_ratio", "workers", "clients"),
}


def run(name: str, *arguments: str, **settings: str) -> list[str]:
    """The lines that a benchmark printed."""
    command = [sys.executable, "-m", f"benchmarks.{name}", "--seconds", "0.4", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **settings}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3_000:]
    return done.stdout.splitlines()


def checked(name: str, line: str) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads(line)
    assert figures["benchmark"] == name
    for field in FIELDS[name]:
        assert math.isfinite(figures[field]), field
        # A difference of two medians may be anything on a busy machine; all else is a duration, a rate or a share.
        assert figures[field] > 0 or field in ("idle_overhead_ms", "l2_hit_over_get_ms"), field
    return figures


@pytest.mark.fleet
def test_overhead() -> None:
    figures = checked("overhead", run("overhead", "--json-only")[-1])
    assert set(figures["stock_pools"]) == {"solo", "threads", "prefork"}
    assert figures["stock_jobs_per_s"] == max(pool["jobs_per_s"] for pool in figures["stock_pools"].values())


@pytest.mark.fleet
@pytest.mark.parametrize("hooks", [("POOL",), ("POOL", "TRANSPORT", "BACKEND", "TRACER")])
def test_overhead_with_hooks_switched_off(hooks: tuple[str, ...]) -> None:
    checked("overhead", run("overhead", "--json-only", **{f"CORTEX_{hook}": "stock" for hook in hooks})[-1])


@pytest.mark.fleet
@pytest.mark.models
def test_throughput() -> None:
    [line] = run("throughput", "--json-only")
    figures = checked("throughput", line)
    assert {"4096", "8192", "16384"} <= set(figures["raw_budget_shares"])
    assert figures["raw_budget_shares"][str(figures["raw_budget_tokens"])] == 1
    faster = max(1, figures["raw_apart_ratio"])
    assert figures["map_of_faster_raw_ratio"] == pytest.approx(figures["map_ratio"] / faster, rel=0.01)


@pytest.mark.fleet
@pytest.mark.models
def test_latency() -> None:
    figures = checked("latency", run("latency", "--json-only")[-1])
    for name in ("p50_ms", "p95_ms", "p99_ms"):
        assert set(figures[name]) == {"30", "60", "90"}
    assert all(figures["p50_ms"][load] <= figures["p99_ms"][load] for load in ("30", "60", "90"))


@pytest.mark.fleet
@pytest.mark.models
def test_startup_with_its_card() -> None:
    lines = run("startup")
    figures = checked("startup", lines[-1])
    assert figures["first_answer_ms"] > figures["load_ms"]
    assert any(line.startswith("loading the model") for line in lines)


@pytest.mark.fleet
@pytest.mark.models
def test_memory_with_its_card() -> None:
    lines = run("memory")
    figures = checked("memory", lines[-1])
    assert figures["pss_copies_4"] <= 1.2, "four processes hold one copy of the weights"
    assert any(line.startswith("copies of the weights") for line in lines)


@pytest.mark.fleet
@pytest.mark.models
def test_cache() -> None:
    figures = checked("cache", run("cache", "--json-only")[-1])
    # Whatever the speed: eight processes that ask for the same thousand texts have each computed once.
    assert figures["single_flight_forwards"] == 1000


@pytest.mark.fleet
@pytest.mark.models
def test_what_a_gpu_would_cost_its_host() -> None:
    lines = run("carry")
    figures = checked("carry", lines[-1])
    parts = sum(figures[f"{name}_cpu_us"] for name in ("client", "redis", "worker"))
    assert figures["cpu_us"] == pytest.approx(parts, rel=0.01)
    assert figures["cores_for_goal"] == pytest.approx(figures["cpu_us"] / 10, rel=0.01)
    assert any(line.startswith("cores for 100,000 sentences a second") for line in lines)


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="a GPU is there")
def test_without_a_gpu_nothing_is_measured_there() -> None:
    card, line = run("gpu")
    assert card == "Short sentences a second on a GPU: MiniLM: skipped, no CUDA device"
    figures = json.loads(line)
    assert (figures["benchmark"], figures["skipped"]) == ("gpu", "no CUDA device")


@pytest.mark.fleet
@pytest.mark.models
def test_the_benchmark_for_gpus_on_a_cpu() -> None:
    figures = checked("gpu", run("gpu", "--json-only", CORTEX_DEVICE="cpu")[-1])
    assert figures["device"] == "cpu"
    assert "gpu_busy_share" not in figures


@pytest.mark.gpu
@pytest.mark.fleet
@pytest.mark.models
@pytest.mark.skipif(not Path("/dev/nvidiactl").exists(), reason="no CUDA device")
def test_the_benchmark_on_a_gpu() -> None:
    figures = checked("gpu", run("gpu", "--json-only")[-1])
    assert figures["engine"].startswith("cuda bf16")
    assert 0 <= figures["gpu_busy_share"] <= 1
