"""The cache's side of a worker in Redis: look and claim, store and release, keep within the configured bytes.

A *flight* is one computation of one key. Its worker claims it while it looks (``LOOK``), and gives it up when it
stores the answer (``STORE``). A claim counts only while its owner lives: the owner renews one key of its own, whatever
it computes, so that its death frees all of its flights within ALIVE_S. An owner that could not give claims up goes on
under a new name: its old one dies. Bulk claims do not hold up interactive work.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

from redis.exceptions import RedisError

from cortex_tasks.cache.breaker import Breaker
from cortex_tasks.cache.counters import Counters, tell
from cortex_tasks.cache.names import (
    ACTIVATE,
    BYTES,
    ENTRY_OVERHEAD_BYTES,
    INDEX,
    activate_arguments,
    entry_prefix,
    flight_prefix,
    model_key,
    owner_key,
)
from cortex_tasks.payloads import Lane

__all__ = ["ALIVE_S", "FLIGHT_S", "MINE", "Entry", "FlightTower"]

logger = logging.getLogger(__name__)

#: A worker that has not renewed its key for so long has lost its flights.
ALIVE_S: Final = 2.0
#: A claim ends by itself after so long, whoever lives.
FLIGHT_S: Final = 60
#: Keys of one look; Redis serves nobody else meanwhile.
LOOK_KEYS: Final = 128
#: Entries that one step of trimming looks at.
_TRIM_ENTRIES: Final = 200
_TRIM_STEPS: Final = 50
#: What LOOK answers beside an entry's bytes.
MINE: Final = 1

# KEYS: an entry and its flight, pair by pair. ARGV: owner, lane (b or i), FLIGHT_S, what owners' keys begin with.
# Returns for each pair the entry's bytes; else 1 when the owner is to compute it, 0 when another one does.
_LOOK: Final = """
local out = {}
for i = 1, #KEYS, 2 do
  local entry = redis.call('GET', KEYS[i])
  if not entry then
    local other, held = false, redis.call('GET', KEYS[i + 1])
    if held then
      local owner, lane = string.match(held, '^(%S+) (%a)')
      other = owner and owner ~= ARGV[1] and (lane == 'i' or ARGV[2] == 'b')
        and redis.call('EXISTS', ARGV[4] .. owner) == 1
    end
    entry = 0
    if not other then
      -- Without room for a claim it is computed all the same.
      redis.pcall('SET', KEYS[i + 1], ARGV[1] .. ' ' .. ARGV[2], 'EX', ARGV[3])
      entry = 1
    end
  end
  out[#out + 1] = entry
end
return out
"""

# KEYS: index, bytes, then an entry and its flight, pair by pair. ARGV: owner, epoch seconds, what an entry takes beside
# its bytes, then for each pair its bytes ('' stores nothing) and its seconds to live. Returns {stored, refused}.
_STORE: Final = """
local stored, refused, total = 0, 0, 0
for i = 3, #KEYS, 2 do
  local frame, ttl = ARGV[i + 1], ARGV[i + 2]
  if frame ~= '' then
    local done = redis.pcall('SET', KEYS[i], frame, 'EX', ttl)
    if done.err then
      refused = refused + 1
    else
      stored = stored + 1
      local size = #frame + ARGV[3]
      local added = redis.pcall('ZADD', KEYS[1], ARGV[2] + ttl, string.format('%08x', size) .. KEYS[i])
      if added == 1 then total = total + size end
    end
  end
  local held = redis.call('GET', KEYS[i + 1])
  if held and string.match(held, '^%S+') == ARGV[1] then redis.call('DEL', KEYS[i + 1]) end
end
if total > 0 then redis.pcall('INCRBY', KEYS[2], total) end
return {stored, refused}
"""

# KEYS: index, bytes. ARGV: epoch seconds, the most bytes, entries of this step. Forgets what has ended, then drops what
# ends next while there is too much. Returns {looked at, dropped}; call again while it looks at as many as it may.
_TRIM: Final = """
local ended = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', ARGV[1], 'LIMIT', 0, ARGV[3])
local bytes = tonumber(redis.call('GET', KEYS[2]) or '0')
for _, member in ipairs(ended) do
  bytes = bytes - tonumber(string.sub(member, 1, 8), 16)
  redis.call('ZREM', KEYS[1], member)
end
local dropped, most = 0, tonumber(ARGV[2])
while bytes > most and dropped < tonumber(ARGV[3]) do
  local member = redis.call('ZPOPMIN', KEYS[1])[1]
  if not member then bytes = 0 break end
  bytes = bytes - tonumber(string.sub(member, 1, 8), 16)
  redis.call('UNLINK', string.sub(member, 9))
  dropped = dropped + 1
end
redis.call('SET', KEYS[2], string.format('%d', math.max(0, bytes)))
return {#ended + dropped, dropped}
"""


class Entry(NamedTuple):
    """An answer to store, or (empty ``frame``) a flight to give up."""

    alias: str
    key: bytes
    frame: bytes
    ttl_s: int


class FlightTower:
    """One worker's view of all flights. ``owner``: its name, no blanks, unlike all others. Not thread-safe, but that
    ``store_command``, ``refused`` and ``disown`` may be called by another thread than the rest. ``clock``: monotonic
    seconds; ``wall_clock``: epoch seconds."""

    def __init__(
        self,
        client: Any,
        owner: str,
        max_bytes: int,
        breaker: Breaker,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._client = client
        self._name, self._lives = owner, 0
        self._owner = owner
        self._max_bytes = max_bytes
        self._breaker = breaker
        self._clock, self._wall_clock = clock, wall_clock
        self._renewed_s = -ALIVE_S
        #: How many bytes this instance grants; None until it was asked.
        self._granted_bytes: int | None = None

    def look(self, alias: str, keys: Sequence[bytes], lane: Lane) -> list[Any] | None:
        """For each key an entry's bytes, MINE (compute it) or 0 (another worker does). None: the cache fails."""
        found: list[Any] = []
        for first in range(0, len(keys), LOOK_KEYS):
            part = self._ask(partial(self._look, alias=alias, keys=keys[first : first + LOOK_KEYS], lane=lane))
            if part is None:
                return None
            found += part
        return found

    def _look(self, pipe: Any, alias: str, keys: Sequence[bytes], lane: Lane) -> None:
        entries, flights = entry_prefix(alias), flight_prefix(alias)
        pairs = [name for key in keys for name in (entries + key, flights + key)]
        pipe.eval(_LOOK, len(pairs), *pairs, self._owner, lane[0], FLIGHT_S, owner_key(""))

    def renew(self) -> None:
        """Say that this worker lives, if it is time to."""
        if self._clock() - self._renewed_s > ALIVE_S / 4:
            self._ask(lambda pipe: None)

    def store(self, entries: Sequence[Entry]) -> int:
        """Store answers and give up their flights, over a connection of its own; how many it could before the cache
        failed."""
        for first in range(0, len(entries), LOOK_KEYS):
            if self._ask(partial(self.store_command, entries=entries[first : first + LOOK_KEYS])) is None:
                return first
        return len(entries)

    def disown(self) -> None:
        """Claims could not be given up: let all of this worker's claims end within ALIVE_S, and make new ones under
        another name. Otherwise those who wait for a lost answer would wait for FLIGHT_S."""
        self._lives += 1
        self._owner = f"{self._name}.{self._lives}"
        self._renewed_s = -ALIVE_S

    def refused(self, error: Exception) -> None:
        """Redis refused what ``store_command`` asked of another connection. The cache has failed, as far as one can
        tell, and claims stand that nobody gave up."""
        self._breaker.failed(error)
        self.disown()

    def store_command(self, pipe: Any, entries: Sequence[Entry]) -> None:
        """Let a redis-py pipeline store answers and give up their flights."""
        names = [
            name
            for entry in entries
            for name in (entry_prefix(entry.alias) + entry.key, flight_prefix(entry.alias) + entry.key)
        ]
        given = [part for entry in entries for part in (entry.frame, entry.ttl_s)]
        arguments = [self._owner, int(self._wall_clock()), ENTRY_OVERHEAD_BYTES, *given]
        pipe.eval(_STORE, 2 + len(names), INDEX, BYTES, *names, *arguments)

    def activate(self, alias: str, revision: str, *, loaded: bool) -> bool:
        """Say that a revision of a model answers here; whether that could be said."""
        arguments = activate_arguments(revision, self._wall_clock(), loaded=loaded)
        return self._ask(lambda pipe: pipe.eval(ACTIVATE, 1, model_key(alias), *arguments)) is not None

    def tell(self, counters: Counters) -> None:
        """Add the counts up in Redis."""
        counts = counters.take()
        if counts and self._ask(lambda pipe: tell(pipe, counts)) is None:
            counters.give_back(counts)

    def trim(self) -> int:
        """Keep within the configured bytes; returns how many entries were dropped for that."""
        dropped = 0
        for _ in range(_TRIM_STEPS):
            step = self._ask(self._trim)
            if step is None:
                break
            dropped += int(step[1])
            if step[0] < _TRIM_ENTRIES:
                break
        return dropped

    def _trim(self, pipe: Any) -> None:
        pipe.eval(_TRIM, 2, INDEX, BYTES, int(self._wall_clock()), self._most_bytes(), _TRIM_ENTRIES)

    def land(self) -> None:
        """Give up all flights: this worker ends."""
        try:
            self._client.delete(owner_key(self._owner))
            self._client.close()
        except (RedisError, OSError) as error:
            logger.debug("flights end with their claims: %s", error)

    def _most_bytes(self) -> int:
        if self._granted_bytes is None:
            try:
                self._granted_bytes = granted_bytes(self._client.info("memory"), self._max_bytes)
            except (RedisError, OSError):
                return self._max_bytes
        return self._granted_bytes

    def _ask(self, command: Callable[[Any], None]) -> Any:
        """Send one command, with the sign of life when it is due; its reply, or None when the cache fails."""
        if not self._breaker.allows():
            return None
        now_s = self._clock()
        try:
            with self._client.pipeline(transaction=False) as pipe:
                if now_s - self._renewed_s > ALIVE_S / 4:
                    pipe.set(owner_key(self._owner), 1, px=int(ALIVE_S * 1000))
                command(pipe)
                replies = pipe.execute(raise_on_error=False)
        except (RedisError, OSError) as error:
            self._breaker.failed(error)
            return None
        refused = next((reply for reply in replies if isinstance(reply, Exception)), None)
        if refused is not None:
            self._breaker.failed(refused)
            return None
        self._breaker.succeeded()
        self._renewed_s = max(self._renewed_s, now_s) if len(replies) > 1 else self._renewed_s
        return replies[-1] if replies else True


def granted_bytes(memory: Any, wanted: int) -> int:
    """How many bytes of an instance the cache may take. ``memory``: what INFO says of it.

    An instance with a limit that evicts nothing refuses jobs when it is full: half of it stays free for queues.
    """
    most, policy = int(memory.get("maxmemory") or 0), str(memory.get("maxmemory_policy", ""))
    if policy.startswith("allkeys"):
        logger.warning("Redis evicts with %s, which may evict queues: set maxmemory-policy volatile-lru", policy)
    if most and not policy.startswith("volatile"):
        return min(wanted, most // 2)
    return wanted
