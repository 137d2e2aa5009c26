"""Result backend: the results of a batch in one round trip, and one message a client that carries or announces them.

Where broker and results are one Redis, a plain job's claim on its message ends in the same script that stores its
answer: there is no moment at which the one has happened and the other has not.

Touches ``RedisBackend._store_result`` (celery 5.7): the buffered path leaves out its GET before a success, since a
second run of a job that succeeds gives the same answer. What is no success is looked up as stock does it, all of a
batch in one round trip, so that a late duplicate that fails overwrites none.
"""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple, Protocol

from celery import states
from celery.backends.redis import RedisBackend

from cortex_tasks.codec import REPLY_MAGIC, SERIALIZER, Answer, dumps, is_reply_channel, result_key
from cortex_tasks.errors import InferenceFailed
from cortex_tasks.lines import ScriptLine
from workers.celery_hooks.leases import UNACKED_KEYS

__all__ = ["BatchedRedisBackend"]

logger = logging.getLogger(__name__)


#: A longer result is stored by plain commands and only announced: a script would hold Redis up with copying it.
_SCRIPTED_BYTES: Final = 256 * 1024
#: Of one call of the script.
_CALL_RESULTS: Final = 512
_CALL_BYTES: Final = 4 * 1024 * 1024
#: A longer result is announced by its id, and its client fetches it: a subscription is no place for megabytes.
_CARRIED_BYTES: Final = 64 * 1024

# Store results, publish each on the channel of its key (where a stock AsyncResult listens), and put the results of a
# client's jobs into one message on its reply channel, as ``codec.read_reply`` reads it; then acknowledge the jobs'
# messages.
# KEYS: the results' keys, then kombu's unacked hash and index if any result has a delivery tag. ARGV: magic, length of
# the keys' prefix, longest result that is carried (bytes), number of results, then for each: seconds to live (0: for
# ever), reply channel ("": none), delivery tag ("": none), result.
# Returns the first refusal of a publication (a user of an ACL may lack the channel), or "", and how many messages were
# acknowledged.
_STORE = """
local clients, order, tags, refused, count, acknowledged = {}, {}, {}, '', tonumber(ARGV[4]), 0
local function publish(channel, message)
  local reply = redis.pcall('PUBLISH', channel, message)
  if type(reply) == 'table' and reply.err and refused == '' then refused = reply.err end
end
for i = 1, count do
  local key = KEYS[i]
  local ttl, channel, tag, result = ARGV[4 * i + 1], ARGV[4 * i + 2], ARGV[4 * i + 3], ARGV[4 * i + 4]
  if tag ~= '' then tags[#tags + 1] = tag end
  if ttl == '0' then
    redis.call('SET', key, result)
  else
    redis.call('SET', key, result, 'EX', ttl)
  end
  publish(key, result)
  if channel ~= '' then
    local parts = clients[channel]
    if not parts then
      parts = {ARGV[1]}
      clients[channel] = parts
      order[#order + 1] = channel
    end
    local id = string.sub(key, tonumber(ARGV[2]) + 1)
    local carried = #result <= tonumber(ARGV[3]) and result or ''
    parts[#parts + 1] = struct.pack('<I4I4', #id, #carried)
    parts[#parts + 1] = id
    parts[#parts + 1] = carried
  end
end
for _, channel in ipairs(order) do
  publish(channel, table.concat(clients[channel]))
end
if #tags > 0 then
  acknowledged = redis.call('HDEL', KEYS[count + 1], unpack(tags))
  redis.call('ZREM', KEYS[count + 2], unpack(tags))
end
return {refused, acknowledged}
"""


class _Stored(NamedTuple):
    key: str
    payload: bytes | str
    expires_s: int | None
    task_id: str
    reply_to: str | None
    #: Delivery tag of the message that is acknowledged along with it; "": none is.
    tag: str = ""
    state: str = states.SUCCESS


class Rider(Protocol):
    """``workers.ledger.Ledger``, as far as the backend knows it."""

    @property
    def waiting(self) -> bool:
        """Whether there is anything to board."""

    def board(self, pipe: Any) -> int:
        """Add commands to a pipeline; returns how many. Their failure is no failure of the results."""

    def arrived(self, replies: Sequence[Any]) -> None:
        """What Redis said to those commands."""

    def turned_back(self) -> None:
        """The pipeline could not be sent."""


def _calls(stored: Sequence[_Stored]) -> Iterator[list[_Stored]]:
    """As many results at a time as one call of the script should carry."""
    call: list[_Stored] = []
    size_bytes = 0
    for entry in stored:
        if call and (len(call) == _CALL_RESULTS or size_bytes + len(entry.payload) > _CALL_BYTES):
            yield call
            call, size_bytes = [], 0
        call.append(entry)
        size_bytes += len(entry.payload)
    if call:
        yield call


class BatchedRedisBackend(RedisBackend):
    """Stock, except between ``collecting`` and ``flush``, and for the message on a client's reply channel."""

    #: Redis takes no longer values (``proto-max-bulk-len``); it closes the connection on one.
    answer_max_bytes = 512 * 1024 * 1024

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._collecting = False
        self._stored: list[_Stored] = []
        self._told_refused = False
        #: Entries of the result cache that go along with results, where both live in one Redis.
        self.rider: Rider | None = None
        self._line: ScriptLine | None = None
        #: Held while results are sent: from the hub's thread, or by ``store_success`` from another one.
        self._sending = threading.Lock()

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Results stored inside wait for ``flush``. For one thread: the hub's."""
        self._collecting = True
        try:
            yield
        finally:
            self._collecting = False

    def collect_success(self, job_id: str, answer: Answer, reply_to: str | None, tag: str = "") -> None:
        """Let a plain job's SUCCESS wait for ``flush``. Raises InferenceFailed as ``encode``, or what the codec raises.

        ``tag``: of the job's message, if it is in this backend's Redis and is to be acknowledged along with it.
        """
        self._stored.append(self._success(job_id, answer, reply_to, tag))

    def store_success(self, job_id: str, answer: Answer, reply_to: str | None, tag: str = "") -> bool | None:
        """Store a plain job's SUCCESS at once, on whatever thread; returns whether its message was acknowledged along.

        None: it is not stored, since it is too long or others are being sent. Raises as ``collect_success`` and
        ``flush``; nothing is kept then.
        """
        entry = self._success(job_id, answer, reply_to, tag)
        if len(entry.payload) > _SCRIPTED_BYTES or not self._sending.acquire(blocking=False):
            return None
        try:
            return bool(self._flush_small([entry]))
        finally:
            self._sending.release()

    def _success(self, job_id: str, answer: Answer, reply_to: str | None, tag: str) -> _Stored:
        meta = {
            "status": states.SUCCESS,
            "result": answer,
            "traceback": None,
            "children": [],
            # Celery's own way asks the time zone database, at three times the price of an encoding.
            "date_done": datetime.now(UTC).isoformat(),
            "task_id": job_id,
        }
        # As ``encode``, but that Celery and kombu would look the serializer up in three registries first.
        direct = self.serializer == SERIALIZER and not self.compression
        payload = self._checked(dumps(meta)) if direct else self.encode(meta)
        return _Stored(result_key(job_id), payload, self.expires, job_id, reply_to, tag)

    def flush(self) -> set[str]:
        """Send what was collected, in one round trip but for exceptional sizes; returns the tags of the messages that
        were acknowledged along. Raises what redis-py raises when something could not be stored, and keeps it for the
        next try. An announcement that cannot be made is no loss: clients also look."""
        with self._sending:
            return self._flush()

    def _flush(self) -> set[str]:
        self._stored = self._without_late(self._stored)
        small = [entry for entry in self._stored if len(entry.payload) <= _SCRIPTED_BYTES]
        large = [entry for entry in self._stored if len(entry.payload) > _SCRIPTED_BYTES]
        self._stored = [*large, *small]
        if large:
            self._flush_large(large)
        del self._stored[: len(large)]
        acknowledged: set[str] = set()
        for call in _calls(small):
            acknowledged |= self._flush_small(call)
            del self._stored[: len(call)]
        return acknowledged

    def _without_late(self, stored: list[_Stored]) -> list[_Stored]:
        """Without the failures of jobs that another run has answered."""
        keys = [entry.key for entry in stored if entry.state != states.SUCCESS]
        if not keys:
            return stored
        late = {key for key, value in zip(keys, self.client.mget(keys), strict=True) if self._is_success(value)}
        return [entry for entry in stored if entry.state == states.SUCCESS or entry.key not in late]

    def _is_success(self, payload: Any) -> bool:
        try:
            return payload is not None and self.decode_result(payload)["status"] == states.SUCCESS
        except Exception:
            return False  # nothing that anybody could read

    def _flush_small(self, stored: Sequence[_Stored]) -> set[str]:
        if self._line is None:
            self._line = ScriptLine(self.client, _STORE)
        arguments: list[Any] = [REPLY_MAGIC, len(result_key("")), _CARRIED_BYTES, len(stored)]
        for entry in stored:
            channel = entry.reply_to if is_reply_channel(entry.reply_to) else ""
            arguments += (entry.expires_s or 0, channel, entry.tag, entry.payload)
        tags = {entry.tag for entry in stored if entry.tag}
        keys = [*(entry.key for entry in stored), *(UNACKED_KEYS if tags else ())]
        if self.rider is not None and self.rider.waiting:
            refused, acknowledged = self._send_with_rider(keys, arguments)
        else:
            refused, acknowledged = self._line.run(keys, arguments)
        self._note_refusal(refused)
        # Fewer: a message is in another Redis, or another worker's by now. Celery's own way is right for all of them.
        return tags if acknowledged == len(tags) else set()

    def _send_with_rider(self, keys: Sequence[str], arguments: Sequence[Any]) -> Any:
        with self.client.pipeline(transaction=False) as pipe:
            # First, so that who hears of an answer finds it in the cache.
            riding = self._board(pipe)
            # A pipeline asks for each script whether it is known, which is a round trip: send its text instead.
            pipe.eval(_STORE, len(keys), *keys, *arguments)
            reply = self._execute(pipe, riding)[0]
        if isinstance(reply, Exception):
            raise reply
        return reply

    def _board(self, pipe: Any) -> int:
        return self.rider.board(pipe) if self.rider is not None else 0

    def _execute(self, pipe: Any, riding: int) -> list[Any]:
        """The replies to all but the first commands, which are the rider's."""
        try:
            replies: list[Any] = pipe.execute(raise_on_error=False)
        except Exception:
            if self.rider is not None:
                self.rider.turned_back()
            raise
        if self.rider is not None:
            self.rider.arrived(replies[:riding])
        return replies[riding:]

    def _flush_large(self, stored: Sequence[_Stored]) -> None:
        finished: dict[str, list[str]] = defaultdict(list)
        with self.client.pipeline(transaction=False) as pipe:
            riding = self._board(pipe)
            for entry in stored:
                pipe.set(entry.key, entry.payload, ex=entry.expires_s or None)
            for entry in stored:
                pipe.publish(entry.key, entry.payload)
                if is_reply_channel(entry.reply_to):
                    finished[str(entry.reply_to)].append(entry.task_id)
            for channel, ids in finished.items():
                pipe.publish(channel, " ".join(ids))
            replies = self._execute(pipe, riding)
        for reply in replies[: len(stored)]:
            if isinstance(reply, Exception):
                raise reply
        self._note_refusal(next((reply for reply in replies[len(stored) :] if isinstance(reply, Exception)), None))

    def _note_refusal(self, refused: Any) -> None:
        if refused and not self._told_refused:
            self._told_refused = True
            said = refused.decode(errors="replace") if isinstance(refused, bytes) else refused
            logger.warning("Redis refuses to announce answers (clients find them by polling): %s", said)

    def encode(self, data: Any) -> Any:
        """Raises InferenceFailed when the answer is longer than Redis takes."""
        return self._checked(super().encode(data))

    def _checked(self, payload: Any) -> Any:
        if len(payload) > self.answer_max_bytes:
            raise InferenceFailed(
                f"the answer has {len(payload):,} bytes, over Redis's limit of {self.answer_max_bytes:,}; "
                "send fewer inputs per job",
                {"limit": self.answer_max_bytes, "got": len(payload)},
            )
        return payload

    def _store_result(
        self,
        task_id: str,
        result: Any,
        state: str,
        traceback: str | None = None,
        request: Any = None,
        **kwargs: Any,
    ) -> Any:
        reply_to = getattr(request, "reply_to", None)
        # The body of a chord may be sent as soon as its last part is stored, and may ask for the parts: hold none back.
        part = request is not None and request.chord
        if self._collecting and not part and state in states.READY_STATES:
            meta = self._get_result_meta(result=result, state=state, traceback=traceback, request=request)
            meta["task_id"] = task_id
            expires_s = self.failure_expires if state == states.FAILURE else self.expires
            self._stored.append(
                _Stored(self.get_key_for_task(task_id), self.encode(meta), expires_s, task_id, reply_to, state=state)
            )
            return result
        stored = super()._store_result(task_id, result, state, traceback=traceback, request=request, **kwargs)
        if is_reply_channel(reply_to) and state in states.READY_STATES:
            self.client.publish(reply_to, task_id)
        return stored
