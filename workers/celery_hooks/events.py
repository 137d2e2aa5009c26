"""Task events: those of one turn of the hub in one message.

Stock celery 5.7 publishes every 24 of them; a monitor reads the larger messages just the same (``task.multi``).
Touches ``EventDispatcher.__init__``'s ``buffer_limit``.
"""

from __future__ import annotations

from typing import Any, Final

from celery.events.dispatcher import EventDispatcher

__all__ = ["TurnDispatcher"]

#: Bounds the size of a message; a turn of the hub rarely has as many.
_BUFFER_EVENTS: Final = 1_000


class TurnDispatcher(EventDispatcher):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "buffer_limit": _BUFFER_EVENTS})
