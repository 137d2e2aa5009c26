"""Result backend: the results of a batch in one round trip, and one message a client to announce them.

Touches ``RedisBackend._store_result`` (celery 5.7): the buffered path leaves out its GET, which keeps a late
duplicate from overwriting a success. Ours are idempotent: a second run of a job gives the same answer.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

from celery import states
from celery.backends.redis import RedisBackend

from cortex_tasks.codec import is_reply_channel
from cortex_tasks.errors import InferenceFailed

__all__ = ["BatchedRedisBackend"]

logger = logging.getLogger(__name__)


class _Stored(NamedTuple):
    key: str
    payload: bytes | str
    expires_s: int | None
    task_id: str
    reply_to: str | None


class Rider(Protocol):
    """``workers.ledger.Ledger``, as far as the backend knows it."""

    def board(self, pipe: Any) -> int:
        """Add commands to a pipeline; returns how many. Their failure is no failure of the results."""

    def turned_back(self) -> None:
        """The pipeline could not be sent."""


class BatchedRedisBackend(RedisBackend):
    """Stock, except between ``collecting`` and ``flush``, and for the message on a client's reply channel."""

    #: Redis takes no longer values (``proto-max-bulk-len``); it closes the connection on one.
    answer_max_bytes = 512 * 1024 * 1024

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._collecting = False
        self._stored: list[_Stored] = []
        self._told_refused = False
        #: Entries of the result cache that go along with results, where both live in one Redis.
        self.rider: Rider | None = None

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Results stored inside wait for ``flush``. For one thread: the hub's."""
        self._collecting = True
        try:
            yield
        finally:
            self._collecting = False

    def flush(self) -> None:
        """Send what was collected in one round trip. Raises what redis-py raises when something could not be stored,
        and keeps all of it for the next try. An announcement that cannot be made is no loss: clients also look."""
        if not self._stored:
            return
        finished: dict[str, list[str]] = defaultdict(list)
        with self.client.pipeline(transaction=False) as pipe:
            # First, so that who hears of an answer finds it in the cache.
            riding = self.rider.board(pipe) if self.rider else 0
            for entry in self._stored:
                pipe.set(entry.key, entry.payload, ex=entry.expires_s or None)
            for entry in self._stored:
                pipe.publish(entry.key, entry.payload)
                if is_reply_channel(entry.reply_to):
                    finished[str(entry.reply_to)].append(entry.task_id)
            for channel, ids in finished.items():
                pipe.publish(channel, " ".join(ids))
            replies = self._execute(pipe)[riding:]
        self._check(replies[: len(self._stored)], replies[len(self._stored) :])
        self._stored.clear()

    def _execute(self, pipe: Any) -> list[Any]:
        try:
            replies: list[Any] = pipe.execute(raise_on_error=False)
        except Exception:
            if self.rider:
                self.rider.turned_back()
            raise
        return replies

    def _check(self, stored: Sequence[Any], announced: Sequence[Any]) -> None:
        for reply in stored:
            if isinstance(reply, Exception):
                raise reply
        refused = next((reply for reply in announced if isinstance(reply, Exception)), None)
        if refused is not None and not self._told_refused:
            self._told_refused = True
            logger.warning("Redis refuses to announce answers (clients find them by polling): %s", refused)

    def encode(self, data: Any) -> Any:
        """Raises InferenceFailed when the answer is longer than Redis takes."""
        payload = super().encode(data)
        if len(payload) > self.answer_max_bytes:
            raise InferenceFailed(
                f"the answer has {len(payload):,} bytes, over Redis's limit of {self.answer_max_bytes:,}; "
                "send fewer inputs per job",
                {"limit": self.answer_max_bytes, "got": len(payload)},
            )
        return payload

    def _store_result(
        self,
        task_id: str,
        result: Any,
        state: str,
        traceback: str | None = None,
        request: Any = None,
        **kwargs: Any,
    ) -> Any:
        reply_to = getattr(request, "reply_to", None)
        # A chord's or group's part is read back at once by the join: never hold it back.
        # (Celery's stand-in for the request of an unknown task has no group.)
        part = request is not None and (request.chord or getattr(request, "group", None))
        if self._collecting and not part and state in states.READY_STATES:
            meta = self._get_result_meta(result=result, state=state, traceback=traceback, request=request)
            meta["task_id"] = task_id
            expires_s = self.failure_expires if state == states.FAILURE else self.expires
            self._stored.append(
                _Stored(self.get_key_for_task(task_id), self.encode(meta), expires_s, task_id, reply_to)
            )
            return result
        stored = super()._store_result(task_id, result, state, traceback=traceback, request=request, **kwargs)
        if is_reply_channel(reply_to) and state in states.READY_STATES:
            self.client.publish(reply_to, task_id)
        return stored
