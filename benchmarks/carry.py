"""What 100,000 short sentences a second would cost the host of a GPU: MiniLM through the queue on a device that
computes nothing.

``python -m benchmarks.carry [--seconds 20] [--json-only]``

Everything else is real: client, Redis, worker, tokenizer, batches and packing as for a GPU, answers of 384 numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from benchmarks.card import Benchmark, Figures, Row, command_line
from benchmarks.processes import ROOT, Peer, fleet

__all__ = ["BENCHMARK"]

_QUEUES: Final = ROOT / "benchmarks" / "queues.carry.yaml"
#: Sentences a second that are to be carried.
_GOAL_PER_S: Final = 100_000
#: Inputs of a job, as in ``benchmarks.gpu``.
_CHUNK: Final = 256
_TRIAL: Final = 4_096


def measure(seconds: float, say: Callable[[str], None]) -> Figures:
    say("starting the fleet")
    with fleet("minilm", _QUEUES) as local, Peer("benchmarks.client", local.env) as client:
        sessions = {name: process.pid for name, process in local.processes.items()}
        trial = _stream(client, sessions, 1, _TRIAL)
        say("map from one client through one worker")
        found = _stream(client, sessions, 2, max(_TRIAL, int(trial["per_s"] * seconds)))
    say("the worker's stages by themselves")
    with Peer("benchmarks.engine", {"CORTEX_QUEUES_FILE": str(_QUEUES)}) as engine:
        engine.ask("hello")
        engine.ask("stages", seed=3, count=_TRIAL, chunk=_CHUNK)
        stages = engine.ask("stages", seed=4, count=max(_TRIAL, int(trial["per_s"] * seconds / 4)), chunk=_CHUNK)
    cpu_us = found["cpu_us"]
    total_us = sum(cpu_us.values())
    return {
        "carried_per_s": found["per_s"],
        "cpu_us": total_us,
        **{f"{name}_cpu_us": cpu_us[name] for name in ("client", "redis", "worker")},
        **stages,
        "queue_cpu_us": cpu_us["worker"] - sum(stages.values()),
        "cores_for_goal": total_us * _GOAL_PER_S / 1e6,
    }


def _stream(client: Peer, sessions: dict[str, int], seed: int, count: int) -> dict[str, Any]:
    arguments = {"model": "minilm", "kind": "short", "chunk": _CHUNK, "window": None, "sessions": sessions}
    return client.ask("stream", seed=seed, count=count, **arguments)


BENCHMARK: Final = Benchmark(
    "carry",
    "What short sentences cost the host of a GPU: MiniLM through the queue, on a device that computes nothing",
    (
        Row("carried_per_s", "map from one client through one worker, on this machine", "/s"),
        Row("cpu_us", "CPU a sentence", "µs"),
        Row("client_cpu_us", "  client", "µs"),
        Row("redis_cpu_us", "  Redis", "µs"),
        Row("worker_cpu_us", "  worker", "µs"),
        Row("tokenise_cpu_us", "    tokenising, by itself", "µs"),
        Row("around_cpu_us", "    packing, copying and cutting, by itself", "µs"),
        Row("queue_cpu_us", "    the rest: messages, batches, answers", "µs"),
        Row("cores_for_goal", f"cores for {_GOAL_PER_S:,} sentences a second", at_most=12.0),
    ),
    measure,
)

if __name__ == "__main__":
    command_line(BENCHMARK)
