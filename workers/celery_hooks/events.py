"""Task events: those of one turn of the hub in one message, and none while nobody listens.

Stock celery 5.7 publishes every 24 of them; a monitor reads the larger messages just the same (``task.multi``).
Redis keeps nothing that is published for later, so an event without a listener is work for nobody. Once a message had
no receiver, what is to be told is held back for a moment, and then an empty message asks whether anybody listens: one
question for all the jobs of that moment, and no job waits for its answer. A monitor that subscribes gets what happens
from then on, as with stock Celery, the first of it that moment late.

Touches ``EventDispatcher.__init__``'s ``buffer_limit``, its ``send``, ``flush``, ``_publish`` and ``_outbound_buffer``,
and kombu's ``Channel._put_fanout`` (see ``transport``).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

from celery.events.dispatcher import EventDispatcher
from kombu.asynchronous import get_event_loop

__all__ = ["TurnDispatcher"]

#: Bounds the size of a message; a turn of the hub rarely has as many.
_BUFFER_EVENTS: Final = 1_000
_GROUP: Final = "task"


#: How long events are held back while nobody is known to listen.
_HOLD_S: Final = 0.1


def _on_the_hub(after_s: float, call: Callable[[], None]) -> None:
    hub = get_event_loop()
    if hub is None:
        call()
    else:
        hub.call_later(after_s, call)


class TurnDispatcher(EventDispatcher):
    def __init__(
        self, *args: Any, call_later: Callable[[float, Callable[[], None]], None] = _on_the_hub, **kwargs: Any
    ) -> None:
        """``call_later``: how to have something called after so many seconds, on the hub's thread."""
        super().__init__(*args, **{**kwargs, "buffer_limit": _BUFFER_EVENTS})
        self._call_later = call_later
        self._heard = True
        #: What to tell if anybody listens: arguments of ``send``.
        self._held: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def send(self, type: str, *args: Any, **fields: Any) -> Any:  # noqa: A002 - Celery's name
        """Stock, but that task events are held back for a moment when nobody listened to the one before."""
        if self._heard or not type.startswith(_GROUP) or self.on_send_buffered is None:
            return super().send(type, *args, **fields)
        self._held.append((type, args, {"timestamp": time.time(), **fields}))
        if len(self._held) == 1:
            self._call_later(_HOLD_S, self._tell_held)
        elif len(self._held) >= _BUFFER_EVENTS:
            self._tell_held()
        return None

    def flush(self, errors: bool = True, groups: bool = True) -> None:
        """Publish what this turn had to tell, and note whether anybody got it."""
        told = groups and bool(self._group_buffer[_GROUP])
        self._forget_receivers()
        super().flush(errors=errors, groups=groups)
        # Without a hub nothing says that a turn is over, and every event goes out.
        if told and self.on_send_buffered is not None:
            self._heard = self._receivers() != 0

    def _publish(self, event: Any, producer: Any, routing_key: str, **_: Any) -> None:
        """Stock, but in one try. A heartbeat would go on for as long as the broker is silent, on the hub's thread; what
        cannot be sent is kept, as stock does, until there is a new connection."""
        super()._publish(event, producer, routing_key)

    def _tell_held(self) -> None:
        held, self._held = self._held, []
        if not held:
            return
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
