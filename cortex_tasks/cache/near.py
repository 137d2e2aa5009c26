"""Near memory: answers kept in this process, bounded in bytes and in time, the longest unused leave first."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from pydantic import BaseModel

__all__ = ["Near", "weigh"]

#: What a key, its place in the table and an object with its timings take beside the answer itself.
_ENTRY_BYTES: Final = 700
#: A field of an object, a member of a list: roughly, as CPython has it.
_NODE_BYTES: Final = 120


class _Entry(NamedTuple):
    item: Any
    size_bytes: int
    expires_s: float
    #: Entries of an older stamp were purged, or are of another revision.
    stamp: int


class Near:
    """Thread-safe. ``clock``: monotonic seconds."""

    def __init__(self, max_bytes: int, ttl_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.max_bytes = max_bytes
        self.ttl_s = ttl_s
        self.size_bytes = 0
        self.evicted = 0
        self._clock = clock
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: bytes, stamp: int) -> Any | None:
        """What was kept under a key with this stamp, unless its time is over."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            if entry.stamp != stamp or entry.expires_s < self._clock():
                self._drop(key)
                return None
            self._entries.move_to_end(key)
            return entry.item

    def put(self, key: bytes, item: Any, size_bytes: int, stamp: int) -> None:
        """Keep an answer. One that is larger than a tenth of the whole memory is not kept."""
        size_bytes += _ENTRY_BYTES
        if size_bytes * 10 > self.max_bytes:
            return
        with self._lock:
            if key in self._entries:
                self._drop(key)
            self._entries[key] = _Entry(item, size_bytes, self._clock() + self.ttl_s, stamp)
            self.size_bytes += size_bytes
            while self.size_bytes > self.max_bytes:
                self._drop(next(iter(self._entries)))
                self.evicted += 1

    def discard(self, key: bytes) -> None:
        """Forget one answer."""
        with self._lock:
            if key in self._entries:
                self._drop(key)

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self.size_bytes = 0

    def _drop(self, key: bytes) -> None:
        self.size_bytes -= self._entries.pop(key).size_bytes


def weigh(item: Any) -> int:
    """About how many bytes an answer takes in memory, its objects included."""
    if isinstance(item, bytes | str):
        return _NODE_BYTES + len(item)
    if isinstance(item, BaseModel):
        return _NODE_BYTES + sum(map(weigh, item.__dict__.values()))
    if isinstance(item, tuple | list):
        return _NODE_BYTES + sum(map(weigh, item))
    if isinstance(item, dict):
        return _NODE_BYTES + sum(weigh(value) for value in item.values())
    return _NODE_BYTES
