"""The consumer, where Celery's own forgets a message or keeps answers back.

- What Celery's timers hand on (jobs with a countdown, or held back by a rate limit): their delivery is over by then.
  What their handing on raises would end in the timer's log, with the message held and its lease renewed until the
  worker stops; here it ends as if the message had been handed on when it came.
- While the broker is away the hub does not turn, for as long as connecting takes. Answers may have a Redis of their
  own: they are stored meanwhile.

Touches celery 5.7's ``Consumer.apply_eta_task``, ``_limit_move_to_pool`` and ``ensure_connected``, whose connection
calls back once a second; takes ``transport``'s channel for granted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from celery.worker.consumer import Consumer

from workers.celery_hooks.pool import BatchingPool

__all__ = ["CortexConsumer"]


class CortexConsumer(Consumer):
    """``worker_consumer = "workers.celery_hooks.consumer:CortexConsumer"``"""

    def apply_eta_task(self, request: Any) -> None:
        self._limit_move_to_pool(request)
        # Also for one that was refused: its place was made when it came.
        self.qos.decrement_eventually()

    def _limit_move_to_pool(self, request: Any) -> None:
        try:
            super()._limit_move_to_pool(request)
        except Exception as error:
            request.message.channel.refuse(request.message.delivery_tag, error)

    def ensure_connected(self, conn: Any) -> Any:
        connect, pool = conn.ensure_connection, self.pool
        if not isinstance(pool, BatchingPool):
            return super().ensure_connected(conn)

        def connect_and_answer(*args: Any, callback: Callable[[], None]) -> Any:
            def meanwhile() -> None:
                callback()
                pool.flush()

            return connect(*args, callback=meanwhile)

        conn.ensure_connection = connect_and_answer
        try:
            return super().ensure_connected(conn)
        finally:
            del conn.ensure_connection
