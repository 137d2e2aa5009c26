"""Broker transport: kombu's Redis transport, that takes many messages at once and can lose none.

Stock kombu pops one message with BRPOP and records it as unacknowledged in a second round trip; a crash of either
side in between loses it (kombu#305). Here one script pops as many messages as the worker has room for and records
them in the same step. An idle channel waits with ``BLMOVE key key RIGHT RIGHT``, which blocks until a list holds
something and moves its last element onto itself: a look without a pop. One connection a waited-for list; lists of
the priorities in between are looked at whenever a wait times out.

Entries in ``unacked`` and ``unacked_index`` stay kombu's own, so stock workers restore them and the other way round.
Needs Redis 6.2 (BLMOVE, RPOP with a count). Touches kombu 5.7's ``redis.Channel``,
``MultiChannelPoller`` and ``_put_fanout``.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from typing import Any, Final
from uuid import uuid4

from kombu.transport import TRANSPORT_ALIASES
from kombu.transport import redis as kombu_redis
from kombu.utils.json import dumps
from redis.exceptions import RedisError, ResponseError

from workers.celery_hooks import malformed
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
#: Messages of this priority and above are bulk (see ``codec.lane_of``).
_BULK_PRIORITY: Final = 6
#: A wait ends by itself after this long, and all lists are looked at.
_WAIT_S: Final = 1
#: A wait that is this much overdue sits on a dead connection.
_OVERDUE_S: Final = 10.0
#: How long to leave a Redis alone that refuses a command (no memory, a read-only replica, a key of another type).
_BACK_OFF_S: Final = 1.0
#: Priorities whose lists are waited for: the first of each lane.
_WAITED_PRIORITIES: Final = (0, 9)

# KEYS: unacked hash, unacked index, lists in order of service.
# ARGV: room, room for bulk, number of interactive lists (they come first), now (epoch s), tag prefix, then the
# JSON-encoded queue name of each list.
# Returns a flat list: number of the list (from 0), tag, message, ...
# pcall: a key that holds no list must not abort the script with messages popped and not recorded.
_FETCH = """
local room, bulk, interactive, out = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), {}
local records, scores = {}, {}
for i = 3, #KEYS do
  local is_bulk = i - 2 > interactive
  local take = is_bulk and math.min(room, bulk) or room
  local messages = take > 0 and redis.pcall('RPOP', KEYS[i], take)
  if messages and not messages.err then
    for _, message in ipairs(messages) do
      local tag = ARGV[5] .. #out
      room = room - 1
      if is_bulk then bulk = bulk - 1 end
      records[#records + 1] = tag
      records[#records + 1] = '[' .. message .. ',"",' .. ARGV[i + 3] .. ']'
      scores[#scores + 1] = ARGV[4]
      scores[#scores + 1] = tag
      out[#out + 1] = i - 3
      out[#out + 1] = tag
      out[#out + 1] = message
    end
  end
end
if #records > 0 then
  redis.call('HSET', KEYS[1], unpack(records))
  redis.call('ZADD', KEYS[2], unpack(scores))
end
return out
"""


class CortexChannel(kombu_redis.Channel):
    """Fetches in bulk under an event loop; under ``drain_events`` it is stock."""

    QoS = LeasedQoS

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._fetches = count()
        self._tag_prefix = f"{uuid4().hex[:16]}-"
        self._commands: Any = None
        self._fetch_script: Any = None
        #: list key -> connection that waits for it, and since when (monotonic seconds; None: not waiting)
        self._waits: dict[str, Any] = {}
        self._waiting_since_s: dict[str, float | None] = {}
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
        """Called before each poll while there is room: take what there is, or see that all lists are waited for."""
        if self._all_waited_for():
            self._drop_overdue()
            return
        if time.monotonic() < self._resume_at_s:
            return
        try:
            # Until the lists are empty or the worker is full. A list that still holds something ends its wait at once.
            for _ in range(_FETCHES_A_TURN):
                if not self._fetch() or not self.qos.can_consume():
                    break
            if self.qos.can_consume():
                self._wait(loop)
        except ResponseError as error:
            self._back_off(error)

    def _back_off(self, error: Exception) -> None:
        self._resume_at_s = time.monotonic() + _BACK_OFF_S
        logger.warning("Redis refuses to hand out messages: %s; trying again", error)

    def _fetch(self) -> bool:
        """Take messages and deliver them; returns whether there may be more."""
        room = min(self.qos.can_consume_max_estimate() or _FETCH_MAX, _FETCH_MAX)
        bulk_room = min(self._bulk_room(), room)
        queues = self._queue_cycle.consume(len(self.active_queues))
        if not queues:
            return False
        if self._fetch_script is None:
            with self.conn_or_acquire() as client:
                self._fetch_script = client.register_script(_FETCH)
        lists = [(self._q_for_pri(queue, step), queue, step) for step in self.priority_steps for queue in queues]
        interactive = sum(step < _BULK_PRIORITY for _, _, step in lists)
        got = self._fetch_script(
            keys=[self.unacked_key, self.unacked_index_key, *(key for key, _, _ in lists)],
            args=[
                room,
                bulk_room,
                interactive,
                time.time(),
                f"{self._tag_prefix}{next(self._fetches)}-",
                *(json.dumps(queue) for _, queue, _ in lists),
            ],
        )
        for at in range(0, len(got), 3):
            _, queue, priority = lists[got[at]]
            tag = got[at + 1].decode()
            if priority >= _BULK_PRIORITY:
                self.qos.bulk.add(tag)
            self._deliver(queue, tag, got[at + 2])
        if got:
            self._queue_cycle.rotate(lists[got[-3]][1])
        return len(got) // 3 == room

    def _bulk_room(self) -> int:
        """How many more bulk messages this worker may hold."""
        prefetch = self.qos.prefetch_count
        if not prefetch:
            return _FETCH_MAX
        share = max(1, prefetch - max(1, round(prefetch * _INTERACTIVE_SHARE)))
        held: set[str] = self.qos.bulk
        return int(max(0, share - len(held)))

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

    def _waited_keys(self) -> list[str]:
        """The lists to wait for: those of bulk only while there is room for it."""
        priorities = [p for p in _WAITED_PRIORITIES if p < _BULK_PRIORITY or self._bulk_room() > 0]
        return [self._q_for_pri(queue, priority) for priority in priorities for queue in self.active_queues]

    def _all_waited_for(self) -> bool:
        since = self._waiting_since_s
        return bool(since) and all(since.get(key) is not None for key in self._waited_keys())

    def _wait(self, loop: Any) -> None:
        """Send a wait for each list that has none, and let the loop tell when it ends."""
        for key in self._waited_keys():
            if self._waiting_since_s.get(key) is not None:
                continue
            connection = self._waits.get(key)
            if connection is None:
                # Not of the pool: its size is for commands, these stay for good.
                connection = self._waits[key] = self.pool.connection_class(**self.pool.connection_kwargs)
                connection.connect()
            connection.send_command("BLMOVE", key, key, "RIGHT", "RIGHT", _WAIT_S, check_health=False)
            self._waiting_since_s[key] = time.monotonic()
            loop.add_reader(connection._sock, self._on_wait_over, key)

    def _on_wait_over(self, key: str) -> None:
        """A list holds something, or the wait timed out: in both cases the next turn looks."""
        connection = self._waits.get(key)
        if connection is None:
            return
        try:
            connection.read_response()
        except ResponseError as error:
            self._back_off(error)
        except self.connection_errors:
            self._close_waits()
            raise
        self._waiting_since_s[key] = None

    def _drop_overdue(self) -> None:
        """A half-open connection never becomes readable: give it up, so that the worker connects anew."""
        for key, since_s in self._waiting_since_s.items():
            if since_s is None or time.monotonic() - since_s <= _WAIT_S + _OVERDUE_S:
                continue
            # After a stall of this process the answer lies there and was only not read yet.
            if not kombu_redis._socket_readable(self._waits[key]._sock):
                self._close_waits()
                raise ConnectionError("Redis has not answered a wait for messages; connecting anew")

    def _close_waits(self) -> None:
        waits, self._waits = self._waits, {}
        self._waiting_since_s.clear()
        for connection in waits.values():
            self.connection.cycle.forget(connection)
            connection.disconnect()

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
        super().register_with_event_loop(connection, loop)


def register_transport() -> str:
    """Make kombu know the transport; returns its name."""
    TRANSPORT_ALIASES[TRANSPORT_NAME] = f"{__name__}:CortexTransport"
    return TRANSPORT_NAME
