"""Attempts of suspect jobs, and the list where poison is parked, in Redis.

``cortex:dead:<queue>`` holds JSON objects ``{"id", "reason", "at", "message"}``, newest first, at most
DEAD_LETTERS_MAX; ``message`` is the job's message as it was (text where it was no JSON), so that it can be put back
into its queue.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any, Final

from cortex_tasks.dead_letters import attempts_key, dead_letter_key

__all__ = ["DEAD_LETTERS_MAX", "DeadLetters", "add_dead_letter", "dead_letter_key"]

DEAD_LETTERS_MAX: Final = 10_000
_ATTEMPTS_TTL_S: Final = 86_400


def add_dead_letter(pipe: Any, queue: str, job_id: str, reason: str, message: Any, at_s: float) -> None:
    """Let a redis-py pipeline park a message (JSON types) on its queue's list. ``at_s``: epoch seconds."""
    entry = json.dumps({"id": job_id, "reason": reason, "at": at_s, "message": message})
    pipe.lpush(dead_letter_key(queue), entry)
    pipe.ltrim(dead_letter_key(queue), 0, DEAD_LETTERS_MAX - 1)


class DeadLetters:
    """``connect`` gives a redis-py client; it is called once, by the thread that first needs it."""

    def __init__(self, connect: Callable[[], Any], clock: Callable[[], float] = time.time) -> None:
        self._connect = connect
        self._clock = clock
        self._client: Any = None

    @property
    def _redis(self) -> Any:
        self._client = self._client or self._connect()
        return self._client

    def count_attempt(self, job_id: str, index: int) -> int:
        """One more start of one input of a suspect job; returns how many there have been."""
        key = attempts_key(job_id)
        with self._redis.pipeline() as pipe:
            pipe.hincrby(key, str(index), 1)
            pipe.expire(key, _ATTEMPTS_TTL_S)
            return int(pipe.execute()[0])

    def clear_attempts(self, job_id: str, index: int) -> None:
        """An input of a suspect job is not guilty."""
        self._redis.hdel(attempts_key(job_id), str(index))

    def park(self, queue: str, job_id: str, reason: str, message: Any) -> None:
        """Put a job on its queue's dead-letter list."""
        with self._redis.pipeline() as pipe:
            add_dead_letter(pipe, queue, job_id, reason, message, self._clock())
            pipe.execute()
