"""What the cache did, counted in each process and added up in Redis: one hash a model."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, Final

from cortex_tasks.cache.names import stats_key
from cortex_tasks.cache.popular import Sampler, Samples, tell_samples

__all__ = ["FIELDS", "Counters", "Counts", "refused", "tell"]

#: Field -> what it counts, for ``cortex cache stats`` and Prometheus.
FIELDS: Final = {
    "near_hits": "inputs answered from a client's own memory",
    "l2_hits": "inputs answered from Redis, to a client or to a worker",
    "misses": "inputs that a client did not find",
    "shared": "inputs answered by another one's forward pass",
    "computed": "inputs computed by a worker for the cache",
    "stored": "answers written",
    "stored_bytes": "bytes written",
    "too_large": "answers over the size limit of an entry, not written",
    "evicted": "answers dropped to keep within the configured bytes",
    "purged": "answers dropped by hand",
    "skipped": "times that the cache was not asked because it does not answer",
    "warmings": "times that a model's frequent inputs were warmed",
    "warmed": "inputs computed ahead, on schedule",
    "warmings_cut": "times that warming ended before its last input, at the time limit or with the worker",
    "saved_tokens": "about how many tokens (points of a series) need not be computed",
}

#: Counts are told to Redis this often, together with something else that is asked.
TOLD_EVERY_S: Final = 2.0


class Counts(dict[str, dict[str, int]]):
    """Alias -> field -> count, and what was asked for."""

    def __init__(self, counts: dict[str, dict[str, int]] | None = None, samples: Samples | None = None) -> None:
        super().__init__(counts or {})
        self.samples = samples


class Counters:
    """Thread-safe. ``sampler``: notes what is asked for, where that is wanted. ``clock``: monotonic seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, sampler: Sampler | None = None) -> None:
        self._clock = clock
        self.sampler = sampler
        self._lock = threading.Lock()
        self._counts: dict[str, dict[str, int]] = {}
        self._next_s = clock() + TOLD_EVERY_S

    def add(self, alias: str, **counts: int) -> None:
        """Count; ``counts`` are named as in FIELDS."""
        with self._lock:
            of_model = self._counts.setdefault(alias, {})
            for name, count in counts.items():
                if count:
                    of_model[name] = of_model.get(name, 0) + count

    @property
    def due(self) -> bool:
        """Whether it is time to tell Redis."""
        return self._clock() >= self._next_s and bool(self._counts)

    def take(self) -> Counts:
        """All counts since the last time."""
        samples = self.sampler.take() if self.sampler is not None else None
        with self._lock:
            counts, self._counts = self._counts, {}
            self._next_s = self._clock() + TOLD_EVERY_S
            return Counts(counts, samples)

    def give_back(self, counts: Counts) -> None:
        """Counts that could not be told. Samples are not missed."""
        for alias, of_model in counts.items():
            self.add(alias, **of_model)


def tell(pipe: Any, counts: Counts) -> None:
    """Let a redis-py pipeline add the counts up."""
    for alias, of_model in counts.items():
        for name, count in of_model.items():
            pipe.hincrby(stats_key(alias), name, count)
    if counts.samples is not None:
        tell_samples(pipe, counts.samples)


def refused(counts: Counts, replies: Iterable[Any]) -> Counts:
    """Which of the counts Redis did not add up, as a full one. ``replies``: to what ``tell`` asked, in its order."""
    left = Counts()
    heard = iter(replies)
    for alias, of_model in counts.items():
        for name, count in of_model.items():
            if isinstance(next(heard), Exception):
                left.setdefault(alias, {})[name] = count
    return left
