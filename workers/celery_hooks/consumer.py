"""What Celery's timers hand on: jobs with a countdown, and those that a rate limit held back.

Their delivery is over by then. What their handing on raises would end in the timer's log, with the message held and its
lease renewed until the worker stops; here it ends as if the message had been handed on when it came.

Touches celery 5.7's ``Consumer.apply_eta_task`` and ``Consumer._limit_move_to_pool``, and takes ``transport``'s channel
for granted.
"""

from __future__ import annotations

from typing import Any

from celery.worker.consumer import Consumer

__all__ = ["RefusingConsumer"]


class RefusingConsumer(Consumer):
    """``worker_consumer = "workers.celery_hooks.consumer:RefusingConsumer"``"""

    def apply_eta_task(self, request: Any) -> None:
        self._limit_move_to_pool(request)
        # Also for one that was refused: its place was made when it came.
        self.qos.decrement_eventually()

    def _limit_move_to_pool(self, request: Any) -> None:
        try:
            super()._limit_move_to_pool(request)
        except Exception as error:
            request.message.channel.refuse(request.message.delivery_tag, error)
