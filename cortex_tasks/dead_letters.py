"""Parked jobs: looking at them, putting one back into its queue, forgetting one.

Workers park (``workers.dead_letters``) on ``cortex:dead:<queue>``, a list of JSON objects ``{"id", "reason", "at",
"message"}``, newest first; ``message`` is the job's message as it was (text where it was no JSON).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from cortex_tasks.codec import queue_key

__all__ = ["DeadLetter", "attempts_key", "by_job", "dead_letter_key", "drop", "read_dead_letters", "requeue"]

# One step, so that no crash and no second operator loses or doubles a job. The push comes first: it is what a full
# Redis refuses. KEYS: the dead letters, the queue's list, the attempts. ARGV: the message, then the job's entries.
_REQUEUE: Final = """
local there = false
for i = 2, #ARGV do there = there or redis.call('LPOS', KEYS[1], ARGV[i]) end
if not there then return 0 end
redis.call('RPUSH', KEYS[2], ARGV[1])
for i = 2, #ARGV do redis.call('LREM', KEYS[1], 1, ARGV[i]) end
redis.call('DEL', KEYS[3])
return 1
"""


def dead_letter_key(queue: str) -> str:
    """The list on which a queue's poison jobs are parked."""
    return f"cortex:dead:{queue}"


def attempts_key(job_id: str) -> str:
    """The hash that counts a suspect job's attempts: index of an input -> count."""
    return f"cortex:attempts:{job_id}"


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One entry of a queue's list."""

    queue: str
    #: Empty where the message is too broken to tell.
    id: str
    reason: str
    #: Epoch seconds.
    at_s: float
    #: The message as JSON types; a text where it was no JSON.
    message: Any
    #: The entry as it stands in Redis.
    entry: bytes

    @property
    def readable(self) -> bool:
        """Whether it can be put back. (What was no JSON cannot become a job.)"""
        return isinstance(self.message, dict)

    @property
    def task(self) -> str:
        return str(_part(self.message, "headers").get("task") or "")

    @property
    def arguments(self) -> str:
        """The job's arguments, shortened as Flower shows them; of an unreadable message its beginning."""
        return str(_part(self.message, "headers").get("kwargsrepr") or "") if self.readable else str(self.message)[:100]


def read_dead_letters(redis: Any, queues: Iterable[str]) -> list[DeadLetter]:
    """What is parked of these queues, newest first in each. ``redis``: a synchronous redis-py client.

    Raises what redis-py raises.
    """
    return [_parsed(queue, entry) for queue in queues for entry in redis.lrange(dead_letter_key(queue), 0, -1)]


def by_job(letters: Iterable[DeadLetter]) -> list[list[DeadLetter]]:
    """Entries of one job together (each guilty input of a job parks it); those without an id one by one."""
    groups: dict[object, list[DeadLetter]] = {}
    for letter in letters:
        groups.setdefault((letter.queue, letter.id) if letter.id else letter.entry, []).append(letter)
    return list(groups.values())


def requeue(redis: Any, job: Sequence[DeadLetter]) -> bool:
    """Put a job back as the next of its queue's list and forget its attempts, in one atomic step. False when all its
    entries are gone. ``job``: the readable entries of one job."""
    first = job[0]
    priority = _part(first.message, "properties").get("priority")
    target = queue_key(first.queue, max(0, priority) if isinstance(priority, int) else 0)
    keys = (dead_letter_key(first.queue), target, attempts_key(first.id))
    return bool(redis.eval(_REQUEUE, 3, *keys, json.dumps(first.message), *(letter.entry for letter in job)))


def drop(redis: Any, job: Sequence[DeadLetter]) -> bool:
    """Forget a job and its attempts, in one atomic step. False when all its entries are gone."""
    with redis.pipeline() as pipe:
        for letter in job:
            pipe.lrem(dead_letter_key(letter.queue), 1, letter.entry)
        pipe.delete(attempts_key(job[0].id))
        return any(pipe.execute()[:-1])


def _parsed(queue: str, entry: bytes) -> DeadLetter:
    try:
        found = json.loads(entry)
        at_s, message = float(found["at"]), found["message"]
        return DeadLetter(queue, str(found["id"]), str(found["reason"]), at_s, message, entry)
    except (ValueError, TypeError, LookupError, RecursionError):
        return DeadLetter(queue, "", "not an entry of Cortex", 0.0, entry.decode(errors="backslashreplace"), entry)


def _part(message: Any, name: str) -> Mapping[str, Any]:
    part = message.get(name) if isinstance(message, dict) else None
    return part if isinstance(part, dict) else {}
