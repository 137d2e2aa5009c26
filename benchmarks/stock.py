"""Stock Celery as most fleets run it: nothing of Cortex, every setting Celery's own, JSON, one text a task.

The app for ``celery -A benchmarks.stock worker``, and the client that a benchmark commands (see ``processes.Peer``).
"""

from __future__ import annotations

import os
import time
from functools import cache
from itertools import islice
from typing import Any

from celery import Celery, signals

from benchmarks import texts
from benchmarks.cpu import cpu_s
from benchmarks.processes import serve

_TIMEOUT_S = 120.0
_URL = os.environ.get("STOCK_URL", "redis://127.0.0.1:6379/0")

app = Celery("stock", broker=_URL, backend=_URL)
if "STOCK_MODEL" in os.environ:
    # The one setting that is not Celery's own: loading a model takes longer than its 4 s allow a child to start.
    app.conf.worker_proc_alive_timeout = _TIMEOUT_S


@app.task(name="stock.noop")
def noop(text: str) -> None:
    """Nothing."""


@app.task(name="stock.encode")
def encode(text: str) -> list[float]:
    vector: list[float] = _model().encode(text).tolist()
    return vector


@cache
def _model() -> Any:
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(int(os.environ["STOCK_THREADS"]))
    return SentenceTransformer(os.environ["STOCK_MODEL"], device="cpu")


@signals.worker_process_init.connect
def _warm(**_: Any) -> None:
    """In the solo pool's process, and in each child of the prefork pool."""
    if "STOCK_MODEL" in os.environ:
        _model().encode("The first call is slower.")


def hello(*, task: str, count: int) -> dict[str, Any]:
    """Wait for the worker: answered when it has done some tasks."""
    source = islice(texts.short(-1), count)
    for result in [app.tasks[task].delay(text) for text in source]:
        result.get(timeout=_TIMEOUT_S)
    return {}


def tasks(*, task: str, kind: str, seed: int, count: int, worker: int, redis: int) -> dict[str, Any]:
    """Publish so many tasks, then fetch all results. ``worker``, ``redis``: their sessions."""
    sessions = {"worker": worker, "redis": redis, "client": os.getpid()}
    source = list(islice({"short": texts.short, "varied": texts.varied}[kind](seed), count))
    before, began_s = cpu_s(sessions), time.perf_counter()
    results = [app.tasks[task].delay(text) for text in source]
    published = cpu_s(sessions)
    for result in results:
        result.get(timeout=_TIMEOUT_S)
    ended_s = time.perf_counter()
    after = cpu_s(sessions)
    return {
        "answers": count,
        "began_s": began_s,
        "ended_s": ended_s,
        "per_s": count / (ended_s - began_s),
        "cpu_us": {name: (after[name] - before[name]) * 1e6 / count for name in sessions},
        "submit_cpu_us": (published["client"] - before["client"]) * 1e6 / count,
    }


if __name__ == "__main__":
    serve(hello=hello, tasks=tasks)
