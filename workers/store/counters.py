"""What the store did: hits, misses, faults and times by tier, evictions and reloads. Read by the worker's card."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from cortex_tasks.presence import BudgetCard, StoreCard, TierCard

__all__ = ["Counters", "Tier"]

#: ``memory``: loaded already; ``local``: the source itself lies on this machine.
Tier = Literal["memory", "local", "disk", "l2", "origin", "fits"]


@dataclass(slots=True)
class _Counts:
    hits: int = 0
    misses: int = 0
    faults: int = 0
    read_bytes: int = 0
    time_ms: float = 0.0


@dataclass(slots=True)
class Counters:
    """Any thread may count."""

    evictions: int = 0
    reloads: int = 0
    disk_evictions: int = 0
    _tiers: dict[str, _Counts] = field(default_factory=lambda: defaultdict(_Counts))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def hit(self, tier: Tier, size_bytes: int = 0, time_ms: float = 0.0) -> None:
        with self._lock:
            counts = self._tiers[tier]
            counts.hits += 1
            counts.read_bytes += size_bytes
            counts.time_ms += time_ms

    def miss(self, tier: Tier) -> None:
        with self._lock:
            self._tiers[tier].misses += 1

    def fault(self, tier: Tier) -> None:
        """A tier was damaged, full, or did not answer."""
        with self._lock:
            self._tiers[tier].faults += 1

    def evicted(self) -> None:
        with self._lock:
            self.evictions += 1

    def evicted_from_disk(self) -> None:
        with self._lock:
            self.disk_evictions += 1

    def reloaded(self) -> None:
        with self._lock:
            self.reloads += 1

    def card(
        self,
        *,
        memory_bytes: int,
        memory_limit_bytes: int,
        fits_bytes: int = 0,
        budgets: Mapping[str, BudgetCard] | None = None,
    ) -> StoreCard:
        with self._lock:
            tiers = {
                name: TierCard(
                    hits=counts.hits,
                    misses=counts.misses,
                    faults=counts.faults,
                    read_bytes=counts.read_bytes,
                    mean_ms=round(counts.time_ms / counts.hits, 1) if counts.hits else 0.0,
                )
                for name, counts in self._tiers.items()
            }
            return StoreCard(
                memory_bytes=memory_bytes,
                memory_limit_bytes=memory_limit_bytes,
                fits_bytes=fits_bytes,
                budgets=dict(budgets or {}),
                evictions=self.evictions,
                reloads=self.reloads,
                disk_evictions=self.disk_evictions,
                tiers=tiers,
            )
