"""The cache seen from outside: what it did, what it holds, and dropping a model's answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from cortex_tasks.cache.counters import FIELDS
from cortex_tasks.cache.names import (
    BYTES,
    ENTRY_OVERHEAD_BYTES,
    INDEX,
    active_revision,
    entry_prefix,
    generation_key,
    model_key,
    stats_key,
)
from cortex_tasks.cache.shelf import FRESH_S

__all__ = ["CacheReport", "ModelReport", "prometheus", "purge", "read_report"]

#: The name under which counts of the whole cache are kept.
WHOLE: Final = "*"
#: Keys that one step of a purge looks at and, of those, drops: well below a millisecond of Redis' time each.
_SCAN_KEYS: Final = 500
_DROP_KEYS: Final = 100

# KEYS: index, bytes, then entries. ARGV: what an entry takes beside its bytes. Returns {entries, bytes} dropped.
_DROP: Final = """
local count, total = 0, 0
for i = 3, #KEYS do
  local length = redis.call('STRLEN', KEYS[i])
  if redis.call('UNLINK', KEYS[i]) == 1 then
    local size = length + ARGV[1]
    count = count + 1
    if redis.call('ZREM', KEYS[1], string.format('%08x', size) .. KEYS[i]) == 1 then total = total + size end
  end
end
if total > 0 then redis.call('DECRBY', KEYS[2], total) end
return {count, total}
"""


@dataclass(frozen=True, slots=True)
class ModelReport:
    """One model's counts, named as in ``counters.FIELDS``."""

    alias: str
    revision: str
    counts: Mapping[str, int]
    #: About how many floating-point operations a token takes; 0 when no worker says how large the model is.
    flops_per_token: int = 0

    @property
    def asked(self) -> int:
        """Inputs that clients looked up."""
        return sum(self.counts.get(name, 0) for name in ("near_hits", "l2_hits", "misses"))

    def ratio(self, *names: str) -> float:
        """The share of the inputs looked up that these counts are."""
        return sum(self.counts.get(name, 0) for name in names) / self.asked if self.asked else 0.0

    @property
    def saved_inputs(self) -> int:
        """Inputs that no forward pass was needed for."""
        return sum(self.counts.get(name, 0) for name in ("near_hits", "l2_hits", "shared"))

    @property
    def saved_flops(self) -> int:
        return self.counts.get("saved_tokens", 0) * self.flops_per_token


@dataclass(frozen=True, slots=True)
class CacheReport:
    """The whole cache."""

    models: Sequence[ModelReport]
    entries: int
    #: As the index has it: entries with what Redis takes for each.
    size_bytes: int
    max_bytes: int
    evicted: int


def read_report(redis: Any, aliases: Sequence[str], max_bytes: int, flops_per_token: Mapping[str, int]) -> CacheReport:
    """What the counters and the index say. ``redis``: a synchronous redis-py client of the cache."""
    with redis.pipeline(transaction=False) as pipe:
        pipe.zcard(INDEX)
        pipe.get(BYTES)
        pipe.hgetall(stats_key(WHOLE))
        for alias in aliases:
            pipe.get(model_key(alias))
            pipe.hgetall(stats_key(alias))
        entries, size, whole, *rest = pipe.execute()
    models = [
        ModelReport(alias, active_revision(record) or "", _counts(stats), flops_per_token.get(alias, 0))
        for alias, record, stats in zip(aliases, rest[::2], rest[1::2], strict=True)
    ]
    return CacheReport(models, int(entries), int(size or 0), max_bytes, _counts(whole).get("evicted", 0))


def _counts(stored: Mapping[bytes, bytes]) -> dict[str, int]:
    return {name.decode(): int(value) for name, value in stored.items() if name.decode() in FIELDS}


def prometheus(report: CacheReport) -> Iterator[str]:
    """The report in Prometheus' text format, line by line."""
    for name, meaning in FIELDS.items():
        if name != "evicted":
            yield f"# HELP cortex_cache_{name}_total {meaning}"
            yield f"# TYPE cortex_cache_{name}_total counter"
            for model in report.models:
                yield f'cortex_cache_{name}_total{{model="{model.alias}"}} {model.counts.get(name, 0)}'
    yield f"# HELP cortex_cache_evicted_total {FIELDS['evicted']}"
    yield "# TYPE cortex_cache_evicted_total counter"
    yield f"cortex_cache_evicted_total {report.evicted}"
    yield "# HELP cortex_cache_saved_flops_total about how many floating-point operations were spared"
    yield "# TYPE cortex_cache_saved_flops_total counter"
    for model in report.models:
        yield f'cortex_cache_saved_flops_total{{model="{model.alias}"}} {model.saved_flops}'
    gauges = {"bytes": report.size_bytes, "max_bytes": report.max_bytes, "entries": report.entries}
    for name, value in gauges.items():
        yield f"# TYPE cortex_cache_{name} gauge"
        yield f"cortex_cache_{name} {value}"


def purge(redis: Any, alias: str, *, sleep: Callable[[float], object] = time.sleep) -> tuple[int, int]:
    """Drop a model's answers in small steps; returns how many there were, and their bytes.

    When it returns, no client has them in near memory any more: each has asked what is present since.
    """
    pattern = entry_prefix(alias) + b"*"
    count, size_bytes, cursor = 0, 0, 0
    while True:
        cursor, names = redis.scan(cursor, match=pattern, count=_SCAN_KEYS)
        for first in range(0, len(names), _DROP_KEYS):
            part = names[first : first + _DROP_KEYS]
            dropped, freed = redis.eval(_DROP, 2 + len(part), INDEX, BYTES, *part, ENTRY_OVERHEAD_BYTES)
            count, size_bytes = count + int(dropped), size_bytes + int(freed)
        if not cursor:
            break
    # Last: what a client read meanwhile, before its entry was dropped, must not stay in its near memory.
    redis.incr(generation_key(alias))
    sleep(FRESH_S)
    if count:
        redis.hincrby(stats_key(alias), "purged", count)
    return count, size_bytes
