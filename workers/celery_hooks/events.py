"""Task events: those of one turn of the hub in one message, and none while nobody listens.

Stock celery 5.7 publishes every 24 of them; a monitor reads the larger messages just the same (``task.multi``).
Redis keeps nothing that is published for later, so an event without a listener is work for nobody: once a message had
no receiver, each turn that has something to tell asks first, with an empty message that costs a fraction. It asks at
the turn's end, when the jobs are on their way: nobody waits for the answer. A monitor that subscribes gets what happens
from then on, as with stock Celery.

Touches ``EventDispatcher.__init__``'s ``buffer_limit``, its ``send``, ``flush``, ``_publish`` and ``_outbound_buffer``,
and kombu's ``Channel._put_fanout`` (see ``transport``).
"""

from __future__ import annotations

from typing import Any, Final

from celery.events.dispatcher import EventDispatcher

__all__ = ["TurnDispatcher"]

#: Bounds the size of a message; a turn of the hub rarely has as many.
_BUFFER_EVENTS: Final = 1_000
_GROUP: Final = "task"


class TurnDispatcher(EventDispatcher):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "buffer_limit": _BUFFER_EVENTS})
        self._heard = True
        #: What to tell if anybody listens: arguments of ``send``.
        self._held: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def send(self, type: str, *args: Any, **fields: Any) -> Any:  # noqa: A002 - Celery's name
        """Stock, but that task events wait for the end of their turn when nobody listened to the one before."""
        if self._heard or not type.startswith(_GROUP) or self.on_send_buffered is None:
            return super().send(type, *args, **fields)
        self._held.append((type, args, fields))
        self.on_send_buffered()
        if len(self._held) >= _BUFFER_EVENTS:
            self._tell_held()
        return None

    def flush(self, errors: bool = True, groups: bool = True) -> None:
        """Publish what this turn had to tell, and note whether anybody got it."""
        if groups and self._held:
            self._tell_held()
        told = groups and bool(self._group_buffer[_GROUP])
        self._forget_receivers()
        super().flush(errors=errors, groups=groups)
        # Without a hub nothing says that a turn is over, and every event goes out.
        if told and self.on_send_buffered is not None:
            self._heard = self._receivers() != 0

    def _tell_held(self) -> None:
        held, self._held = self._held, []
        self._heard = self._somebody_listens()
        if self._heard:
            for kind, args, fields in held:
                super().send(kind, *args, **fields)

    def _somebody_listens(self) -> bool:
        self._forget_receivers()
        with self.mutex:
            kept = len(self._outbound_buffer)
            self._publish([], self.producer, f"{_GROUP}.multi")
            if len(self._outbound_buffer) > kept:
                # It could not be sent. Events are kept for later, the question need not be.
                self._outbound_buffer.pop()
        return self._receivers() != 0

    def _receivers(self) -> int | None:
        """How many got the last message; None when that is not known."""
        received: int | None = getattr(self._channel(), "receivers", None)
        return received

    def _forget_receivers(self) -> None:
        channel = self._channel()
        if hasattr(channel, "receivers"):
            channel.receivers = None

    def _channel(self) -> Any:
        return getattr(self.producer, "channel", None)
