"""Broker transport: kombu's Redis transport, that takes many messages at once and can lose none.

The scripts and the waits are in ``fetching``; here is when they are used. One connection a list. Touches kombu
5.7's ``redis.Channel``, ``MultiChannelPoller`` and its ``_in_protected_read``, ``_put_fanout``, and the hub's
``_ready`` and ``_waker``.
"""

from __future__ import annotations

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
from workers.celery_hooks.reading import PlainMessage, read_json

__all__ = ["TRANSPORT_NAME", "CortexTransport", "register_transport"]

logger = logging.getLogger(__name__)

#: The name that ``broker_transport`` takes.
TRANSPORT_NAME: Final = "cortex"
#: Most messages taken in one step: bounds the time a step holds the hub.
_FETCH_MAX: Final = 256
#: Steps before the hub looks at its other sockets.
_FETCHES_A_TURN: Final = 4
#: A wait that is this much overdue sits on a dead connection.
_OVERDUE_S: Final = 10.0
#: How long to leave a Redis alone that refuses a command (no memory, a read-only replica, a key of another type).
_BACK_OFF_S: Final = 1.0
#: Priorities of Cortex' own messages, one a lane. A wait for a list of another one only looks.
_LANES: Final = (0, 9)
#: Orders of the queues that are kept.
_ORDERS: Final = 64
#: Of a worker's room, what may be promised to waits, and how much to one of them at most.
_PROMISED_SHARE: Final = 0.25
_PROMISED_MAX: Final = 8


class CortexChannel(kombu_redis.Channel):
    """Fetches in bulk under an event loop; under ``drain_events`` it is stock."""

    QoS = LeasedQoS
    Message = PlainMessage
    from_transport_options = (*kombu_redis.Channel.from_transport_options, "interactive_share")
    #: Part of a worker's room that bulk messages never take, so that interactive ones find a place at once.
    interactive_share = 0.25

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._fetches = count()
        self._tag_prefix = f"{uuid4().hex[:16]}-"
        self._commands: Any = None
        self._fetch_script: Any = None
        #: Keys and priorities of the lists to wait for.
        self.waited: list[tuple[str, int]] = []
        #: By their lists' keys.
        self._waits: dict[str, Wait] = {}
        #: Whether lists may hold messages that no wait would tell of.
        self._may_be_more = True
        #: By the queues' order of service.
        self._lists: dict[tuple[str, ...], Lists] = {}
        #: Monotonic seconds before which nothing is fetched.
        self._resume_at_s = 0.0
        #: Messages so far.
        self._delivered = 0
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

    def fetch_or_wait(self, loop: Any) -> bool:
        """Called before each poll while there is room: take what there is, and see that all lists are waited for.

        Returns whether a message was delivered.
        """
        delivered = self._delivered
        room, bulk_room = self._rooms()
        if not self._not_waited_for(bulk_room):
            self._drop_overdue()
            return False
        if time.monotonic() < self._resume_at_s:
            return False
        try:
            # Until the lists are empty or the worker is full. A list that still holds something ends its wait at once.
            for _ in range(_FETCHES_A_TURN):
                if not self._may_be_more or not room:
                    break
                self._may_be_more = self._fetch(room, bulk_room)
                room, bulk_room = self._rooms()
            room, bulk_room = self._wait(loop, room, bulk_room)
            if not room or not bulk_room:
                # Then some lists have no wait that would tell.
                self._may_be_more = True
        except ResponseError as error:
            self._back_off(error)
        return self._delivered > delivered

    def _back_off(self, error: Exception) -> None:
        self._may_be_more = True
        self._resume_at_s = time.monotonic() + _BACK_OFF_S
        logger.warning("Redis refuses to hand out messages: %s; trying again", error)

    def _fetch(self, room: int, bulk_room: int) -> bool:
        """Take messages and deliver them; returns whether there may be more."""
        bulk_room = min(bulk_room, room)
        fetch = self._plan(room, bulk_room)._replace(left_to_bulk=min(bulk_room, self.qos.left_to_bulk()))
        if not fetch.lists.of:
            return False
        if self._fetch_script is None:
            with self.conn_or_acquire() as client:
                self._fetch_script = client.register_script(FETCH_SCRIPT)
        reply = self._fetch_script(keys=fetch.keys(self._unacked), args=fetch.arguments(time.time()))
        taken = fetch.messages(reply)
        self._take(taken)
        return len(taken) == room

    @property
    def _unacked(self) -> tuple[str, str]:
        return self.unacked_key, self.unacked_index_key

    def _plan(self, room: int, bulk_room: int) -> Fetch:
        queues = tuple(self._queue_cycle.items)
        lists = self._lists.get(queues)
        if lists is None:
            if len(self._lists) >= _ORDERS:
                # Of n queues there are n! orders.
                self._lists.clear()
            of = [(self._q_for_pri(queue, step), queue, step) for step in self.priority_steps for queue in queues]
            lists = self._lists[queues] = Lists(of)
        return Fetch(lists, f"{self._tag_prefix}{next(self._fetches)}-", room, bulk_room)

    def _take(self, taken: Sequence[Fetched]) -> None:
        self._delivered += len(taken)
        for queue, is_bulk, tag, raw in taken:
            self._deliver(queue, is_bulk, tag, raw)
        if taken:
            self._queue_cycle.rotate(taken[-1].queue)

    def _rooms(self) -> tuple[int, int]:
        """How many more messages this worker may take, beside those that waits were promised, and how many of bulk."""
        qos = self.qos
        room = qos.can_consume_max_estimate()
        if room is None:
            return _FETCH_MAX, _FETCH_MAX
        promised = self._promises()
        room = max(0, room - sum([fetch.room for fetch in promised]))
        bulk_room = max(0, qos.bulk_room(self.interactive_share) - sum([fetch.bulk_room for fetch in promised]))
        return min(room, _FETCH_MAX), bulk_room

    def _promises(self) -> list[Fetch]:
        return [wait.fetch for wait in self._waits.values() if wait.fetch is not None]

    def _deliver(self, queue: str, is_bulk: bool, tag: str, raw: bytes) -> None:
        """Hand a message to its consumer. One that breaks its reading is refused: its neighbours come through."""
        qos = self.qos
        qos.take(tag, is_bulk)
        try:
            message = read_json(raw)
            message["properties"]["delivery_tag"] = tag
            headers = message.get("headers")
            if isinstance(headers, dict) and headers.get("eta"):
                qos.scheduled.add(tag)
                qos.bulk.discard(tag)
            self.connection._deliver(message, queue)
        except Exception as error:
            self.refuse(tag, error)

    def refuse(self, tag: str, error: Exception) -> None:
        """Park a message whose handing on raised an error. Raises an error that tells of the connection, not of it."""
        if isinstance(error, RedisError | OSError) and not isinstance(error, ResponseError):
            raise error
        self.qos.let_go(tag)
        try:
            if isinstance(error, ResponseError):
                raise error
            malformed.forget_request(tag)
            self.qos.park(tag, error)
        except ResponseError as refusal:
            # It comes again when its lease ends.
            self._back_off(refusal)

    # ----------------------------------------------------------------------------------- waiting

    def _update_queue_cycle(self) -> None:
        super()._update_queue_cycle()
        self._lists = {}
        queues = self.active_queues
        steps = sorted(self.priority_steps, key=lambda step: step not in _LANES)
        self.waited = [(self._q_for_pri(queue, step), step) for step in steps for queue in queues]
        # A wait takes from the queues that were consumed when it began.
        self._close_waits()
        self._may_be_more = True

    def _not_waited_for(self, bulk_room: int) -> list[tuple[str, int]]:
        """The lists, and their priority, to begin a wait for: those of bulk only while there is room for it."""
        waits = self._waits
        return [
            (key, priority)
            for key, priority in self.waited
            if (bulk_room or priority < BULK_PRIORITY) and (key not in waits or waits[key].since_s is None)
        ]

    def _wait(self, loop: Any, room: int, bulk_room: int) -> tuple[int, int]:
        """Begin a wait for each list that has none, and let the loop tell when it ends; returns the room that is left.

        What is promised to waits is as good as taken.
        """
        most = self._promised_most(sum(priority in _LANES for _, priority in self.waited))
        for key, priority in self._not_waited_for(bulk_room):
            if not room:
                # The rest is promised to waits that stand. A look would end at once, again and again.
                break
            wait = self._waits.get(key)
            if wait is None:
                # Not of the pool: its size is for commands, these stay for good.
                connection = self.pool.connection_class(**self.pool.connection_kwargs)
                wait = self._waits[key] = Wait(key, connection, self._unacked)
                loop.add_reader(wait.sock, self._on_wait_over, key)
            is_bulk = priority >= BULK_PRIORITY
            promised = min(most, room, bulk_room if is_bulk else room) if priority in _LANES else 0
            promised_bulk = promised if is_bulk else 0
            # A room too small to divide: a wait that only looks.
            wait.begin(self._plan(promised, promised_bulk) if promised else None)
            if self.qos.prefetch_count:
                room, bulk_room = room - promised, bulk_room - promised_bulk
        return room, bulk_room

    def _promised_most(self, waits: int) -> int:
        """What one of so many waits may take when it ends."""
        prefetch = self.qos.prefetch_count
        return min(int(prefetch * _PROMISED_SHARE) // waits, _PROMISED_MAX) if prefetch else _PROMISED_MAX

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
            if not kombu_redis._socket_readable(wait.sock):
                self._close_waits()
                raise ConnectionError("Redis has not answered a wait for messages; connecting anew")

    def _close_waits(self) -> None:
        """End all waits. What one of them took and nobody has read goes back to its queue."""
        promises = self._promises()
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
    #: Whether messages were delivered before the poll that comes.
    delivered = False

    def on_poll_start(self) -> None:
        """Stock, less what only matters where BRPOP is used. Called before each poll."""
        self.delivered = False
        if self.loop is None or self._in_protected_read:
            # ``drain_events``, as Celery's mingle also calls it while the loop stands still.
            for channel in self._channels:
                channel.qos.flush_acks()
            super().on_poll_start()
            return
        for channel in self._channels:
            # One that consumes no queue any more still acknowledges.
            channel.qos.flush_acks()
            if channel.waited and channel.qos.can_consume():
                self.delivered |= channel.fetch_or_wait(self.loop)
            # None once its connection is lost.
            if channel.active_fanout_queues and not channel._in_listen:
                self._register_LISTEN(channel)

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
        others = {tick for tick in loop.on_tick if not (isinstance(tick, _Tick) and tick.is_over)}
        super().register_with_event_loop(connection, loop)
        # kombu's own tick adds its sockets to the poller anew each time, which refuses each of them.
        loop.on_tick &= others
        loop.on_tick.add(_Tick(self, loop))


class _Tick:
    """What a transport does before each poll of a hub."""

    def __init__(self, transport: CortexTransport, loop: Any) -> None:
        self._transport, self._loop = transport, loop

    @property
    def is_over(self) -> bool:
        """Whether the transport's connection was closed: kombu leaves its tick to the hub."""
        return not self._transport.cycle._channels

    def __call__(self) -> None:
        loop, cycle = self._loop, self._transport.cycle
        cycle.on_poll_start()
        readers = loop.readers
        for fd in cycle.fds:
            # A new socket is in the poller already, by ``_register``, perhaps under the number of one that was closed.
            if fd not in readers or readers[fd][1] != (fd,):
                loop.add_reader(fd, self._transport.on_readable, fd)
        if cycle.delivered:
            # A pool that looks here whether it has jobs to hand out (prefork) may have looked before they came: they
            # would lie there until the poll ends, a second mostly.
            for tick in loop.on_tick.copy():
                if not isinstance(tick, _Tick):
                    tick()
            if loop._ready:
                # What was called soon meanwhile (jobs that expired are acknowledged so) makes room for the next ones.
                loop._waker.wake()


def register_transport() -> str:
    """Make kombu know the transport; returns its name."""
    TRANSPORT_ALIASES[TRANSPORT_NAME] = f"{__name__}:CortexTransport"
    return TRANSPORT_NAME
