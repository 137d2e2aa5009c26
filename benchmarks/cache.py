"""What the result cache gives and costs: MiniLM through a real worker and a real Redis, each figure within one run.

``python -m benchmarks.cache [--seconds 20] [--json-only]``
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from benchmarks.card import Benchmark, Figures, Row, command_line
from benchmarks.processes import Peer, fleet
from benchmarks.stats import percentile

__all__ = ["BENCHMARK"]

_MODEL: Final = "minilm"
_PROCESSES: Final = 8
#: Inputs that each of them asks for.
_SAME: Final = 1_000
_KNOWN: Final = 2_048
_VOCABULARY: Final = 5_000
_MODULE: Final = "benchmarks.cache_client"

Say = Callable[[str], None]


def measure(seconds: float, say: Say) -> Figures:
    say("starting the fleet")
    with fleet(_MODEL) as local, _clients(local.env, 1) as [client]:
        say("known texts by map")
        known = min(_KNOWN, max(256, int(200 * seconds)))
        client.ask("fill", model=_MODEL, seed=1, count=known)
        mapped = client.ask("map_hits", model=_MODEL, seed=1, count=known, seconds=seconds / 2)
        say("one known text at a time")
        single = client.ask("single_hits", model=_MODEL, seed=1, seconds=seconds / 4)
        figures: Figures = {
            "map_hits_per_s": mapped["per_s"],
            "map_hit_client_cpu_us": mapped["client_cpu_us"],
            "near_hit_us": single["near_us"],
            "l2_hit_ms": single["l2_ms"],
            "get_ms": single["get_ms"],
            "l2_hit_over_get_ms": single["l2_ms"] - single["get_ms"],
        }
        say("unknown texts, with the cache and without")
        figures |= _misses(client, seconds)
        say("texts asked for with Zipf's frequencies")
        count = max(200, int(400 * seconds))
        found = client.ask("zipf", model=_MODEL, seed=3, vocabulary=_VOCABULARY, count=count)
        figures |= {"zipf_speedup": found["off_s"] / found["use_s"], "zipf_distinct_ratio": found["distinct"] / count}
        say(f"{_PROCESSES} processes that ask for the same")
        return figures | _same(client, local.env, seconds)


def _misses(client: Peer, seconds: float) -> Figures:
    rounds = max(2, 2 * int(seconds / 4))
    took_s = client.ask("misses", model=_MODEL, seed=2, count=max(64, int(50 * seconds)), rounds=rounds)
    ratios = [use / off for use, off in zip(took_s["use"], took_s["off"], strict=True)]
    return {"miss_cost_ratio": sum(took_s["use"]) / sum(took_s["off"]), "miss_cost_median": percentile(ratios, 50)}


def _same(client: Peer, env: Mapping[str, str], seconds: float) -> Figures:
    """How many inputs are computed, and how long that takes beside a single process with other texts."""
    alone = min(_SAME, max(64, int(100 * seconds)))
    alone_s = client.ask("same", model=_MODEL, seed=4, count=alone)["took_s"] * _SAME / alone
    before = client.ask("computed")["items"]
    with _clients(env, _PROCESSES) as clients:
        for each in clients:
            each.tell("same", model=_MODEL, seed=5, count=_SAME)
        slowest_s = max(each.answer()["took_s"] for each in clients)
    forwards = client.ask("computed")["items"] - before
    return {"single_flight_forwards": forwards, "single_flight_time_ratio": slowest_s / alone_s}


@contextlib.contextmanager
def _clients(env: Mapping[str, str], count: int) -> Iterator[list[Peer]]:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Peer(_MODULE, env)) for _ in range(count)]
        for client in clients:
            client.ask("hello")
        yield clients


BENCHMARK: Final = Benchmark(
    "cache",
    "What the result cache gives and costs: MiniLM through a real worker and Redis",
    (
        Row("map_hits_per_s", "known texts by map, each read from Redis", "/s", at_least=100_000),
        Row("map_hit_client_cpu_us", "  the client's CPU each", "µs"),
        Row("near_hit_us", "one known text, from the client's own memory", "µs", at_most=10),
        Row("l2_hit_ms", "one known text, from Redis", "ms"),
        Row("l2_hit_over_get_ms", "  of it over a bare GET", "ms", at_most=0.3),
        Row("miss_cost_ratio", "unknown texts by map, time over cache=off", at_most=1.03),
        Row("zipf_speedup", "texts with Zipf's frequencies, speed over cache=off", "x"),
        Row("zipf_distinct_ratio", "  share of them that is new"),
        Row("single_flight_forwards", f"{_PROCESSES} processes ask for the same {_SAME:,} texts: computed", "texts",
            at_most=_SAME),
        Row("single_flight_time_ratio", "  time over that of one process", "x"),
    ),
    measure,
)  # fmt: skip

if __name__ == "__main__":
    command_line(BENCHMARK)
