"""How long it takes to be there: importing the client, and a fresh worker until its first answer (MiniLM).

``python -m benchmarks.startup [--seconds 20] [--json-only]``
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from typing import Final

from benchmarks.card import Benchmark, Figures, Row, command_line
from benchmarks.processes import Peer, fleet
from benchmarks.stats import percentile
from cortex_tasks.embedded_redis import answers
from cortex_tasks.local_fleet import LocalFleet

__all__ = ["BENCHMARK"]

_IMPORT: Final = """
import time
began_s = time.perf_counter()
import cortex_tasks
from cortex_tasks import Cortex
print((time.perf_counter() - began_s) * 1e3)
"""
_REDIS_TIMEOUT_S: Final = 20.0
#: About what one start of a worker takes.
_START_S: Final = 7.0


def measure(seconds: float, say: Callable[[str], None]) -> Figures:
    say("import of the client")
    imports_ms = [_import_ms() for _ in range(max(3, int(seconds / 3)))]
    starts = []
    for number in range(max(1, round(seconds / _START_S))):
        say(f"a fresh worker ({number + 1})")
        starts.append(_start())
    medians = {name: percentile([start[name] for start in starts], 50) for name in starts[0]}
    return {"import_ms": percentile(imports_ms, 50), **medians, "starts": len(starts)}


def _import_ms() -> float:
    """In a fresh interpreter; its own start is not counted."""
    done = subprocess.run([sys.executable, "-c", _IMPORT], check=True, capture_output=True, text=True, timeout=60)
    return float(done.stdout)


def _start() -> Figures:
    """One worker, from its process' start. A client waits for the first answer from before that."""
    with fleet("minilm", started=False) as local:
        local.spawn("redis")
        _await_redis(local)
        with Peer("benchmarks.client", local.env) as client:
            client.ask("hello")
            client.tell("first", model="minilm")
            began_s = time.time()
            local.spawn("worker")
            answered_s = client.answer()["answered_at"]
        local.wait_ready()
        model = local.cards()[0].models[0]
    return {"first_answer_ms": (answered_s - began_s) * 1e3, "load_ms": model.load_ms, "warm_ms": model.warm_ms}


def _await_redis(local: LocalFleet) -> None:
    until = time.monotonic() + _REDIS_TIMEOUT_S
    while not answers(local.url):
        if time.monotonic() > until:
            raise RuntimeError(f"Redis did not start within {_REDIS_TIMEOUT_S} s:\n{local.tail('redis')}")
        time.sleep(0.05)


BENCHMARK: Final = Benchmark(
    "startup",
    "How long it takes to be there: the client's import, a worker with MiniLM",
    (
        Row("import_ms", "import cortex_tasks, with Cortex", "ms"),
        Row("load_ms", "loading the model", "ms"),
        Row("warm_ms", "warming it", "ms"),
        Row("first_answer_ms", "from the worker's start to its first answer", "ms"),
    ),
    measure,
)

if __name__ == "__main__":
    command_line(BENCHMARK)
