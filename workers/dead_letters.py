"""Attempts of suspect jobs, and the list where poison is parked, in Redis.

``cortex:dead:<queue>`` holds JSON objects ``{"id", "reason", "at", "message"}``, newest first, at most
DEAD_LETTERS_MAX; ``message`` is the job's message as it was (text where it was no JSON), so that it can be put back
into its queue.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from typing import Any, Final

from redis.exceptions import RedisError

from cortex_tasks.config import ModelConfig
from cortex_tasks.dead_letters import attempts_key, dead_letter_key
from cortex_tasks.errors import CortexError, PoisonJob
from workers.runtime import Job

__all__ = ["DEAD_LETTERS_MAX", "DeadLetters", "add_dead_letter", "dead_letter_key"]

logger = logging.getLogger(__name__)

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

    def try_again(self, job: Job, index: int, config: ModelConfig, message: Any) -> CortexError | None:
        """Count one more start of a suspect's input, which runs alone, so that only a guilty one dies again.

        None lets it run. Beyond the model's limit the job is parked and the input fails with the error returned;
        its neighbours in the job get their answers.
        """
        limit = config.limits.attempts
        reason = f"its worker died {limit} times while running input {index}"
        try:
            # Its first run, in a batch, was not counted.
            if self.count_attempt(job.id, index) < limit:
                return None
            self.park(config.queue, job.id, reason, message)
        except (RedisError, OSError) as error:
            # A job must not fail because Redis is away for a moment; a poison's next run counts again.
            logger.warning("the attempts of job %s could not be counted: %s", job.id, type(error).__name__)
            return None
        logger.error("job %s of model %s was parked as poison: %s (cortex dead list)", job.id, job.model, reason)
        return PoisonJob(f"job {job.id} of model {job.model!r} was parked: {reason}", {"attempts": limit})

    def survived(self, job: Job, index: int) -> None:
        """A suspect's input ran and the process lives: it is not guilty of what may come before it is answered."""
        try:
            self.clear_attempts(job.id, index)
        except (RedisError, OSError) as error:
            logger.warning("the attempts of job %s could not be cleared: %s", job.id, type(error).__name__)

    def park(self, queue: str, job_id: str, reason: str, message: Any) -> None:
        """Put a job on its queue's dead-letter list."""
        with self._redis.pipeline() as pipe:
            add_dead_letter(pipe, queue, job_id, reason, message, self._clock())
            pipe.execute()
