"""Claims on messages: a worker renews those it holds, so that a dead worker's jobs move on within seconds.

Stock kombu gives an unacknowledged message to another worker only after ``visibility_timeout`` (an hour), and
does so to slow live workers as well. With renewal the time-out can be short.

Touches kombu 5.7's ``redis.QoS``, ``virtual.QoS._delivered`` and the ``unacked_index`` sorted set, whose scores
are the epoch seconds of delivery.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from kombu.transport import redis as kombu_redis
from kombu.transport import virtual

__all__ = ["LeaseKeeper", "LeasedQoS", "flush_acks"]

logger = logging.getLogger(__name__)

_CHUNK: Final = 1_000
_UNACKED: Final = kombu_redis.Channel.unacked_key
_UNACKED_INDEX: Final = kombu_redis.Channel.unacked_index_key
_live: weakref.WeakSet[Any] = weakref.WeakSet()
#: Acknowledgements that came after their connection was lost; the LeaseKeeper delivers them.
_late_acks: deque[str] = deque()


class LeasedQoS(kombu_redis.QoS):
    """Stock, but known to the LeaseKeeper, aware of messages that were recorded when they were fetched, and safe to
    acknowledge on after its connection was lost (stock kombu 5.7 raises AttributeError there, which ends the worker).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        #: Tags that the fetch script recorded as unacknowledged already.
        self.recorded: set[str] = set()
        #: Tags acknowledged in this turn of the hub.
        self.acked: list[str] = []
        _live.add(self)

    @property
    def connected(self) -> bool:
        channel = self.channel
        return not channel.closed and channel.connection is not None and channel.connection.client is not None

    def append(self, message: Any, delivery_tag: str) -> None:
        if delivery_tag in self.recorded:
            self.recorded.discard(delivery_tag)
            virtual.QoS.append(self, message, delivery_tag)
        else:
            super().append(message, delivery_tag)

    def ack(self, delivery_tag: str) -> None:
        """Collected; ``flush_acks`` sends those of one turn of the hub together."""
        self._quick_ack(delivery_tag)
        if self.connected:
            self.acked.append(delivery_tag)
        else:
            _late_acks.append(delivery_tag)

    def flush_acks(self) -> None:
        """Send the collected acknowledgements; those that cannot be sent are left to the LeaseKeeper."""
        if not self.acked:
            return
        tags, self.acked = self.acked, []
        try:
            with self.channel.conn_or_acquire() as client:
                _acknowledge(client, tags)
        except Exception:
            _late_acks.extend(tags)
            raise

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        if self.connected:
            super().reject(delivery_tag, requeue=requeue)
        else:
            # Not renewed any more: another worker gets it when the lease ends.
            self._quick_ack(delivery_tag)

    def held_tags(self) -> list[str]:
        """Delivery tags not yet acknowledged. Called by another thread than the one that changes them."""
        while True:
            try:
                return [tag for tag in list(self._delivered) if tag not in self._dirty]
            except RuntimeError:
                # Changed while being copied: copy again.
                continue


def _acknowledge(client: Any, tags: list[str]) -> None:
    with client.pipeline(transaction=False) as pipe:
        for start in range(0, len(tags), _CHUNK):
            chunk = tags[start : start + _CHUNK]
            pipe.zrem(_UNACKED_INDEX, *chunk)
            pipe.hdel(_UNACKED, *chunk)
        pipe.execute()


def flush_acks() -> None:
    """Send what this process has acknowledged so far, on whatever channel. For the hub's thread."""
    for qos in list(_live):
        if qos.connected:
            qos.flush_acks()


class LeaseKeeper(threading.Thread):
    """Renews, every third of a lease, the claims of this process on the messages it holds.

    A thread of its own, with a connection of its own: a hub that is busy tracing thousands of results must not
    lose its claims. A process that hangs for good is the watchdog's business (``workers.health``).
    """

    def __init__(self, connect: Callable[[], Any], lease_s: float, clock: Callable[[], float] = time.time) -> None:
        super().__init__(name="lease-keeper", daemon=True)
        self._connect = connect
        self._interval_s = lease_s / 3
        self._clock = clock
        self._stopped = threading.Event()
        self._client: Any = None

    def run(self) -> None:
        while not self._stopped.wait(self._interval_s):
            try:
                self.renew()
            except Exception as error:
                self._client = None
                logger.warning("claims on jobs could not be renewed: %s; trying again", type(error).__name__)

    def renew(self) -> int:
        """Deliver late acknowledgements and renew all claims now; returns how many are held."""
        tags = [tag for qos in list(_live) if qos.connected for tag in qos.held_tags()]
        if not tags and not _late_acks:
            return 0
        self._client = self._client or self._connect()
        self._acknowledge_late()
        now_s = self._clock()
        for start in range(0, len(tags), _CHUNK):
            # XX: a message acknowledged meanwhile must not come back.
            self._client.zadd(_UNACKED_INDEX, dict.fromkeys(tags[start : start + _CHUNK], now_s), xx=True)
        return len(tags)

    def _acknowledge_late(self) -> None:
        tags = list(_late_acks)
        if tags:
            _acknowledge(self._client, tags)
            for _ in tags:
                _late_acks.popleft()

    def stop(self) -> None:
        self._stopped.set()
