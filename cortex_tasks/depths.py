"""How much work waits in each queue, and how much of it workers hold.

A queue's length alone lies as a scaling signal: workers take jobs ahead of computing them. ``total`` counts the
jobs that are ready and those taken but not answered.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from cortex_tasks.codec import PRIORITY_STEPS, lane_of, queue_key
from cortex_tasks.dead_letters import dead_letter_key

__all__ = ["QueueDepth", "read_depths"]

# kombu's: a hash of delivery tag -> JSON of [message, exchange, routing key], and a sorted set of tag -> the epoch
# second of its last claim.
_UNACKED: Final = "unacked"
_UNACKED_INDEX: Final = "unacked_index"

# The routing key is the last string of a value that may be megabytes long: only its end is looked at.
_COUNT_UNACKED: Final = """
local claims = redis.call('ZRANGE', KEYS[2], 0, -1, 'WITHSCORES')
local held, stale = {}, {}
for i = 1, #claims, 2 do
  local message = redis.call('HGET', KEYS[1], claims[i])
  local queue = message and string.match(string.sub(message, -256), '"([^"]*)"%s*%]%s*$')
  if queue then
    held[queue] = (held[queue] or 0) + 1
    if tonumber(claims[i + 1]) < tonumber(ARGV[1]) then stale[queue] = (stale[queue] or 0) + 1 end
  end
end
local rows = {}
for queue, count in pairs(held) do rows[#rows + 1] = {queue, count, stale[queue] or 0} end
return rows
"""


@dataclass(frozen=True, slots=True)
class QueueDepth:
    """Jobs of one queue."""

    queue: str
    interactive: int
    bulk: int
    #: Taken by a worker and not yet answered.
    unacked: int
    #: Of these, the ones whose worker no longer renews its claim: they go to another worker when the lease ends.
    orphaned: int
    #: Parked on the dead-letter list.
    dead: int

    @property
    def ready(self) -> int:
        return self.interactive + self.bulk

    @property
    def total(self) -> int:
        """Ready and unacked."""
        return self.ready + self.unacked


def read_depths(redis: Any, queues: Iterable[str], *, lease_s: float, now_s: float) -> list[QueueDepth]:
    """The depth of each queue, in one round trip. ``redis``: a synchronous redis-py client.

    A claim not renewed for two thirds of ``lease_s`` counts as orphaned (a live worker renews every third).
    Raises what redis-py raises.
    """
    names = list(queues)
    with redis.pipeline(transaction=False) as pipe:
        for queue in names:
            for step in PRIORITY_STEPS:
                pipe.llen(queue_key(queue, step))
            pipe.llen(dead_letter_key(queue))
        pipe.eval(_COUNT_UNACKED, 2, _UNACKED, _UNACKED_INDEX, now_s - lease_s * 2 / 3)
        *lengths, rows = pipe.execute()
    unacked = {_text(queue): (int(held), int(stale)) for queue, held, stale in rows}
    width = len(PRIORITY_STEPS) + 1
    return [
        _depth(queue, lengths[at * width : (at + 1) * width], unacked.get(queue, (0, 0)))
        for at, queue in enumerate(names)
    ]


def _depth(queue: str, lengths: list[int], unacked: tuple[int, int]) -> QueueDepth:
    *ready, dead = lengths
    lanes: Mapping[str, int] = {
        lane: sum(n for step, n in zip(PRIORITY_STEPS, ready, strict=True) if lane_of(step) == lane)
        for lane in ("interactive", "bulk")
    }
    return QueueDepth(queue, lanes["interactive"], lanes["bulk"], unacked[0], unacked[1], dead)


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
