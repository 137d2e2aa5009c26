"""Answers on their way into the cache: they go along with the next results, or by themselves when none takes them.

What cannot be stored waits for the next try, up to a limit. Beyond it answers are dropped, and so are all of this
worker's claims: nobody waits for an answer that will not come.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from workers.flights import Entry, FlightTower

__all__ = ["MOST_BYTES", "Ledger"]

logger = logging.getLogger(__name__)

#: Answers that wait for a cache that fails.
MOST_BYTES: Final = 16 * 1024 * 1024
#: What an entry takes beside its frame, about.
_ENTRY_BYTES: Final = 256


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
        stored = self._tower.store(left)
        self._put_back(left[stored:])

    def board(self, pipe: Any) -> int:
        """Let a pipeline of results store the entries as well; returns how many commands that takes."""
        with self._lock:
            self._aboard, self._entries = self._entries, []
        if self._aboard:
            self._tower.store_command(pipe, self._aboard)
        return 1 if self._aboard else 0

    def arrived(self, replies: Sequence[Any]) -> None:
        """What Redis said to the commands of ``board``. An answer it refuses is not offered again."""
        self._aboard = []
        refused = next((reply for reply in replies if isinstance(reply, Exception)), None)
        if refused is not None:
            self._tower.refused(refused)

    def turned_back(self) -> None:
        """The pipeline was not sent: its entries wait for the next one."""
        aboard, self._aboard = self._aboard, []
        self._put_back(aboard)

    def _put_back(self, entries: Sequence[Entry]) -> None:
        if not entries:
            return
        self.keep(entries)
        with self._lock:
            if sum(len(entry.frame) + _ENTRY_BYTES for entry in self._entries) <= MOST_BYTES:
                return
            dropped, self._entries = len(self._entries), []
        # That the cache fails was said when it began, and with a long outage this comes again and again.
        logger.info("%d answers are not stored: the cache has failed for too long", dropped)
        self._tower.disown()
