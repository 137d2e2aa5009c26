"""How long an answer takes: under open load, and for interactive work while bulk saturates the worker (MiniLM).

``python -m benchmarks.latency [--seconds 20] [--json-only]``
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any, Final, NamedTuple

from benchmarks.card import Benchmark, Figures, Row, command_line
from benchmarks.processes import Peer, fleet
from benchmarks.stats import mean, percentile
from cortex_tasks.local_fleet import LocalFleet

__all__ = ["BENCHMARK", "LOADS", "Seen", "bulk_batch_ms", "slowest"]

_MODEL: Final = "minilm"
#: Arrival rates, in percent of the rate at which the fleet can answer.
LOADS: Final = (30, 60, 90)
#: Texts in flight that find out that rate.
_SATURATING: Final = 256
#: Interactive texts a second while bulk saturates, and while nothing does.
_INTERACTIVE_PER_S: Final = 10.0
#: Idle latency is the median of at least so many texts.
_IDLE_TEXTS: Final = 50
#: Rounds of so many texts, fleet and bare pass in turns, since the machine's speed varies.
_ROUNDS: Final = 4
_CARD_TIMEOUT_S: Final = 30.0
#: How often a worker writes its card.
_CARD_EVERY_S: Final = 2.0
_STAGES: Final = ("queue", "prepare", "forward", "finish")

#: As ``benchmarks.client.arrivals`` describes an answer.
TimedAnswer = dict[str, float]

Say = Callable[[str], None]


def measure(seconds: float, say: Say) -> Figures:
    say("starting the fleet and the bare engine")
    with fleet(_MODEL) as local, Peer("benchmarks.client", local.env) as client:
        with Peer("benchmarks.engine", {}) as engine:
            client.ask("hello")
            engine.ask("hello")
            say("one text at a time, in turns with the bare model")
            figures = _idle(client, engine, seconds)
        say(f"capacity, {_SATURATING} in flight")
        figures |= _open_load(client, seconds, say)
        say(f"interactive texts on an idle fleet, {_INTERACTIVE_PER_S:g} a second")
        idle = _arrivals(client, 200, _INTERACTIVE_PER_S, seconds)
        # Last: what bulk leaves behind would be in the way of the others.
        say("interactive texts next to a saturating bulk map")
        under_bulk, batches = _next_to_bulk(client, local, seconds)
    idle_p99_ms = percentile(_latencies(idle), 99)
    return figures | {
        "idle_p99_ms": idle_p99_ms,
        "interactive_p50_under_bulk_ms": percentile(_latencies(under_bulk), 50),
        "interactive_p99_under_bulk_ms": percentile(_latencies(under_bulk), 99),
        **batches,
        "interactive_limit_ms": idle_p99_ms + batches["bulk_batch_ms"],
        "interactive_brief_limit_ms": idle_p99_ms + batches["bulk_batch_next_to_interactive_ms"],
        "idle_slowest_ms": slowest(idle),
        "interactive_slowest_under_bulk_ms": slowest(under_bulk),
    }


def _idle(client: Peer, engine: Peer, seconds: float) -> Figures:
    """One text through the fleet, then the same through nothing but the forward pass, and so on.

    In turns text by text, so that both find the caches as the other left them: back to back, the bare pass would find
    the weights where it has just put them, which no single request ever does.
    """
    fleet_ms: list[float] = []
    bare_ms: list[float] = []
    client.ask("begin_turns", model=_MODEL)
    until_s = time.monotonic() + seconds
    for seed in count(100):
        fleet_ms.append(client.ask("one_turn", kind="short", seed=seed)["latency_ms"])
        bare_ms += engine.ask("forward_ms", seed=seed, count=1)["durations_ms"]
        if time.monotonic() > until_s and len(bare_ms) >= _IDLE_TEXTS:
            break
    client.ask("end_turns")
    idle, bare = percentile(fleet_ms, 50), percentile(bare_ms, 50)
    return {"idle_p50_ms": idle, "bare_p50_ms": bare, "idle_overhead_ms": idle - bare, **_back_to_back(client, engine)}


def _back_to_back(client: Peer, engine: Peer) -> Figures:
    """The same where one text comes right after the other and nothing lies between: both find their caches warm."""
    fleet_ms: list[float] = []
    bare_ms: list[float] = []
    for seed in range(90, 90 + _ROUNDS):
        fleet_ms += client.ask("one_by_one", model=_MODEL, kind="short", seed=seed, count=_IDLE_TEXTS)["latencies_ms"]
        bare_ms += engine.ask("forward_ms", seed=seed, count=_IDLE_TEXTS)["durations_ms"]
    through, bare = percentile(fleet_ms, 50), percentile(bare_ms, 50)
    return {
        "back_to_back_p50_ms": through,
        "bare_back_to_back_p50_ms": bare,
        "back_to_back_overhead_ms": through - bare,
    }


def _arrivals(client: Peer, seed: int, rate_per_s: float, seconds: float) -> list[TimedAnswer]:
    found: list[TimedAnswer] = client.ask("arrivals", **_asked(seed, rate_per_s, seconds))["answers"]
    return found


def _asked(seed: int, rate_per_s: float, seconds: float) -> dict[str, Any]:
    return {"model": _MODEL, "seed": seed, "rate_per_s": rate_per_s, "seconds": seconds}


def _latencies(answers: Sequence[TimedAnswer]) -> list[float]:
    return [answer["latency_ms"] for answer in answers]


def slowest(answers: Sequence[TimedAnswer]) -> Figures:
    """What the slowest twentieth of the answers, which holds the p99, consists of: the means of its stages.

    ``queue``: until the pass began, the way to the worker included; ``rest``: the way back, and what the client did.
    """
    among = sorted(answers, key=lambda answer: answer["latency_ms"])[-max(1, len(answers) // 20) :]
    parts = {name: mean([answer[f"{name}_ms"] for answer in among]) for name in _STAGES}
    whole = mean(_latencies(among))
    return {"whole": whole, **parts, "rest": whole - sum(parts.values())}


def _next_to_bulk(client: Peer, local: LocalFleet, seconds: float) -> tuple[list[TimedAnswer], Figures]:
    """Interactive texts while bulk saturates, and how long a batch of bulk takes: before they come, and next to them,
    when batches are brief."""
    with Peer("benchmarks.client", local.env) as bulk:
        bulk.ask("hello")
        before = _next_card(local, after_s=0.0, more_than=0)
        # Until this context stops it.
        bulk.tell("saturate", model=_MODEL, seed=300)
        alone = _between_cards(local, 3.0, before.batches)
        client.tell("arrivals", **_asked(301, _INTERACTIVE_PER_S, seconds))
        beside = _between_cards(local, max(0.0, seconds - 2 * _CARD_EVERY_S), alone[1].batches)
        answers: list[TimedAnswer] = client.answer()["answers"]
    return answers, {
        "bulk_batch_ms": bulk_batch_ms(*alone, []),
        "bulk_batch_next_to_interactive_ms": bulk_batch_ms(*beside, answers),
    }


def _between_cards(local: LocalFleet, seconds: float, batches: int) -> tuple[Seen, Seen]:
    """Two of a saturated worker's cards, so many seconds apart at least; it had run so many batches before."""
    before = _next_card(local, after_s=time.time(), more_than=batches)
    return before, _next_card(local, after_s=before.seen_at + seconds, more_than=before.batches)


def bulk_batch_ms(before: Seen, after: Seen, interactive: Sequence[TimedAnswer]) -> float:
    """Milliseconds that a batch took on average between two cards (several may run at the same time), those of the
    interactive texts left out, which have batches of their own."""
    within = [answer for answer in interactive if before.seen_at < answer["answered_at"] <= after.seen_at]
    # A pass over so many texts is told by as many answers.
    passes = sum(1 / answer["batch_items"] for answer in within)
    passes_ms = sum(answer["forward_ms"] / answer["batch_items"] for answer in within)
    batches = after.batches - before.batches
    return ((after.forward_s - before.forward_s) * 1e3 - passes_ms) / max(1.0, batches - passes)


class Seen(NamedTuple):
    """What a worker's card says of its batches so far."""

    seen_at: float
    batches: int
    forward_s: float


def _next_card(local: LocalFleet, *, after_s: float, more_than: int) -> Seen:
    """The worker's first card later than that time and with more batches than that."""
    until = time.monotonic() + _CARD_TIMEOUT_S
    while time.monotonic() < until:
        for card in local.cards():
            batches = sum(model.batches for model in card.models)
            if card.seen_at > after_s and batches > more_than:
                return Seen(card.seen_at, batches, sum(model.forward_s for model in card.models))
        time.sleep(0.05)
    raise RuntimeError(f"the worker ran no batch within {_CARD_TIMEOUT_S} s:\n{local.tail('worker')}")


def _open_load(client: Peer, seconds: float, say: Say) -> Figures:
    arguments = {"model": _MODEL, "kind": "varied", "seed": 400, "in_flight": _SATURATING, "sessions": {}}
    capacity = client.ask("singles", warm_s=seconds / 8, seconds=seconds / 2, **arguments)["per_s"]
    by_percent: dict[str, dict[str, float]] = {"p50_ms": {}, "p95_ms": {}, "p99_ms": {}}
    for load in LOADS:
        say(f"open load, {load} % of capacity")
        latencies_ms = _latencies(_arrivals(client, 500 + load, capacity * load / 100, seconds))
        for name, percent in (("p50_ms", 50), ("p95_ms", 95), ("p99_ms", 99)):
            by_percent[name][str(load)] = percentile(latencies_ms, percent)
    flat = {f"p99_at_{load}_ms": by_percent["p99_ms"][str(load)] for load in LOADS}
    return {"capacity_per_s": capacity, **by_percent, **flat}


BENCHMARK: Final = Benchmark(
    "latency",
    "How long an answer takes: MiniLM, single texts",
    (
        Row("idle_p50_ms", "one text at a time, median", "ms"),
        Row("bare_p50_ms", "  the bare forward pass of the same texts, in turns", "ms"),
        Row("idle_overhead_ms", "  what the fleet adds", "ms", at_most=2.0),
        Row("back_to_back_p50_ms", "one text right after the other, median", "ms"),
        Row("bare_back_to_back_p50_ms", "  the bare forward pass, likewise", "ms"),
        Row("back_to_back_overhead_ms", "  what the fleet adds", "ms"),
        Row("capacity_per_s", f"capacity, {_SATURATING} in flight", "texts/s"),
        *(Row(f"p99_at_{load}_ms", f"  p99 at {load} % of it, open load", "ms") for load in LOADS),
        Row("idle_p99_ms", f"interactive, {_INTERACTIVE_PER_S:g} a second, p99", "ms"),
        Row("interactive_p99_under_bulk_ms", "  p99 while bulk saturates", "ms", at_most="interactive_limit_ms"),
        Row("bulk_batch_ms", "  one bulk batch while nothing else comes, in that bound", "ms"),
        Row(
            "bulk_batch_next_to_interactive_ms",
            "  one bulk batch next to interactive texts, which is brief",
            "ms",
        ),
        Row("interactive_brief_limit_ms", "  idle p99 and one of those, for comparison", "ms"),
    ),
    measure,
)

if __name__ == "__main__":
    command_line(BENCHMARK)
