"""How many short sentences a second a GPU embeds: MiniLM in one process, and through the queue.

``python -m benchmarks.gpu [--seconds 20] [--json-only]``

Without a CUDA device it says so and measures nothing. CORTEX_DEVICE=cpu runs it all the same, which shows that the
benchmark works and nothing else.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from itertools import count
from typing import Final

from benchmarks.card import Benchmark, Figures, Row, command_line
from benchmarks.processes import ROOT, Peer, fleet
from benchmarks.stats import mean
from workers.resources import available_cpus, device

__all__ = ["BENCHMARK"]

_QUEUES: Final = ROOT / "benchmarks" / "queues.gpu.yaml"
#: Sentences a second through the queue that one H100 should reach.
_GOAL_PER_S: Final = 100_000.0
#: Worker processes that share the GPU, and clients, at most: each is bound by its own Python.
_MOST_PROCESSES: Final = 8
#: Inputs of a job: the more, the less each costs.
_CHUNK: Final = 256
_TRIAL: Final = 64
_seeds: Final = count(1)


def measure(seconds: float, say: Callable[[str], None]) -> Figures:
    if device() == "cpu" and "CORTEX_DEVICE" not in os.environ:
        return {"skipped": "no CUDA device"}
    env = {"CORTEX_QUEUES_FILE": str(_QUEUES)}
    with Peer("benchmarks.engine", env) as engine:
        say("loading the raw engine")
        about = engine.ask("hello")
        say("the raw engine")
        number = _enough(_raw(engine, _TRIAL), seconds)
        raw_per_s = _raw(engine, number)
    processes = max(1, min(_MOST_PROCESSES, int(available_cpus()) // 2))
    say(f"map from {processes} clients through {processes} workers")
    with fleet("minilm", _QUEUES, workers=processes) as local, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Peer("benchmarks.client", local.env)) for _ in range(processes)]
        _map(clients, _TRIAL)
        with _busy() as busy:
            map_per_s = _map(clients, max(_TRIAL, number // processes))
        found = [card.models[0] for card in local.cards() if card.models]
    figures: Figures = {
        "raw_per_s": raw_per_s,
        "map_per_s": map_per_s,
        "map_ratio": map_per_s / raw_per_s,
        "workers": processes,
        "clients": processes,
        "engine": found[0].engine if found else "",
        "device": about["device"],
    }
    return figures | ({"gpu_busy_share": mean(busy) / 100} if busy else {})


def _raw(engine: Peer, number: int) -> float:
    return float(engine.ask("rate", seed=next(_seeds), count=number, kind="short")["per_s"])


def _enough(per_s: float, seconds: float) -> int:
    return max(_TRIAL, int(per_s * seconds))


def _map(clients: list[Peer], each: int) -> float:
    """Sentences a second of all clients together, each with so many."""
    for client in clients:
        client.tell(
            "stream",
            model="minilm",
            kind="short",
            seed=next(_seeds),
            count=each,
            chunk=_CHUNK,
            window=None,
            sessions={},
        )
    answers = [client.answer() for client in clients]
    per_s: float = sum(answer["answers"] for answer in answers) / max(
        answer["ended_s"] - answer["began_s"] for answer in answers
    )
    return per_s


@contextlib.contextmanager
def _busy() -> Iterator[list[float]]:
    """Filled, when it is left, with the shares (in percent) of each second in which the first GPU computed."""
    samples: list[float] = []
    command = shutil.which("nvidia-smi")
    if command is None:
        yield samples
        return
    query = [command, "--id=0", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--loop=1"]
    with subprocess.Popen(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            yield samples
        finally:
            process.terminate()
            text = process.stdout.read() if process.stdout else ""
            samples += [float(line) for line in text.split() if line.isdigit()]


BENCHMARK: Final = Benchmark(
    "gpu",
    "Short sentences a second on a GPU: MiniLM",
    (
        Row("raw_per_s", "one process, no queue", "/s"),
        Row("map_per_s", "map, through the queue", "/s", at_least=_GOAL_PER_S),
        Row("map_ratio", "share of the raw engine's"),
        Row("workers", "worker processes, and as many clients"),
    ),
    measure,
)

if __name__ == "__main__":
    command_line(BENCHMARK)
