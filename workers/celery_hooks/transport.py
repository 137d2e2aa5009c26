"""Broker transport: kombu's Redis transport, with leases.

Stock kombu gives an unacknowledged message to another worker only after ``visibility_timeout`` (an hour), and
does so to slow live workers as well. Here a worker renews its claim on each message it holds, so the time-out can
be short: a killed worker's jobs move on within seconds, a slow worker's stay.

Touches kombu 5.7's ``redis.Channel.QoS``, ``virtual.QoS._delivered`` and the ``unacked_index`` sorted set, whose
scores are the epoch seconds of delivery.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, Final

from kombu.transport import TRANSPORT_ALIASES
from kombu.transport import redis as kombu_redis

__all__ = ["TRANSPORT_NAME", "LeaseKeeper", "LeasedTransport", "register_transport"]

logger = logging.getLogger(__name__)

#: The name that ``broker_transport`` takes.
TRANSPORT_NAME: Final = "cortex"
_CHUNK: Final = 1_000
_live: weakref.WeakSet[Any] = weakref.WeakSet()


class LeasedQoS(kombu_redis.QoS):
    """Stock, but known to the LeaseKeeper."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _live.add(self)

    def held_tags(self) -> list[str]:
        """Delivery tags not yet acknowledged. Called by another thread than the one that changes them."""
        while True:
            try:
                return [tag for tag in list(self._delivered) if tag not in self._dirty]
            except RuntimeError:
                # Changed while being copied: copy again.
                continue


class LeasedChannel(kombu_redis.Channel):
    QoS = LeasedQoS


class LeasedTransport(kombu_redis.Transport):
    Channel = LeasedChannel


def register_transport() -> str:
    """Make kombu know the transport; returns its name."""
    TRANSPORT_ALIASES[TRANSPORT_NAME] = f"{__name__}:LeasedTransport"
    return TRANSPORT_NAME


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
        """Renew all claims now; returns how many are held."""
        tags = [tag for qos in list(_live) if not qos.channel.closed for tag in qos.held_tags()]
        if not tags:
            return 0
        self._client = self._client or self._connect()
        now_s = self._clock()
        for start in range(0, len(tags), _CHUNK):
            # XX: a message acknowledged meanwhile must not come back.
            self._client.zadd(
                LeasedChannel.unacked_index_key, dict.fromkeys(tags[start : start + _CHUNK], now_s), xx=True
            )
        return len(tags)

    def stop(self) -> None:
        self._stopped.set()
