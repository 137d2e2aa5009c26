"""Broker transport: kombu's Redis transport, that takes many messages at once and can lose none.

The scripts and the waits are in ``fetching``; here is when they are used. One connection a waited-for list; lists of
the priorities in between are looked at whenever a wait ends. Touches kombu 5.7's ``redis.Channel``,
``MultiChannelPoller`` and ``_put_fanout``.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from typing import Any, Final
from uuid import uuid4

from kombu.asynchronous import set_event_loop
from kombu.transport import TRANSPORT_ALIASES
from kombu.transport import redis as kombu_redis
from kombu.utils.json import dumps
from redis.exceptions import RedisError, ResponseError

from workers.celery_hooks import malformed
from workers.celery_hooks.fetching import BULK_PRIORITY, FETCH_SCRIPT, WAIT_S, Fetch, Fetched, Lists, Wait
from workers.celery_hooks.leases import LeasedQoS

__all__ = ["TRANSPORT_NAME", "CortexTransport", "register_transport"]

logger = logging.getLogger(__name__)

#: The name that ``broker_transport`` takes.
TRANSPORT_NAME: Final = "cortex"
#: Most messages taken in one step: bounds the time a step holds the hub.
_FETCH_MAX: Final = 256
#: Steps before the hub looks at its other sockets.
_FETCHES_A_TURN: Final = 4
#: Part of a worker's room that bulk messages never take, so that interactive ones find a place at once.
_INTERACTIVE_SHARE: Final = 0.25
#: A wait that is this much overdue sits on a dead connection.
_OVERDUE_S: Final = 10.0
#: How long to leave a Redis alone that refuses a command (no memory, a read-only replica, a key of another type).
_BACK_OFF_S: Final = 1.0
#: Priorities whose lists are waited for: the first of each lane.
_WAITED_PRIORITIES: Final = (0, 9)
#: Of a worker's room, what may be promised to waits, and how much to one of them at most.
_PROMISED_SHARE: Final = 0.25
_PROMISED_MAX: Final = 8


class CortexChannel(kombu_redis.Channel):
    """Fetches in bulk under an event loop; under ``drain_events`` it is stock."""

    QoS = LeasedQoS

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._fetches = count()
        self._tag_prefix = f"{uuid4().hex[:16]}-"
        self._commands: Any = None
        self._fetch_script: Any = None
        #: Keys and priorities of the lists to wait for, and the waits by their keys.
        self._waited: list[tuple[str, int]] = []
        self._waits: dict[str, Wait] = {}
        #: Whether lists may hold messages that no wait would tell of.
        self._may_be_more = True
        self._lists = Lists(())
        #: Monotonic seconds before which nothing is fetched.
        self._resume_at_s = 0.0
        #: Who got the last message to many (a fanout exchange's); None while that is not known.
        self.receivers: int | None = None

    @contextmanager
    def conn_or_acquire(self, client: Any = None) -> Iterator[Any]:
        """Stock builds a redis-py client for each command, which costs more than the command. One serves them all."""
        if client is None:
            if self._commands is None:
                self._commands = self._create_client()
            client = self._commands
        yield client

    def _disconnect_pools(self) -> None:
        self._commands = self._fetch_script = None
        super()._disconnect_pools()

    def _put_fanout(self, exchange: str, message: Any, routing_key: str, **kwargs: Any) -> None:
        """Stock, but that it notes how many got the message."""
        if kwargs.get("_publish_batch") is not None:
            super()._put_fanout(exchange, message, routing_key, **kwargs)
            return
        payload = dumps(message)
        with self.conn_or_acquire() as client:
            topics = self._get_publish_topics(exchange, routing_key)
            self.receivers = sum(client.publish(topic, payload) for topic in topics)

    # --------------------------------------------------------------------------------- fetching

    def fetch_or_wait(self, loop: Any) -> None:
        """Called before each poll while there is room: take what there is, and see that all lists are waited for."""
        if not self._not_waited_for():
            self._drop_overdue()
            return
        if time.monotonic() < self._resume_at_s:
            return
        try:
            # Until the lists are empty or the worker is full. A list that still holds something ends its wait at once.
            for _ in range(_FETCHES_A_TURN):
                if not self._may_be_more or not self._room():
                    break
                self._may_be_more = self._fetch()
            self._wait(loop)
            if not self._room() or not self._bulk_room():
                # Then some lists have no wait that would tell.
                self._may_be_more = True
        except ResponseError as error:
            self._back_off(error)

    def _back_off(self, error: Exception) -> None:
        self._may_be_more = True
        self._resume_at_s = time.monotonic() + _BACK_OFF_S
        logger.warning("Redis refuses to hand out messages: %s; trying again", error)

    def _fetch(self) -> bool:
        """Take messages and deliver them; returns whether there may be more."""
        room = self._room()
        fetch = self._plan(room, min(self._bulk_room(), room))
        if not fetch.lists.of:
            return False
        if self._fetch_script is None:
            with self.conn_or_acquire() as client:
                self._fetch_script = client.register_script(FETCH_SCRIPT)
        reply = self._fetch_script(keys=fetch.keys(self._unacked), args=fetch.arguments(time.time()))
        taken = list(fetch.messages(reply))
        self._take(taken)
        return len(taken) == room

    @property
    def _unacked(self) -> tuple[str, str]:
        return self.unacked_key, self.unacked_index_key

    def _plan(self, room: int, bulk_room: int) -> Fetch:
        queues = self._queue_cycle.consume(len(self.active_queues))
        of = [(self._q_for_pri(queue, step), queue, step) for step in self.priority_steps for queue in queues]
        if self._lists.of != of:
            self._lists = Lists(of)
        return Fetch(self._lists, f"{self._tag_prefix}{next(self._fetches)}-", room, bulk_room)

    def _take(self, taken: Sequence[Fetched]) -> None:
        for queue, is_bulk, tag, raw in taken:
            if is_bulk:
                self.qos.bulk.add(tag)
            self._deliver(queue, tag, raw)
        if taken:
            self._queue_cycle.rotate(taken[-1].queue)

    def _room(self) -> int:
        """How many more messages this worker may take, beside those that waits were promised."""
        room = self.qos.can_consume_max_estimate()
        if room is None:
            return _FETCH_MAX
        return int(min(max(0, room - sum(fetch.room for fetch in self._promises())), _FETCH_MAX))

    def _bulk_room(self) -> int:
        """The same of bulk messages."""
        prefetch = self.qos.prefetch_count
        if not prefetch:
            return _FETCH_MAX
        share = max(1, prefetch - max(1, round(prefetch * _INTERACTIVE_SHARE)))
        held: set[str] = self.qos.bulk
        return int(max(0, share - len(held) - sum(fetch.bulk_room for fetch in self._promises())))

    def _promises(self) -> Iterator[Fetch]:
        return (wait.fetch for wait in self._waits.values() if wait.fetch is not None)

    def _deliver(self, queue: str, tag: str, raw: bytes) -> None:
        """Hand a message to its consumer. One that breaks its reading is parked: its neighbours come through."""
        self.qos.recorded.add(tag)
        try:
            message = json.loads(raw)
            message["properties"]["delivery_tag"] = tag
            self.connection._deliver(message, queue)
        except ResponseError as error:
            # Nothing is wrong with the message: it comes again when its lease ends.
            self.qos.let_go(tag)
            self._back_off(error)
        except (RedisError, OSError):
            raise
        except Exception as error:
            self.qos.let_go(tag)
            malformed.forget_request(raw, tag)
            with self.conn_or_acquire() as client:
                malformed.park(client, (self.unacked_key, self.unacked_index_key), queue, tag, raw, error)

    # ----------------------------------------------------------------------------------- waiting

    def _update_queue_cycle(self) -> None:
        super()._update_queue_cycle()
        queues = self.active_queues
        self._waited = [(self._q_for_pri(queue, step), step) for step in _WAITED_PRIORITIES for queue in queues]
        # A wait takes from the queues that were consumed when it began.
        self._close_waits()
        self._may_be_more = True

    def _waits_for(self, key: str) -> bool:
        wait = self._waits.get(key)
        return wait is not None and wait.since_s is not None

    def _not_waited_for(self) -> list[tuple[str, int]]:
        """The lists, and their priority, to begin a wait for: those of bulk only while there is room for it."""
        missing = [(key, priority) for key, priority in self._waited if not self._waits_for(key)]
        if missing and not self._bulk_room():
            return [(key, priority) for key, priority in missing if priority < BULK_PRIORITY]
        return missing

    def _wait(self, loop: Any) -> None:
        """Begin a wait for each list that has none, and let the loop tell when it ends."""
        for key, priority in self._not_waited_for():
            if not self._room():
                # The rest is promised to waits that stand. A look would end at once, again and again.
                break
            wait = self._waits.get(key)
            if wait is None:
                # Not of the pool: its size is for commands, these stay for good.
                connection = self.pool.connection_class(**self.pool.connection_kwargs)
                wait = self._waits[key] = Wait(key, connection)
                loop.add_reader(connection._sock, self._on_wait_over, key)
            wait.begin(self._promise(priority, len(self._waited)), self._unacked)

    def _promise(self, priority: int, waits: int) -> Fetch | None:
        """What one of so many waits may take when it ends; None where the room is too small to divide."""
        prefetch = self.qos.prefetch_count
        most = int(prefetch * _PROMISED_SHARE) // waits if prefetch else _PROMISED_MAX
        room = min(most, _PROMISED_MAX, self._room())
        if priority < BULK_PRIORITY:
            return self._plan(room, 0) if room else None
        room = min(room, self._bulk_room())
        return self._plan(room, room) if room else None

    def _on_wait_over(self, key: str) -> None:
        """A list holds something, or the wait timed out."""
        wait = self._waits.get(key)
        if wait is None:
            return
        try:
            taken, more, refusal = wait.end()
        except self.connection_errors:
            self._close_waits()
            raise
        self._may_be_more = self._may_be_more or more
        self._take(taken)
        if refusal is not None:
            self._back_off(refusal)

    def _drop_overdue(self) -> None:
        """A half-open connection never becomes readable: give it up, so that the worker connects anew."""
        for wait in self._waits.values():
            if wait.since_s is None or time.monotonic() - wait.since_s <= WAIT_S + _OVERDUE_S:
                continue
            # After a stall of this process the answer lies there and was only not read yet.
            if not kombu_redis._socket_readable(wait.connection._sock):
                self._close_waits()
                raise ConnectionError("Redis has not answered a wait for messages; connecting anew")

    def _close_waits(self) -> None:
        """End all waits. What one of them took and nobody has read goes back to its queue."""
        promises = list(self._promises())
        waits, self._waits = self._waits, {}
        for wait in waits.values():
            self.connection.cycle.forget(wait.connection)
            wait.connection.disconnect()
        if promises:
            # If Redis is away: they come again when their leases end.
            with suppress(ResponseError, *self.connection_errors):
                self.qos.give_back_unread([tag for fetch in promises for tag in fetch.tags()])

    def close(self) -> None:
        if not self.closed:
            self._close_waits()
            with suppress(*self.connection_errors):
                self.qos.flush_acks()
        super().close()


class CortexPoller(kombu_redis.MultiChannelPoller):
    """Stock, but with an event loop its channels fetch instead of BRPOP."""

    loop: Any = None

    def on_poll_start(self) -> None:
        if self.loop is not None:
            # Of every channel: one that consumes no queue any more still acknowledges.
            for channel in self._channels:
                channel.qos.flush_acks()
        super().on_poll_start()

    def _register_BRPOP(self, channel: CortexChannel) -> None:  # noqa: N802 (kombu's name)
        if self.loop is None:
            super()._register_BRPOP(channel)
        else:
            channel.fetch_or_wait(self.loop)

    def forget(self, connection: Any) -> None:
        """Take a waiting connection out of the event loop."""
        sock = getattr(connection, "_sock", None)
        if self.loop is not None and sock is not None:
            self.loop.remove(sock)


class CortexTransport(kombu_redis.Transport):
    Channel = CortexChannel

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cycle = CortexPoller()

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        self.cycle.loop = loop
        # A hub that was reset after a connection was lost is nobody's any more; events ask for it (see ``events``).
        set_event_loop(loop)
        super().register_with_event_loop(connection, loop)


def register_transport() -> str:
    """Make kombu know the transport; returns its name."""
    TRANSPORT_ALIASES[TRANSPORT_NAME] = f"{__name__}:CortexTransport"
    return TRANSPORT_NAME
