"""Answers on their way into the cache: they go along with the next results, or by themselves when none takes them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from workers.flights import Entry, FlightTower

__all__ = ["Ledger"]


class Ledger:
    """Thread-safe. ``clock``: monotonic seconds."""

    def __init__(self, tower: FlightTower, clock: Callable[[], float] = time.monotonic) -> None:
        self._tower, self._clock = tower, clock
        self._lock = threading.Lock()
        self._entries: list[Entry] = []
        self._since_s = 0.0
        self._aboard: list[Entry] = []

    def keep(self, entries: Sequence[Entry]) -> None:
        with self._lock:
            if not self._entries:
                self._since_s = self._clock()
            self._entries += entries

    @property
    def waiting(self) -> bool:
        """Whether any entry is to be stored."""
        return bool(self._entries)

    def store_left(self, after_s: float) -> None:
        """Store what has waited for so long, over the cache's own connection."""
        with self._lock:
            if not self._entries or self._clock() - self._since_s < after_s:
                return
            left, self._entries = self._entries, []
        self._tower.store(left)

    def board(self, pipe: Any) -> int:
        """Let a pipeline of results store the entries as well; returns how many commands that takes."""
        with self._lock:
            self._aboard, self._entries = self._entries, []
        if self._aboard:
            self._tower.store_command(pipe, self._aboard)
        return 1 if self._aboard else 0

    def turned_back(self) -> None:
        """The pipeline was not sent: its entries wait for the next one."""
        aboard, self._aboard = self._aboard, []
        self.keep(aboard)
