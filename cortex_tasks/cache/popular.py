"""What is asked for often, so that it can be warmed: inputs and models, for the fleet, bounded in memory.

Each process samples what it is asked (``Sampler``: a fixed number of inputs, whatever comes) and tells its samples to
Redis with its counts. There each model has one sorted set for half an hour, in which a script keeps the heaviest by
Space-Saving (Metwally, Agrawal, El Abbadi 2005): of a stream of weight N, a set of ``m`` holds every input heavier
than N / m and overstates none by more than N / m. The newest three sets cover 60 to 90 minutes; then they expire.

=======================================  ====================================================================
``cortex:cache:popular:<slot>``          sorted set of aliases by how many inputs they were asked
``cortex:cache:popular:<slot>:<alias>``  sorted set of inputs: JSON [task, canonical parameters, input]
=======================================  ====================================================================
"""

from __future__ import annotations

import json
import math
import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, Self

from cortex_tasks.catalog import TASKS, InputKind
from cortex_tasks.config import CacheWarming
from cortex_tasks.payloads import Series

__all__ = ["SLOT_S", "Kind", "Sampler", "Samples", "Wanted", "read_inputs", "read_models", "tell_samples"]

#: Inputs that a process remembers between two tellings.
KEPT: Final = 128
SLOT_S: Final = 1_800
_SLOTS: Final = 3
#: Candidates kept beside each input that is warmed: the more, the better the rare ones are told apart.
_CANDIDATES: Final = 2
_BELOW_ONE: Final = 1.0 - 1e-9
#: About what a point of a series takes in JSON.
_POINT_BYTES: Final = 40

# KEYS: inputs, models. ARGV: how many inputs to keep, epoch second at which both sets end, alias, then for each input
# its weight and itself. What Redis has no room for is left out.
_KEEP: Final = """
local most, ends, total = tonumber(ARGV[1]), ARGV[2], 0
for i = 4, #ARGV, 2 do
  local weight, input = tonumber(ARGV[i]), ARGV[i + 1]
  total = total + weight
  if not redis.call('ZSCORE', KEYS[1], input) and redis.call('ZCARD', KEYS[1]) >= most then
    weight = weight + redis.call('ZPOPMIN', KEYS[1])[2]
  end
  redis.pcall('ZINCRBY', KEYS[1], weight, input)
end
redis.pcall('ZINCRBY', KEYS[2], total, ARGV[3])
redis.call('EXPIREAT', KEYS[1], ends)
redis.call('EXPIREAT', KEYS[2], ends)
"""


class Kind(NamedTuple):
    """What is asked of an input."""

    alias: str
    task: str
    #: Canonical stored parameters.
    canonical: str


class Wanted(NamedTuple):
    """An input that is asked for often. Not checked: whoever can write to Redis can name any."""

    task: str
    canonical: str
    value: Any


class Samples(NamedTuple):
    """What a process tells: inputs as Redis holds them, each with the weight of those it stands for."""

    at_s: float
    keep: int
    weights: dict[str, dict[bytes, float]]


class Sampler:
    """A fair sample of the inputs since the last telling: KEPT at most, each as likely as any other (Algorithm L of
    Li 1994, which skips from one that it takes to the next). Thread-safe. ``wall_clock``: epoch seconds."""

    def __init__(
        self,
        keep: int,
        max_bytes: int,
        choose: random.Random | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """``keep``: inputs that Redis keeps a model and slot. Inputs over ``max_bytes`` are passed over."""
        self._keep, self._max_bytes = keep, max_bytes
        self._choose = choose or random.Random()
        self._wall_clock = wall_clock
        self._lock = threading.Lock()
        self._reset()

    @classmethod
    def of(cls, warming: CacheWarming | None) -> Self | None:
        """None where nothing is warmed: then nothing is sampled."""
        return cls(_CANDIDATES * warming.inputs, warming.input_max_bytes) if warming is not None else None

    def _reset(self) -> None:
        self._kept: list[tuple[Kind, Any]] = []
        self._seen = self._next = 0
        self._low = 1.0

    def offer(self, kind: Kind, values: Sequence[Any]) -> None:
        """Inputs that were asked for. Takes no time to speak of for those that are not sampled."""
        with self._lock:
            end = self._seen + len(values)
            while self._next < end:
                entry = (kind, values[self._next - self._seen])
                if len(self._kept) < KEPT:
                    self._kept.append(entry)
                else:
                    self._kept[self._choose.randrange(KEPT)] = entry
                self._next += 1 + self._skipped()
            self._seen = end

    def _skipped(self) -> int:
        """How many inputs to pass over."""
        if len(self._kept) < KEPT:
            return 0
        self._low = min(self._low * math.exp(math.log(self._chance()) / KEPT), _BELOW_ONE)
        return int(math.log(self._chance()) / math.log1p(-self._low))

    def _chance(self) -> float:
        """Above 0 and below 1."""
        return self._choose.random() or 1.0 - _BELOW_ONE

    def take(self) -> Samples:
        """The sample since the last time."""
        with self._lock:
            kept, seen = self._kept, self._seen
            self._reset()
        weights: dict[str, dict[bytes, float]] = defaultdict(lambda: defaultdict(float))
        for kind, value in kept:
            # Longer ones need not become JSON to be refused.
            if _least_bytes(value) <= self._max_bytes and len(text := _written(kind, value)) <= self._max_bytes:
                weights[kind.alias][text] += seen / len(kept)
        return Samples(self._wall_clock(), self._keep, {alias: dict(inputs) for alias, inputs in weights.items()})


def _least_bytes(value: Any) -> float:
    if isinstance(value, str):
        return len(value)
    # An input that was refused is an error.
    return _POINT_BYTES * len(value.y) if isinstance(value, Series) else math.inf


def _written(kind: Kind, value: str | Series) -> bytes:
    given = {"ds": value.ds, "y": value.y} if isinstance(value, Series) else value
    return json.dumps([kind.task, kind.canonical, given], separators=(",", ":"), ensure_ascii=False).encode()


def _slot(at_s: float) -> int:
    return int(at_s // SLOT_S)


def _models_key(slot: int) -> str:
    return f"cortex:cache:popular:{slot}"


def _inputs_key(slot: int, alias: str) -> str:
    return f"cortex:cache:popular:{slot}:{alias}"


def tell_samples(pipe: Any, samples: Samples) -> None:
    """Let a redis-py pipeline add a sample to those of the fleet."""
    slot = _slot(samples.at_s)
    for alias, weights in samples.weights.items():
        told = [part for text, weight in weights.items() for part in (weight, text)]
        keys = (_inputs_key(slot, alias), _models_key(slot))
        pipe.eval(_KEEP, len(keys), *keys, samples.keep, (slot + _SLOTS) * SLOT_S, alias, *told)


def read_models(redis: Any, now_s: float, most: int) -> list[str]:
    """The aliases that were asked the most of late, the first the most. Raises what redis-py raises."""
    names = _heaviest(redis, [_models_key(slot) for slot in _slots(now_s)], most)
    return [name.decode(errors="replace") for name in names]


def read_inputs(redis: Any, alias: str, now_s: float, most: int) -> list[Wanted]:
    """The inputs that a model was asked the most of late, the first the most; what cannot be read is left out.

    Raises what redis-py raises.
    """
    found = (_read(text) for text in _heaviest(redis, [_inputs_key(slot, alias) for slot in _slots(now_s)], most))
    return [wanted for wanted in found if wanted is not None]


def _slots(now_s: float) -> range:
    return range(_slot(now_s) - _SLOTS + 1, _slot(now_s) + 1)


def _heaviest(redis: Any, keys: Sequence[str], most: int) -> list[bytes]:
    with redis.pipeline(transaction=False) as pipe:
        for key in keys:
            # One that is light in each half hour can be heavy in all.
            pipe.zrevrange(key, 0, _CANDIDATES * most - 1, withscores=True)
        replies = pipe.execute()
    weights: dict[bytes, float] = defaultdict(float)
    for name, weight in (pair for reply in replies for pair in reply):
        weights[name] += weight
    # Of equals the order is that of their names, on every worker.
    return sorted(weights, key=lambda name: (-weights[name], name))[:most]


def _read(text: bytes) -> Wanted | None:
    try:
        task, canonical, value = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return None
    if not isinstance(canonical, str) or not isinstance(task, str) or task not in TASKS:
        return None
    kind = str if TASKS[task].input is InputKind.TEXT else dict
    return Wanted(task, canonical, value) if isinstance(value, kind) else None
