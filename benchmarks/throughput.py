"""How much of the model's own speed is left: MiniLM through the fleet, as a share of the raw engine, side by side.

``python -m benchmarks.throughput [--seconds 20] [--json-only]``
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any, Final

from benchmarks.card import Benchmark, Figures, Row, command_line
from benchmarks.processes import Peer, Process, fleet, only_redis
from benchmarks.stats import mean
from cortex_tasks.local_fleet import LocalFleet
from workers.resources import available_cpus

__all__ = ["BENCHMARK"]

_MODEL: Final = "minilm"
#: Texts in flight of a single client that asks for many.
_MANY: Final = 512
#: Of the parts with one client: figure, texts in flight (64 and 256 as in the rivals' figures), share of the seconds.
_SINGLES: Final = (("singles_ratio", _MANY, 1.0), ("singles_256_ratio", 256, 0.5), ("singles_64_ratio", 64, 0.5))
_CLIENTS: Final = 8
#: Every part has texts of its own.
_seeds: Final = count(1)

Say = Callable[[str], None]


class _Raw:
    """The raw engine, measured before and after everything else: the machine's speed is not the same all the time."""

    def __init__(self, engine: Peer, seconds: float) -> None:
        self._engine = engine
        trial = self._measure(64)
        self.count = max(64, int(trial * seconds / 3))
        self.rates = [self._measure(self.count)]

    def _measure(self, texts: int) -> float:
        return float(self._engine.ask("rate", seed=next(_seeds), count=texts)["per_s"])

    def share(self, measure: Callable[..., float], *arguments: Any) -> float:
        """What ``measure(*arguments)`` returns (texts a second) over the raw rate: the mean of before and after."""
        rate = measure(*arguments)
        self.rates.append(self._measure(self.count))
        return rate / mean(self.rates[-2:])

    @property
    def per_s(self) -> float:
        return mean(self.rates)


def measure(seconds: float, say: Say) -> Figures:
    with Peer("benchmarks.engine", {}) as engine:
        say("loading the raw engine")
        about = engine.ask("hello")
        say("which batches are fastest")
        budget_tokens = engine.ask("budget")["tokens"]
        raw = _Raw(engine, seconds)
        figures = _fleet(raw, seconds, say)
        say("SentenceTransformer.encode")
        figures["encode_ratio"] = raw.share(_encode, engine, raw.count)
        figures |= _naive(raw, about["snapshot"], seconds / 2, say)
    spread = max(raw.rates) / min(raw.rates)
    about_raw = {
        "raw_budget_tokens": budget_tokens,
        "raw_spread": spread,
        "raw_rates_per_s": raw.rates,
        "threads": about["threads"],
    }
    return {"raw_per_s": raw.per_s, **about_raw, **figures}


def _fleet(raw: _Raw, seconds: float, say: Say) -> Figures:
    figures: Figures = {}
    say("starting the fleet")
    with fleet(_MODEL) as local, _clients(local.env, 1) as clients:
        say("map from one client")
        texts = max(128, int(raw.per_s * seconds))
        figures["map_ratio"] = raw.share(_map, clients[0], texts)
        for name, in_flight, part_s in _SINGLES:
            say(f"single texts from one client, {in_flight} in flight")
            figures[name] = raw.share(_singles, clients, in_flight, part_s * seconds)
        say(f"single texts from {_CLIENTS} clients")
        with _clients(local.env, _CLIENTS) as several:
            figures["singles_8_clients_ratio"] = raw.share(_singles, several, _MANY // _CLIENTS, seconds)
    return figures


@contextlib.contextmanager
def _clients(env: dict[str, str], number: int) -> Iterator[list[Peer]]:
    """Client processes that have imported everything."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Peer("benchmarks.client", env)) for _ in range(number)]
        for client in clients:
            client.tell("hello")
        for client in clients:
            client.answer()
        yield clients


def _encode(engine: Peer, texts: int) -> float:
    return float(engine.ask("encode", seed=next(_seeds), count=texts)["per_s"])


def _map(client: Peer, texts: int) -> float:
    arguments: Figures = {"kind": "varied", "chunk": None, "window": None, "sessions": {}}
    return float(client.ask("stream", model=_MODEL, seed=next(_seeds), count=texts, **arguments)["per_s"])


def _singles(clients: list[Peer], in_flight: int, seconds: float) -> float:
    """Texts a second of all clients together, each with ``in_flight`` of its own."""
    for client in clients:
        client.tell(
            "singles",
            model=_MODEL,
            kind="varied",
            seed=next(_seeds),
            in_flight=in_flight,
            warm_s=min(3.0, seconds / 4),
            seconds=seconds,
            sessions={},
        )
    return sum(float(client.answer()["per_s"]) for client in clients)


def _naive(raw: _Raw, snapshot: str, seconds: float, say: Say) -> Figures:
    """Stock Celery, a warm model, one text a task: one process with all threads, and a process for each core."""
    cores = max(1, int(available_cpus()))
    figures: Figures = {}
    for pool, threads in (("solo", cores), ("prefork", 1)):
        say(f"naive Celery, {pool} pool")
        with only_redis() as local:
            env = {"STOCK_URL": local.url, "STOCK_MODEL": snapshot, "STOCK_THREADS": str(threads)}
            command = [sys.executable, "-m", "celery", "-A", "benchmarks.stock", "worker", f"--pool={pool}"]
            with Process(command, env) as worker, Peer("benchmarks.stock", env) as client:
                client.ask("hello", task="stock.encode", count=4 * cores)
                texts = max(20, int(raw.per_s * seconds / 4))
                figures[f"naive_celery_{pool}_ratio"] = raw.share(_tasks, client, texts, worker, local)
    return {"naive_celery_ratio": max(figures.values()), **figures}


def _tasks(client: Peer, texts: int, worker: Process, local: LocalFleet) -> float:
    pids = {"worker": worker.pid, "redis": local.processes["redis"].pid}
    return float(
        client.ask("tasks", task="stock.encode", kind="varied", seed=next(_seeds), count=texts, **pids)["per_s"]
    )


BENCHMARK: Final = Benchmark(
    "throughput",
    "How much of MiniLM's own speed is left: shares of the raw engine in the same minutes",
    (
        Row("raw_per_s", "raw engine, in-process", "texts/s"),
        Row("raw_spread", "  its fastest measurement over its slowest: is the machine quiet?", "×", at_most=1.25),
        Row("map_ratio", "Cortex.map from one client", "of raw", at_least=0.95),
        Row("singles_ratio", f"single texts from one client, {_MANY} in flight", "of raw", at_least=0.9),
        Row("singles_256_ratio", "  256 in flight", "of raw"),
        Row("singles_64_ratio", "  64 in flight", "of raw"),
        Row("singles_8_clients_ratio", f"single texts from {_CLIENTS} clients, {_MANY} in flight together", "of raw"),
        Row("naive_celery_ratio", "stock Celery, one text a task, a warm model", "of raw"),
        Row("encode_ratio", "SentenceTransformer.encode, in-process", "of raw"),
    ),
    measure,
)

if __name__ == "__main__":
    command_line(BENCHMARK)
