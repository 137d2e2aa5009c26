"""The load of ``benchmarks.cache``: a client in a process of its own, with near memory or without."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from itertools import accumulate, islice
from typing import Any, Final, Literal

import redis

from benchmarks import texts
from benchmarks.processes import serve
from benchmarks.stats import percentile
from cortex_tasks import Cortex, load_fleet
from cortex_tasks.cache.names import entry_prefix
from cortex_tasks.config import FleetConfig
from cortex_tasks.errors import CortexError
from cortex_tasks.presence import read_cards
from cortex_tasks.settings import Settings

_TIMEOUT_S: Final = 300.0
#: How unevenly texts are asked for: the share of a rank is 1 / rank ** _ZIPF.
_ZIPF: Final = 1.1


def hello() -> dict[str, Any]:
    """Answered once everything is imported."""
    return {}


def _without_near() -> FleetConfig:
    given = load_fleet().model_dump(mode="json")
    given["cache"]["near"]["size"] = 0
    return FleetConfig.model_validate(given)


def _known(seed: int, count: int) -> list[str]:
    return list(islice(texts.short(seed), count))


def fill(*, model: str, seed: int, count: int) -> dict[str, Any]:
    """Compute and store so many texts."""
    with Cortex(timeout_s=_TIMEOUT_S) as cortex:
        return {"stored": len(list(cortex.map("embed", _known(seed, count), model, errors="raise")))}


def map_hits(*, model: str, seed: int, count: int, seconds: float) -> dict[str, Any]:
    """``map`` over known texts, again and again, each answer read from Redis."""
    known, hits = _known(seed, count), 0
    with Cortex(timeout_s=_TIMEOUT_S, fleet=_without_near()) as cortex:
        cortex.embed(known[0], model=model)
        cpu_before_s, began_s = time.process_time(), time.perf_counter()
        while (elapsed_s := time.perf_counter() - began_s) < seconds or not hits:
            for item in cortex.map("embed", known, model, errors="raise"):
                assert not isinstance(item, CortexError), "errors are raised"
                hits += item.timings.cached == "l2"
        cpu = time.process_time() - cpu_before_s
    return {"per_s": hits / elapsed_s, "client_cpu_us": cpu * 1e6 / hits}


def single_hits(*, model: str, seed: int, seconds: float) -> dict[str, Any]:
    """One known text at a time: from near memory, from Redis, and a bare GET of the same bytes (medians)."""
    [text] = _known(seed, 1)
    raw: Any = redis.Redis.from_url(Settings.from_env().cache)
    name = next(raw.scan_iter(match=entry_prefix(model) + b"*"))
    with Cortex(timeout_s=_TIMEOUT_S) as near, Cortex(timeout_s=_TIMEOUT_S, fleet=_without_near()) as far:
        near_us: list[float] = []
        l2_ms: list[float] = []
        get_ms: list[float] = []
        until_s = time.perf_counter() + seconds
        while time.perf_counter() < until_s or len(near_us) < 10:
            near.embed(text, model=model)
            began_s = time.perf_counter()
            for _ in range(100):
                near.embed(text, model=model)
            near_us.append((time.perf_counter() - began_s) * 1e4)
            for _ in range(20):
                get_ms.append(_ms(lambda: raw.get(name)))
                l2_ms.append(_ms(lambda: far.embed(text, model=model)))
    raw.close()
    return {"near_us": percentile(near_us, 50), "l2_ms": percentile(l2_ms, 50), "get_ms": percentile(get_ms, 50)}


def _ms(call: Any) -> float:
    began_s = time.perf_counter()
    call()
    return (time.perf_counter() - began_s) * 1e3


def misses(*, model: str, seed: int, count: int, rounds: int) -> dict[str, Any]:
    """``map`` over unknown texts with the cache and without it, in turns: seconds of each round."""
    took_s: dict[str, list[float]] = {"use": [], "off": []}
    source = texts.varied(seed)
    with Cortex(timeout_s=_TIMEOUT_S) as cortex:
        for number in range(rounds):
            # A drift of the machine's speed falls on both alike.
            for policy in ("use", "off") if number % 2 else ("off", "use"):
                took_s[policy].append(_map_s(cortex, model, list(islice(source, count)), policy))
    return took_s


def _map_s(cortex: Cortex, model: str, asked: Sequence[str], policy: Literal["use", "off"] | str) -> float:
    began_s = time.perf_counter()
    for _ in cortex.map("embed", asked, model, cache=policy, errors="raise"):  # type: ignore[arg-type]
        pass
    return time.perf_counter() - began_s


def zipf(*, model: str, seed: int, vocabulary: int, count: int) -> dict[str, Any]:
    """Texts asked for with Zipf's frequencies, without the cache and with it, which is empty at first."""
    known, choose = list(islice(texts.varied(seed), vocabulary)), random.Random(seed)
    weights = list(accumulate(1 / rank**_ZIPF for rank in range(1, vocabulary + 1)))
    asked = choose.choices(known, cum_weights=weights, k=count)
    with Cortex(timeout_s=_TIMEOUT_S) as cortex:
        off_s = _map_s(cortex, model, asked, "off")
        return {"off_s": off_s, "use_s": _map_s(cortex, model, asked, "use"), "distinct": len(set(asked))}


def same(*, model: str, seed: int, count: int) -> dict[str, Any]:
    """``map`` over texts that others ask for as well."""
    with Cortex(timeout_s=_TIMEOUT_S) as cortex:
        return {"took_s": _map_s(cortex, model, _known(seed, count), "use")}


def computed() -> dict[str, Any]:
    """How many inputs the workers have computed, once each of them has said so anew."""
    with redis.Redis.from_url(Settings.from_env().broker) as broker:
        asked_s = time.time()
        cards = read_cards(broker)
        while min(card.seen_at for card in cards) < asked_s:
            time.sleep(0.05)
            cards = read_cards(broker)
    return {"items": sum(card.items for card in cards)}


if __name__ == "__main__":
    serve(
        hello=hello,
        fill=fill,
        map_hits=map_hits,
        single_hits=single_hits,
        misses=misses,
        zipf=zipf,
        same=same,
        computed=computed,
    )
