"""Results that are costly to make again and small to keep (a fitted forecast): in memory, and in Redis for the fleet.

A value is found by what it was made of, so it is never out of date. Losing one costs time and nothing else: whatever
goes wrong with Redis is a miss.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from typing import Final

import redis

from workers.store.counters import Counters
from workers.store.l2 import L2

__all__ = ["Fits"]

logger = logging.getLogger(__name__)

_PREFIX: Final = "fit:"


class Fits:
    """A memory of at most ``max_bytes``, over Redis. Any thread may ask."""

    def __init__(self, l2: L2 | None, max_bytes: int, counters: Counters) -> None:
        self._l2 = l2
        self._max_bytes = max_bytes
        self._counters = counters
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()
        self.used_bytes = 0

    def recall(self, key: str) -> bytes | None:
        """What was kept under a key, None when nothing was, or is any more."""
        began_s = time.monotonic()
        with self._lock:
            value = self._kept.get(key)
            if value is not None:
                self._kept.move_to_end(key)
        if value is None and self._l2 is not None:
            try:
                value = self._l2.get_value(_PREFIX + key)
            except redis.RedisError as error:
                self._counters.fault("l2")
                logger.debug("a fit could not be looked up: %s", type(error).__name__)
            if value is not None:
                self._remember(key, value)
        if value is None:
            self._counters.miss("fits")
        else:
            self._counters.hit("fits", len(value), (time.monotonic() - began_s) * 1e3)
        return value

    def keep(self, key: str, value: bytes) -> None:
        self._remember(key, value)
        if self._l2 is None:
            return
        try:
            self._l2.put_value(_PREFIX + key, value)
        except redis.RedisError as error:
            self._counters.fault("l2")
            logger.debug("a fit is not kept in Redis: %s", type(error).__name__)

    def _remember(self, key: str, value: bytes) -> None:
        """The longest unused go when there are too many."""
        if len(value) > self._max_bytes:
            return
        with self._lock:
            self.used_bytes += len(value) - len(self._kept.pop(key, b""))
            self._kept[key] = value
            while self.used_bytes > self._max_bytes:
                _, gone = self._kept.popitem(last=False)
                self.used_bytes -= len(gone)
