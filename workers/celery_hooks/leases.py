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
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final

from kombu.transport import redis as kombu_redis
from kombu.transport import virtual
from kombu.utils.json import dumps, loads
from redis.exceptions import RedisError, ResponseError

from workers.celery_hooks import malformed

__all__ = ["UNACKED_KEYS", "LeaseKeeper", "LeasedQoS", "acknowledged", "flush_acks", "held_tag", "keep", "let_go"]

logger = logging.getLogger(__name__)

_CHUNK: Final = 1_000
#: After so many times a worker's places of interactive messages in a row (eight of the largest batches, as in
#: ``batching``), and so many at least, bulk that waits gets places: half of them at most.
_STREAK: Final = 4
_STREAK_LEAST: Final = 8
#: kombu's hash of unacknowledged messages, and their index by time.
UNACKED_KEYS: Final = (kombu_redis.Channel.unacked_key, kombu_redis.Channel.unacked_index_key)
_UNACKED, _UNACKED_INDEX = UNACKED_KEYS
_live: weakref.WeakSet[Any] = weakref.WeakSet()
#: Acknowledgements that came after their connection was lost; the LeaseKeeper delivers them.
_late_acks: deque[str] = deque()
#: Tags of the messages whose jobs this process computes, though the connection they came over was lost.
_orphans: set[str] = set()


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
        #: Tags whose record is gone from Redis already, and whose acknowledgement is still to come.
        self.settled: set[str] = set()
        #: Tags of the bulk messages that are held.
        self.bulk: set[str] = set()
        #: Messages that were taken since the last one of bulk.
        self.since_bulk = 0
        #: Tags of those with a time before which they do not run; they count as bulk no more.
        self.scheduled: set[str] = set()
        #: Tags of those whose jobs this process answers, connected or not.
        self.in_hand: set[str] = set()
        self._quick_ack = self._settled
        _live.add(self)

    def _settled(self, delivery_tag: str) -> None:
        self._forget(delivery_tag)
        self._dirty.add(delivery_tag)

    def _forget(self, delivery_tag: str) -> None:
        for tags in (self.bulk, self.scheduled, self.in_hand, _orphans):
            tags.discard(delivery_tag)

    def take(self, delivery_tag: str, is_bulk: bool) -> None:
        """Note a message that the fetch script took."""
        self.recorded.add(delivery_tag)
        self.since_bulk = 0 if is_bulk else self.since_bulk + 1
        if is_bulk:
            self.bulk.add(delivery_tag)

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
        if delivery_tag in self.settled:
            self.settled.discard(delivery_tag)
        elif self.connected:
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
        except ResponseError as error:
            _late_acks.extend(tags)
            logger.warning("Redis refuses acknowledgements: %s; trying again", error)
        except Exception:
            _late_acks.extend(tags)
            raise

    def let_go(self, delivery_tag: str) -> None:
        """Hold a message no more, whatever is recorded in Redis."""
        self.recorded.discard(delivery_tag)
        self.settled.discard(delivery_tag)
        self._forget(delivery_tag)
        if delivery_tag in self._delivered:
            self._quick_ack(delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        if not self.connected:
            # Not renewed any more: another worker gets it when the lease ends.
            self._quick_ack(delivery_tag)
        elif requeue and delivery_tag in self.in_hand:
            self._give_back(delivery_tag)
            self._quick_ack(delivery_tag)
        else:
            super().reject(delivery_tag, requeue=requeue)

    def _give_back(self, delivery_tag: str) -> None:
        """Put a message back where it was, since its job was not begun: next in line, and not marked as redelivered,
        which would make it a suspect. (Stock kombu marks it and puts it at the end; so it does with what a job itself
        gives back, or one that has killed a process of Celery's own pool.)"""

        def transaction(pipe: Any) -> None:
            record = pipe.hget(self.unacked_key, delivery_tag)
            pipe.multi()
            self._remove_from_indices(delivery_tag, pipe)
            if record:
                message, exchange, routing_key = loads(record)
                priority = self.channel._get_message_priority(message, reverse=False)
                for queue in self.channel._lookup(exchange, routing_key):
                    pipe.rpush(self.channel._q_for_pri(queue, priority), dumps(message))

        with self.channel.conn_or_acquire() as client:
            client.transaction(transaction, self.unacked_key)

    def give_back_unread(self, delivery_tags: Sequence[str]) -> None:
        """Put those of these messages back that are recorded, though this worker never got to know them."""
        with self.channel.conn_or_acquire() as client:
            records = client.hmget(self.unacked_key, delivery_tags)
        # The one that was taken first is next in line again.
        for tag, record in reversed(list(zip(delivery_tags, records, strict=True))):
            if record is None:
                continue
            try:
                self._give_back(tag)
            except malformed.UNREADABLE as error:
                self.park(tag, error)

    def restore_unacked(self, client: Any = None) -> None:
        """The connection was lost or is closed: as stock, but what is computed here stays this worker's. It would come
        again as a suspect, run twice, and after some losses count as what kills workers."""
        kept = self.in_hand & self._delivered.keys()
        _orphans.update(kept)
        for tag in kept:
            del self._delivered[tag]
        super().restore_unacked(client)

    def restore_by_tag(self, tag: Any, client: Any = None, leftmost: bool = False) -> None:
        """Stock, but a record that cannot be read is parked instead of stopping the sweep for good."""
        try:
            super().restore_by_tag(tag, client=client, leftmost=leftmost)
        except malformed.UNREADABLE as error:
            self.park(tag, error, client)

    def park(self, tag: Any, error: Exception, client: Any = None) -> None:
        """Move what is recorded of a message to its queue's dead letters; nothing, if it is another worker's by now."""
        with self.channel.conn_or_acquire(client) as redis:
            record = redis.hget(self.unacked_key, tag)
            if record is not None:
                raw, queue = malformed.split_record(record)
                malformed.park(redis, (self.unacked_key, self.unacked_index_key), queue, tag, raw, error)

    def bulk_room(self, interactive_share: float) -> int:
        """How many more bulk messages may be held, when so large a part of all places is kept for others (a place at
        least, if any)."""
        places = self._places
        kept = max(1, round(places * interactive_share)) if interactive_share else 0
        return max(1, places - kept) - len(self.bulk)

    def left_to_bulk(self) -> int:
        """How many of the places that are free belong to bulk, if any waits: it must not starve."""
        if not self.prefetch_count or self.since_bulk < max(_STREAK_LEAST, _STREAK * self._places):
            return 0
        return max(1, self._places // 2)

    @property
    def _places(self) -> int:
        # Celery makes room of its own for each job that waits for its time.
        places: int = max(1, self.prefetch_count - len(self.scheduled))
        return places

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


def keep(message: Any) -> None:
    """This process answers the job of a message, whatever becomes of the connection it came over."""
    qos = message.channel.qos
    if isinstance(qos, LeasedQoS):
        qos.in_hand.add(message.delivery_tag)


def let_go(message: Any) -> None:
    """Hold a message no more: it is delivered again when its lease ends."""
    qos = message.channel.qos
    if isinstance(qos, LeasedQoS):
        qos.let_go(message.delivery_tag)


def held_tag(message: Any) -> str:
    """The delivery tag of a message whose record is in Redis; "" when that is not known."""
    return str(message.delivery_tag) if isinstance(message.channel.qos, LeasedQoS) else ""


def acknowledged(message: Any) -> None:
    """Note that the record of a message is gone from Redis: its acknowledgement, which is to come, sends nothing."""
    message.channel.qos.settled.add(message.delivery_tag)


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
        tags = [tag for qos in list(_live) if qos.connected for tag in qos.held_tags()] + list(_orphans)
        if not tags and not _late_acks:
            return 0
        self._client = self._client or self._connect()
        if _late_acks:
            self._acknowledge_late()
        now_s = self._clock()
        for start in range(0, len(tags), _CHUNK):
            # XX: a message acknowledged meanwhile must not come back.
            self._client.zadd(_UNACKED_INDEX, dict.fromkeys(tags[start : start + _CHUNK], now_s), xx=True)
        return len(tags)

    def _acknowledge_late(self) -> None:
        tags: list[str] = []
        # The hub's thread appends meanwhile.
        while _late_acks:
            tags.append(_late_acks.popleft())
        try:
            _acknowledge(self._client, tags)
        except Exception:
            _late_acks.extendleft(reversed(tags))
            raise

    def stop(self) -> None:
        """End the thread, and deliver what is left of late acknowledgements."""
        self._stopped.set()
        if self.ident is not None:
            self.join(5.0)
        if _late_acks:
            with suppress(RedisError, OSError):
                self._client = self._client or self._connect()
                self._acknowledge_late()
