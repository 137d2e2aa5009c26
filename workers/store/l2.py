"""The fleet's weight cache: snapshots in Redis, in chunks, so that a new worker with an empty disk needs no hub.

================================= ======================================================================
``cortex:store:ref:<key>``        the digest that a source and revision stand for
``cortex:store:entry:<name>``     a snapshot's manifest, or a small value; written last: with it the entry exists
``cortex:store:chunk:<name>:<n>`` the files one after another, in chunks
``cortex:store:used``             sorted set: name -> epoch second of its last use
``cortex:store:sizes``            hash: name -> "bytes chunks writable-until"; "" -> the sum of all bytes
================================= ======================================================================

All but the last two have a time to live. Redis may evict any of them by itself; an entry that lacks a part is a miss,
and what is left of it is dropped. The budget is kept by one script, which makes room by whole entries, the longest
unused first. Every byte that is read is compared with the manifest.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import redis

from workers.store.manifest import FileEntry, digest_of, entries_from_json, entries_to_json

__all__ = ["CHUNK_BYTES", "L2", "Corrupt"]

logger = logging.getLogger(__name__)

#: Large enough to be fast, small enough that no other client of Redis notices one.
CHUNK_BYTES: Final = 4 * 2**20
#: Chunks asked for in one round trip.
_WINDOW: Final = 4
#: An upload that takes longer than this is taken for dead; what it wrote expires by itself.
_UPLOAD_S: Final = 600
#: A Redis with a limit of its own is filled with weights up to this share of it: answers live there as well.
_REDIS_SHARE: Final = 0.8

_USED: Final = "cortex:store:used"
_SIZES: Final = "cortex:store:sizes"

# KEYS: used, sizes. ARGV: name, bytes, chunks, budget, now, ttl, writable until.
# Makes room and takes it; 0 when the entry is larger than the budget. UNLINK frees memory outside the main thread.
# For a small value (no chunks) the sum is believed, and only what must have expired is looked at: there may be a
# hundred thousand of them, and Redis serves nobody else meanwhile. Otherwise all are counted anew.
_RESERVE: Final = """
local function bytes_of(name)
  return tonumber(string.match(redis.call('HGET', KEYS[2], name) or '0', '^%d+'))
end
local function drop(name)
  local bytes, size = bytes_of(name), redis.call('HGET', KEYS[2], name)
  local chunks = size and tonumber(string.match(size, '^%d+ (%d+)')) or 0
  redis.call('UNLINK', 'cortex:store:entry:' .. name)
  for i = 0, chunks - 1 do redis.call('UNLINK', 'cortex:store:chunk:' .. name .. ':' .. i) end
  redis.call('ZREM', KEYS[1], name)
  redis.call('HDEL', KEYS[2], name)
  return bytes
end
local new, bytes, budget, now = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[4]), tonumber(ARGV[5])
if new ~= '' and bytes > budget then return 0 end
local total = tonumber(redis.call('HGET', KEYS[2], '') or '')
if new ~= '' and total and total >= 0 and ARGV[3] == '0' then
  total = total - bytes_of(new)
  for _, name in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now - ARGV[6], 'LIMIT', 0, 100)) do
    if name ~= new then total = total - drop(name) end
  end
else
  total = 0
  for _, name in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
    if name ~= new then
      local until_s = string.match(redis.call('HGET', KEYS[2], name) or '0 0 0', '^%d+ %d+ ([%d.]+)')
      if redis.call('EXISTS', 'cortex:store:entry:' .. name) == 0 and tonumber(until_s) < now then
        drop(name)
      else
        total = total + bytes_of(name)
      end
    end
  end
end
total = total + bytes
local dropped = 0
while total > budget do
  local oldest = redis.call('ZRANGE', KEYS[1], 0, 1)
  local name = oldest[1] == new and oldest[2] or oldest[1]
  if not name then break end
  total = total - drop(name)
  dropped = dropped + 1
end
if new ~= '' then
  redis.call('ZADD', KEYS[1], ARGV[5], new)
  redis.call('HSET', KEYS[2], new, ARGV[2] .. ' ' .. ARGV[3] .. ' ' .. ARGV[7])
end
if redis.call('EXISTS', KEYS[1]) == 1 then
  redis.call('HSET', KEYS[2], '', string.format('%d', total))
else
  redis.call('DEL', KEYS[2])
end
return dropped + 1
"""

# KEYS: used, sizes, entry. ARGV: name, manifest, ttl, now, chunks.
# The entry exists from here on; 0 when its place was given to another meanwhile, or Redis has lost a chunk.
_COMMIT: Final = """
if not redis.call('ZSCORE', KEYS[1], ARGV[1]) then return 0 end
for i = 0, tonumber(ARGV[5]) - 1 do
  if redis.call('EXPIRE', 'cortex:store:chunk:' .. ARGV[1] .. ':' .. i, ARGV[3]) == 0 then return 0 end
end
redis.call('SET', KEYS[3], ARGV[2], 'EX', ARGV[3])
redis.call('ZADD', KEYS[1], ARGV[4], ARGV[1])
return 1
"""

# KEYS: used, sizes, entry. ARGV: name, ttl, now. A use: the whole entry lives on.
_TOUCH: Final = """
if not redis.call('ZSCORE', KEYS[1], ARGV[1]) then return 0 end
redis.call('ZADD', KEYS[1], ARGV[3], ARGV[1])
redis.call('EXPIRE', KEYS[3], ARGV[2])
local chunks = tonumber(string.match(redis.call('HGET', KEYS[2], ARGV[1]) or '0 0', '^%d+ (%d+)'))
for i = 0, chunks - 1 do redis.call('EXPIRE', 'cortex:store:chunk:' .. ARGV[1] .. ':' .. i, ARGV[2]) end
return 1
"""

# KEYS: used, sizes. ARGV: name.
_DROP: Final = """
local size = redis.call('HGET', KEYS[2], ARGV[1])
local chunks = size and tonumber(string.match(size, '^%d+ (%d+)')) or 0
if size and redis.call('HEXISTS', KEYS[2], '') == 1 then
  redis.call('HINCRBY', KEYS[2], '', '-' .. string.match(size, '^%d+'))
end
redis.call('UNLINK', 'cortex:store:entry:' .. ARGV[1])
for i = 0, chunks - 1 do redis.call('UNLINK', 'cortex:store:chunk:' .. ARGV[1] .. ':' .. i) end
redis.call('HDEL', KEYS[2], ARGV[1])
local dropped = redis.call('ZREM', KEYS[1], ARGV[1])
if redis.call('EXISTS', KEYS[1]) == 0 then redis.call('DEL', KEYS[2]) end
return dropped
"""


class Corrupt(Exception):
    """An entry lacks a part, or a part is not what the manifest says; the message says which."""


def _entry(name: str) -> str:
    return f"cortex:store:entry:{name}"


def _chunk(name: str, number: int) -> str:
    return f"cortex:store:chunk:{name}:{number}"


def _ref(key: str) -> str:
    return f"cortex:store:ref:{key}"


class L2:
    """Snapshots by their digest. Every method raises what redis-py raises. May be used by several threads."""

    def __init__(
        self,
        client: redis.Redis,
        *,
        max_bytes: int,
        ttl_s: int,
        clock: Callable[[], float] = time.time,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        self._client: Any = client
        self._max_bytes = max_bytes
        self._ttl_s = ttl_s
        self._clock = clock
        self._chunk_bytes = chunk_bytes

    # ------------------------------------------------------------------------------------------ reading

    def digest_for(self, key: str) -> str | None:
        digest = self._client.get(_ref(key))
        return digest.decode() if digest is not None else None

    def manifest(self, digest: str) -> tuple[FileEntry, ...] | None:
        """The files of a snapshot, None when it is not there. Raises Corrupt."""
        text = self._client.get(_entry(digest))
        if text is None:
            return None
        try:
            entries = entries_from_json(text)
        except ValueError as error:
            raise Corrupt(f"its manifest cannot be read: {error}") from error
        if digest_of(entries) != digest:
            raise Corrupt("its manifest belongs to another snapshot")
        return entries

    def fetch(
        self,
        digest: str,
        entries: tuple[FileEntry, ...],
        directory: Path,
        progress: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Write the files of a snapshot into a directory, each compared with its sha256. Raises Corrupt, OSError."""
        chunks = self._chunks(digest, sum(entry.size_bytes for entry in entries))
        rest = memoryview(b"")
        for entry in entries:
            path = directory / entry.name
            path.parent.mkdir(parents=True, exist_ok=True)
            seen = hashlib.sha256()
            left = entry.size_bytes
            with path.open("wb") as file:
                while left:
                    if not rest:
                        rest = memoryview(next(chunks))
                    part, rest = rest[:left], rest[left:]
                    file.write(part)
                    seen.update(part)
                    left -= len(part)
                    progress(len(part))
            if seen.hexdigest() != entry.sha256:
                raise Corrupt(f"{entry.name} is not what the manifest says")
        self._client.eval(_TOUCH, 3, _USED, _SIZES, _entry(digest), digest, self._ttl_s, self._clock())

    def _chunks(self, digest: str, total_bytes: int) -> Iterator[bytes]:
        count = -(-total_bytes // self._chunk_bytes)
        windows = [range(first, min(first + _WINDOW, count)) for first in range(0, count, _WINDOW)]
        # One window is on its way while the one before is checked and written.
        with ThreadPoolExecutor(1, "l2-ahead") as ahead:
            coming = ahead.submit(self._window, digest, windows[0]) if windows else None
            for at, numbers in enumerate(windows):
                assert coming is not None, "each window but the last has asked for the next"
                found = coming.result()
                coming = ahead.submit(self._window, digest, windows[at + 1]) if at + 1 < len(windows) else None
                for number, data in zip(numbers, found, strict=True):
                    expected = min(self._chunk_bytes, total_bytes - number * self._chunk_bytes)
                    if data is None or len(data) != expected:
                        raise Corrupt(f"chunk {number} of {count} is {'absent' if data is None else 'torn'}")
                    yield data

    def _window(self, digest: str, numbers: range) -> list[bytes | None]:
        # A pipeline and not MGET: Redis answers each by itself, others in between.
        with self._client.pipeline(transaction=False) as pipe:
            for number in numbers:
                pipe.get(_chunk(digest, number))
            found: list[bytes | None] = pipe.execute()
        return found

    # ------------------------------------------------------------------------------------------ writing

    def put(self, digest: str, entries: tuple[FileEntry, ...], root: Path, key: str) -> bool:
        """Keep a snapshot whose files lie below ``root``. False when there is no room for it, or no more.

        Another writer of the same content does no harm. Raises OSError when a file cannot be read.
        """
        size_bytes = sum(entry.size_bytes for entry in entries)
        count = -(-size_bytes // self._chunk_bytes)
        if self._client.exists(_entry(digest)):
            self._client.eval(_TOUCH, 3, _USED, _SIZES, _entry(digest), digest, self._ttl_s, self._clock())
        elif not self._reserve(digest, size_bytes, count) or not self._upload(digest, entries, root, count):
            return False
        self._client.set(_ref(key), digest, ex=self._ttl_s)
        return True

    def _reserve(self, name: str, size_bytes: int, count: int) -> bool:
        """Make room for an entry, at the cost of the longest unused ones."""
        now_s = self._clock()
        budget = min(self._max_bytes, self._room())
        arguments = (name, size_bytes, count, budget, now_s, self._ttl_s, now_s + _UPLOAD_S)
        return bool(self._client.eval(_RESERVE, 2, _USED, _SIZES, *arguments))

    def _room(self) -> int:
        """What Redis' own limit leaves for weights, beside all else that it holds."""
        memory = self._client.info("memory")
        limit = int(memory.get("maxmemory", 0))
        if not limit:
            return self._max_bytes
        others = max(0, int(memory["used_memory"]) - int(self._client.hget(_SIZES, "") or self.used_bytes()))
        return max(0, int(limit * _REDIS_SHARE) - others)

    def _upload(self, digest: str, entries: tuple[FileEntry, ...], root: Path, count: int) -> bool:
        try:
            for numbered in self._windows(entries, root):
                with self._client.pipeline(transaction=False) as pipe:
                    for number, data in numbered:
                        pipe.set(_chunk(digest, number), data, ex=_UPLOAD_S)
                    pipe.execute()
            done = self._commit(digest, entries_to_json(entries), count)
        except (redis.RedisError, OSError):
            self._drop_quietly(digest)
            raise
        if not done:
            # Not counted any more, so nobody else would remove them before they expire.
            self._client.unlink(*(_chunk(digest, number) for number in range(count)), _entry(digest))
        return done

    def _commit(self, name: str, value: bytes, count: int) -> bool:
        arguments = (name, value, self._ttl_s, self._clock(), count)
        return bool(self._client.eval(_COMMIT, 3, _USED, _SIZES, _entry(name), *arguments))

    def _windows(self, entries: tuple[FileEntry, ...], root: Path) -> Iterator[list[tuple[int, bytes]]]:
        window: list[tuple[int, bytes]] = []
        for numbered in enumerate(_cut(entries, root, self._chunk_bytes)):
            window.append(numbered)
            if len(window) == _WINDOW:
                yield window
                window = []
        if window:
            yield window

    def drop(self, name: str) -> bool:
        """Remove an entry; whether it was there."""
        return bool(self._client.eval(_DROP, 2, _USED, _SIZES, name))

    def _drop_quietly(self, name: str) -> None:
        try:
            self.drop(name)
        except redis.RedisError as error:
            logger.debug("entry %s expires by itself: %s", name[:12], type(error).__name__)

    # ------------------------------------------------------------------------------------- small values

    def get_value(self, name: str) -> bytes | None:
        """A value that ``put_value`` kept; reading it counts as use."""
        value: bytes | None = self._client.get(_entry(name))
        if value is not None:
            self._client.eval(_TOUCH, 3, _USED, _SIZES, _entry(name), name, self._ttl_s, self._clock())
        return value

    def put_value(self, name: str, value: bytes) -> bool:
        """Keep a value of at most a chunk's size, in the same budget as the snapshots."""
        if len(value) > self._chunk_bytes or not self._reserve(name, len(value), 0):
            return False
        return self._commit(name, value, 0)

    # ---------------------------------------------------------------------------------------- operators

    def sizes(self) -> dict[str, int]:
        """Name -> bytes of every entry, the longest unused first; those being written are among them."""
        names = [name.decode() for name in self._client.zrange(_USED, 0, -1)]
        values: Sequence[bytes | None] = self._client.hmget(_SIZES, names) if names else []
        return {name: int(value.split()[0]) for name, value in zip(names, values, strict=True) if value}

    def used_bytes(self) -> int:
        return sum(self.sizes().values())

    def clean(self) -> int:
        """Forget what has expired and keep the budget; returns how many entries were dropped for room."""
        now_s = self._clock()
        arguments = ("", 0, 0, min(self._max_bytes, self._room()), now_s, self._ttl_s, now_s)
        return int(self._client.eval(_RESERVE, 2, _USED, _SIZES, *arguments)) - 1


def _cut(entries: tuple[FileEntry, ...], root: Path, chunk_bytes: int) -> Iterator[bytes]:
    """The files one after another, cut into chunks. Raises OSError when a file is shorter than it was."""
    buffer = bytearray()
    for entry in entries:
        left = entry.size_bytes
        with (root / entry.name).open("rb") as file:
            while left:
                part = file.read(min(left, chunk_bytes - len(buffer)))
                if not part:
                    raise OSError(f"{entry.name} was cut while it was read")
                left -= len(part)
                buffer += part
                if len(buffer) == chunk_bytes:
                    yield bytes(buffer)
                    buffer.clear()
    if buffer:
        yield bytes(buffer)
