"""Taking messages: the script that pops and records them in one step, and a wait for the next ones that takes them too.

Stock kombu pops one message with BRPOP and records it as unacknowledged in a second round trip; a crash of either
side in between loses it (kombu#305). Entries in ``unacked`` and ``unacked_index`` stay kombu's own, so stock workers
restore them and the other way round.

A wait is ``BLMOVE key key RIGHT RIGHT``, which blocks until a list holds something and moves its last element onto
itself: a look without a pop. The script travels right behind it on the same connection, so Redis runs it at the moment
the wait ends: the message that ends a wait arrives together with its record, without another round trip. Needs Redis
6.2 (BLMOVE, RPOP with a count).

Touches ``_sock`` and ``_parser`` of redis-py's connection.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import hiredis
import redis
from redis.exceptions import InvalidResponse, NoScriptError, ResponseError

from cortex_tasks.lines import packed

__all__ = ["BULK_PRIORITY", "FETCH_SCRIPT", "WAIT_S", "Fetch", "Fetched", "Lists", "Wait"]

#: Messages of this priority and above are bulk (see ``codec.lane_of``).
BULK_PRIORITY: Final = 6
#: A wait ends by itself after this long, and all lists are looked at.
WAIT_S: Final = 1
_READ_BYTES: Final = 65_536
_MORE: Final = object()

# KEYS: unacked hash, unacked index, lists in order of service.
# ARGV: room, room for bulk, what interactive lists leave of the room to bulk that waits, number of interactive lists
# (they come first), time of the claim (epoch s), tag prefix, then the JSON-encoded queue name of each list.
# Returns a flat list: number of the list (from 0), tag, message, ...
# pcall: a key that holds no list must not abort the script with messages popped and not recorded.
FETCH_SCRIPT: Final = """
local room, bulk, left, interactive = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local out, records, scores, waiting = {}, {}, {}, 0
for i = 3 + interactive, left > 0 and #KEYS or 0 do
  local length = redis.pcall('LLEN', KEYS[i])
  if type(length) == 'number' then waiting = waiting + length end
end
left = math.min(left, waiting)
for i = 3, #KEYS do
  local is_bulk = i - 2 > interactive
  local take = is_bulk and math.min(room, bulk) or room - left
  local messages = take > 0 and redis.pcall('RPOP', KEYS[i], take)
  if messages and not messages.err then
    for _, message in ipairs(messages) do
      local tag = ARGV[6] .. #out / 3
      room = room - 1
      if is_bulk then bulk = bulk - 1 end
      records[#records + 1] = tag
      records[#records + 1] = '[' .. message .. ',"",' .. ARGV[i + 4] .. ']'
      scores[#scores + 1] = ARGV[5]
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
_FETCH_SHA: Final = hashlib.sha1(FETCH_SCRIPT.encode(), usedforsecurity=False).hexdigest()


class Lists:
    """The lists of some queues, in order of service: priority by priority, in each of them queue by queue."""

    __slots__ = ("interactive", "keys", "names", "of")

    def __init__(self, of: Sequence[tuple[str, str, int]]) -> None:
        """``of``: key, queue and priority of each list."""
        self.of = of
        self.keys = [key for key, _, _ in of]
        self.names = [json.dumps(queue) for _, queue, _ in of]
        self.interactive = sum(priority < BULK_PRIORITY for _, _, priority in of)


class Fetched(NamedTuple):
    """A message that was taken and recorded."""

    queue: str
    is_bulk: bool
    tag: str
    raw: bytes


class Fetch(NamedTuple):
    """One call of the script: what it may take, and what its reply says."""

    lists: Lists
    #: Of the tags that it gives; no other call's.
    tag_prefix: str
    #: Messages it may take at most, and how many of them may be bulk.
    room: int
    bulk_room: int
    #: Of the room, what is bulk's if any waits.
    left_to_bulk: int = 0

    def keys(self, unacked: Sequence[str]) -> list[str]:
        """``unacked``: kombu's hash and index."""
        return [*unacked, *self.lists.keys]

    def arguments(self, claimed_s: float) -> list[Any]:
        """``claimed_s``: the epoch seconds at which the messages' leases begin."""
        rooms = (self.room, self.bulk_room, self.left_to_bulk)
        return [*rooms, self.lists.interactive, claimed_s, self.tag_prefix, *self.lists.names]

    def tags(self) -> list[str]:
        """All that it may give."""
        return [f"{self.tag_prefix}{number}" for number in range(self.room)]

    def messages(self, reply: Sequence[Any]) -> list[Fetched]:
        of = self.lists.of
        found = []
        for at in range(0, len(reply), 3):
            _, queue, priority = of[reply[at]]
            found.append(Fetched(queue, priority >= BULK_PRIORITY, reply[at + 1].decode(), reply[at + 2]))
        return found


class Wait:
    """A connection that waits for one list, and takes messages when the wait ends.

    redis-py opens and closes it; the few steps in between are taken here, since they lie on each message's way.
    """

    def __init__(self, key: str, connection: Any, unacked: Sequence[str]) -> None:
        """``connection``: redis-py's, for nothing else; ``unacked``: kombu's hash and index."""
        self.key = key
        self.connection = connection
        connection.connect()
        self.sock = connection._sock
        self._reader: Any = hiredis.Reader(
            protocolError=InvalidResponse, replyError=connection._parser.parse_error, notEnoughData=_MORE
        )
        self._look = packed("BLMOVE", key, key, "RIGHT", "RIGHT", WAIT_S)
        self._unacked = unacked
        #: Since when it waits (monotonic seconds); None: it does not.
        self.since_s: float | None = None
        #: What is taken when the wait ends; None: nothing, it is only a look.
        self.fetch: Fetch | None = None

    def begin(self, fetch: Fetch | None) -> None:
        """Raises redis-py's ConnectionError."""
        commands = self._look
        if fetch is not None:
            keys = fetch.keys(self._unacked)
            # The script may run as late as the wait ends: no lease is shorter for that.
            arguments = fetch.arguments(time.time() + WAIT_S)
            commands += packed("EVALSHA", _FETCH_SHA, len(keys), *keys, *arguments)
        try:
            self.sock.sendall(commands)
        except OSError as error:
            raise _lost(error) from error
        self.fetch, self.since_s = fetch, time.monotonic()

    def end(self) -> tuple[list[Fetched], bool, ResponseError | None]:
        """Read what came: messages, whether there may be more, and what Redis refused, if anything.

        Raises redis-py's ConnectionError; what was promised stays noted then, since it may have been taken.
        """
        look = self._read()
        refusal = look if isinstance(look, ResponseError) else None
        # After a look whose time ran out as well: the lists that nobody waits for are to be looked at.
        taken: list[Fetched] = []
        more = True
        if self.fetch is not None:
            reply = self._read()
            if not isinstance(reply, ResponseError):
                taken = self.fetch.messages(reply)
                more = len(taken) == self.fetch.room
            elif not isinstance(reply, NoScriptError):
                refusal = refusal or reply
        self.fetch = self.since_s = None
        return taken, more, refusal

    def _read(self) -> Any:
        """The next reply; what Redis refuses is a ResponseError. Raises ConnectionError, also of one that says so (a
        Redis that is loading its data, or wants a password)."""
        while True:
            reply = self._reader.gets()
            if reply is _MORE:
                self._reader.feed(self._receive())
            elif isinstance(reply, redis.ConnectionError):
                raise reply
            elif not isinstance(reply, hiredis.PushNotification):
                return reply

    def _receive(self) -> bytes:
        try:
            received: bytes = self.sock.recv(_READ_BYTES)
        except OSError as error:
            raise _lost(error) from error
        if not received:
            raise _lost("closed by Redis")
        return received


def _lost(why: object) -> redis.ConnectionError:
    return redis.ConnectionError(f"the connection that waits for messages was lost: {why}")
