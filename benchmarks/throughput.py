"""How much of the model's own speed is left: MiniLM through the fleet, as a share of the raw engine, side by side.

``python -m benchmarks.throughput [--seconds 20] [--json-only]``
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Final

from benchmarks.card import Benchmark, Figures, Row, command_line
from benchmarks.processes import Peer, Process, fleet, only_redis
from benchmarks.stats import mean
from benchmarks.turns import SHORTEST_TURN_S, Side, in_turns
from workers.resources import available_cpus

__all__ = ["BENCHMARK", "QUIET_SPREAD"]

_MODEL: Final = "minilm"
#: Texts in flight of a single client that asks for many.
_MANY: Final = 512
#: Of the parts with one client: figure, texts in flight (64 and 256 as in the rivals' figures), share of the seconds.
_SINGLES: Final = (("singles_ratio", _MANY, 1.0), ("singles_256_ratio", 256, 0.5), ("singles_64_ratio", 64, 0.5))
_CLIENTS: Final = 8
#: Each part in so many turns, between turns of the raw engine.
_TURNS: Final = 12
#: The raw engine's fastest measurement over its slowest: above, the machine was not quiet, and shares may be chance.
QUIET_SPREAD: Final = 1.25
#: Every part has texts of its own.
_seeds: Final = count(1)

Say = Callable[[str], None]


class _Raw:
    """The raw engine, which is measured in turns with everything else."""

    def __init__(self, engine: Peer, budget_tokens: int, seconds: float) -> None:
        """``seconds``: how long the others run; the engine runs a third of it each time."""
        self._engine, self._budget_tokens = engine, budget_tokens
        self._tell(64)
        self.trial_per_s = _per_s(engine.answer())
        self.count = max(64, int(self.trial_per_s * seconds / 3))
        self._turn_s = max(SHORTEST_TURN_S, seconds / _TURNS / 3)
        self.rates: list[float] = []

    def _tell(self, texts: int) -> None:
        self._engine.tell("rate", seed=next(_seeds), count=texts, budget_tokens=self._budget_tokens)

    def share(self, *peers: Peer, seconds: float, sessions: Sequence[int] = ()) -> float:
        """Texts a second of the peers together, which were told what to do, over those of the raw engine.

        ``sessions``: of the processes that work for them; ``seconds``: how long all that takes, about.
        """
        others = Side(peers, max(SHORTEST_TURN_S, seconds / _TURNS), sessions)
        self._tell(self.count)
        measured, [raw] = in_turns(others, Side([self._engine], self._turn_s))
        self.rates.append(_per_s(raw))
        return sum(map(_per_s, measured)) / self.rates[-1]

    @property
    def per_s(self) -> float:
        return mean(self.rates)


def _per_s(answer: Figures) -> float:
    return float(answer["answers"] / answer.get("running_s", answer["ended_s"] - answer["began_s"]))


def measure(seconds: float, say: Say) -> Figures:
    with Peer("benchmarks.engine", {}) as engine:
        say("loading the raw engine")
        about = engine.ask("hello")
        say("which batches are fastest")
        budget = engine.ask("budget", seconds=1.5 * seconds)
        raw = _Raw(engine, budget["tokens"], seconds)
        figures = _fleet(raw, seconds, say)
        say("the raw engine with a batch on each core")
        figures |= _apart(raw, seconds)
        say("SentenceTransformer.encode")
        with _other_engine() as other:
            figures["encode_ratio"] = _share_of(other, raw, "encode", seconds / 2)
        figures |= _naive(raw, about["snapshot"], seconds / 2, say)
    spread = max(raw.rates) / min(raw.rates)
    about_raw = {
        "raw_budget_tokens": budget["tokens"],
        "raw_budget_shares": budget["shares"],
        "raw_spread": spread,
        "raw_rates_per_s": raw.rates,
        "threads": about["threads"],
    }
    return {"raw_per_s": raw.per_s, **about_raw, **figures, **_of_faster_raw(figures)}


def _fleet(raw: _Raw, seconds: float, say: Say) -> Figures:
    figures: Figures = {}
    say("starting the fleet")
    with fleet(_MODEL) as local, _clients(local.env, 1) as clients:
        worker = [local.processes["worker"].pid]
        say("map from one client")
        clients[0].tell("stream", model=_MODEL, kind="varied", seed=next(_seeds), chunk=None, window=None, sessions={},
                        count=max(128, int(raw.trial_per_s * seconds)))  # fmt: skip
        figures["map_ratio"] = raw.share(*clients, seconds=seconds, sessions=worker)
        for name, in_flight, part_s in _SINGLES:
            say(f"single texts from one client, {in_flight} in flight")
            figures[name] = _singles(raw, clients, worker, in_flight, part_s * seconds)
        say(f"single texts from {_CLIENTS} clients")
        with _clients(local.env, _CLIENTS) as several:
            figures["singles_8_clients_ratio"] = _singles(raw, several, worker, _MANY // _CLIENTS, seconds)
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


@contextlib.contextmanager
def _other_engine() -> Iterator[Peer]:
    """Another process with the model, warm."""
    with Peer("benchmarks.engine", {}) as other:
        other.ask("hello")
        yield other


def _share_of(other: Peer, raw: _Raw, command: str, seconds: float, **arguments: int) -> float:
    other.tell(command, seed=next(_seeds), count=max(64, int(raw.per_s * seconds)), **arguments)
    return raw.share(other, seconds=seconds)


def _apart(raw: _Raw, seconds: float) -> Figures:
    """The raw engine once more, with batches as a worker runs them, and of the size that is fastest then."""
    with _other_engine() as other:
        tokens = other.ask("budget", seconds=seconds / 2, apart=True)["tokens"]
        ratio = _share_of(other, raw, "rate_apart", seconds / 2, budget_tokens=tokens)
    return {"raw_apart_ratio": ratio, "raw_apart_budget_tokens": tokens}


def _of_faster_raw(figures: Figures) -> Figures:
    """Shares of whichever raw engine was the faster one."""
    faster = max(1.0, figures["raw_apart_ratio"])
    return {f"{name}_of_faster_raw_ratio": figures[f"{name}_ratio"] / faster for name in ("map", "singles")}


def _singles(raw: _Raw, clients: Sequence[Peer], worker: Sequence[int], in_flight: int, seconds: float) -> float:
    """Of all clients together, each with ``in_flight`` texts of its own."""
    warm_s = min(3.0, seconds / 4)
    for client in clients:
        client.tell(
            "singles",
            model=_MODEL,
            kind="varied",
            seed=next(_seeds),
            in_flight=in_flight,
            warm_s=warm_s,
            # A quarter of it belongs to the raw engine.
            seconds=seconds * 4 / 3,
            sessions={},
        )
    time.sleep(warm_s)
    return raw.share(*clients, seconds=seconds, sessions=worker)


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
                pids = {"worker": worker.pid, "redis": local.processes["redis"].pid}
                client.tell("tasks", task="stock.encode", kind="varied", seed=next(_seeds), count=texts, **pids)
                figures[f"naive_celery_{pool}_ratio"] = raw.share(client, seconds=seconds, sessions=[worker.pid])
    return {"naive_celery_ratio": max(figures.values()), **figures}


BENCHMARK: Final = Benchmark(
    "throughput",
    "How much of MiniLM's own speed is left: shares of the raw engine in the same minutes",
    (
        Row("raw_per_s", "raw engine, in-process, one batch after the other", "texts/s"),
        Row(
            "raw_spread",
            "  its fastest measurement over its slowest: is the machine quiet?",
            "×",
            at_most=QUIET_SPREAD,
            condition=True,
        ),
        Row("raw_apart_ratio", "  a batch on each core at a time, as a worker under load", "of raw"),
        Row("map_ratio", "Cortex.map from one client", "of raw", at_least=0.95),
        Row("map_of_faster_raw_ratio", "  of the faster of the two raw engines"),
        Row("singles_ratio", f"single texts from one client, {_MANY} in flight", "of raw", at_least=0.9),
        Row("singles_of_faster_raw_ratio", "  of the faster of the two raw engines"),
        Row("singles_256_ratio", "  256 in flight", "of raw"),
        Row("singles_64_ratio", "  64 in flight", "of raw"),
        Row(
            "singles_8_clients_ratio",
            f"single texts from {_CLIENTS} clients, {_MANY} in flight together",
            "of raw",
            at_least=0.9,
        ),
        Row("naive_celery_ratio", "stock Celery, one text a task, a warm model", "of raw"),
        Row("encode_ratio", "SentenceTransformer.encode, in-process", "of raw"),
    ),
    measure,
)

if __name__ == "__main__":
    command_line(BENCHMARK)
