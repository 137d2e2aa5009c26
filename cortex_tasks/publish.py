"""Jobs -> messages, and many messages -> a queue in one round trip.

A message is what stock Celery (task protocol 2) and kombu's Redis transport would push, readable by any Celery
worker; only most of it is encoded once for all the jobs of one kind. No IO happens here: a wire
(``cortex_tasks.wire``) carries what this module builds.
"""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from json.encoder import JSONEncoder, encode_basestring
from typing import Any, Final

from cortex_tasks.catalog import TaskSpec
from cortex_tasks.codec import HEADER, is_reply_channel, priority_of, queue_key, queue_keys
from cortex_tasks.payloads import CachePolicy, Lane, Series

__all__ = ["PUSH_SCRIPT", "SHOWN_CHARS", "Envelope", "new_id", "push_arguments", "revoke_message", "short_repr"]

#: Push while there is room. KEYS: the queue's lists. ARGV: the limit, the 1-based list to push to, 1 when a part may
#: be pushed where not all fit (else 0), then the messages. Returns {pushed, jobs in the queue afterwards}.
PUSH_SCRIPT: Final = """
local depth = 0
for _, key in ipairs(KEYS) do depth = depth + redis.call('LLEN', key) end
local limit, target, given = tonumber(ARGV[1]), KEYS[tonumber(ARGV[2])], #ARGV - 3
local room = math.min(given, math.max(0, limit - depth))
if room < given and ARGV[3] == '0' then room = 0 end
for first = 4, 3 + room, 1000 do
  redis.call('LPUSH', target, unpack(ARGV, first, math.min(first + 999, 3 + room)))
end
return {room, depth + room}
"""

#: Characters of a job's parameters that Flower and logs show.
SHOWN_CHARS: Final = 200


def _series(value: Any) -> dict[str, Any]:
    if isinstance(value, Series):
        return {"ds": value.ds, "y": value.y}
    raise TypeError(f"not a wire type: {type(value).__name__}")


_encode = JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=_series).encode


# Seeded by the system and no one else, and anew in each forked child. Asking the system for each id costs more
# than the whole of the rest of a message.
_random = random.Random()
os.register_at_fork(after_in_child=_random.seed)


def new_id() -> str:
    """A job's id: a random UUID, as Celery's are."""
    digits = f"{_random.getrandbits(128):032x}"
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-a{digits[17:20]}-{digits[20:]}"


def short_repr(inputs: Sequence[Any]) -> str:
    """``<3 texts, 'The quick bro…'>``: the inputs as Flower and logs show them, never whole."""
    first = inputs[0] if inputs else None
    if isinstance(first, str):
        noun = "text" if len(inputs) == 1 else "texts"
        return f"<{len(inputs)} {noun}, {_cut(first, 14)!r}>"
    if isinstance(first, Series):
        return f"<{len(inputs)} series, {len(first.y)} points>"
    return f"<{len(inputs)} inputs>"


def short_options(options: Mapping[str, Any]) -> str:
    """``'model': 'minilm', 'top_k': 3``, cut to a readable length."""
    return _cut(", ".join(f"{name!r}: {value!r}" for name, value in options.items()), SHOWN_CHARS)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


class Envelope:
    """A message with holes: what the jobs of one kind and one client share, encoded once."""

    __slots__ = ("_body_end", "_headers", "_options", "_properties", "keys", "lane", "limit_jobs", "queue", "target")

    def __init__(
        self,
        spec: TaskSpec,
        options: Mapping[str, Any],
        *,
        queue: str,
        limit_jobs: int,
        lane: Lane,
        cache: CachePolicy,
        reply_to: str,
    ) -> None:
        """``options``: the task's keyword arguments beside its inputs, in JSON types. ``reply_to``: a reply channel,
        or any other id for answers in plain JSON that are not announced."""
        self.queue = queue
        self.lane = lane
        #: Jobs waiting in the queue beyond which a push is refused.
        self.limit_jobs = limit_jobs
        #: The queue's lists, and which of them (from 1) the messages go to.
        self.keys = queue_keys(queue)
        self.target = self.keys.index(queue_key(queue, priority_of(lane))) + 1
        self._options = short_options(options)
        callbacks = dict.fromkeys(("callbacks", "errbacks", "chain", "chord"))
        self._body_end = f",{_encode(options)[1:]},{_encode(callbacks)}]"
        self._headers = _encode(_static_headers(spec, cache, reply_to)).removesuffix("}}")
        self._properties = _encode(_static_properties(queue, lane, reply_to)).removesuffix("}")

    def seal(self, job_id: str, inputs: Sequence[Any], *, sent_at: float, deadline_s: float | None = None) -> bytes:
        """The message of one job. ``sent_at``: epoch seconds; ``inputs``: checked texts or Series."""
        # Each text by itself: encoding a string is one call into C, a list sets up an encoder first.
        listed = ",".join([encode_basestring(value) if type(value) is str else _encode(value) for value in inputs])
        body = f'[[],{{"inputs":[{listed}]{self._body_end}'
        shown = f"{{'inputs': {short_repr(inputs)}, {self._options}}}"
        expires, expiration = "null", ""
        if deadline_s is not None:
            expires = f'"{datetime.fromtimestamp(sent_at + deadline_s, UTC).isoformat()}"'
            expiration = f',"expiration":"{int(deadline_s * 1000)}"'
        return (
            f'{{"body":{encode_basestring(body)},"content-encoding":"utf-8","content-type":"application/json",'
            f'"headers":{self._headers},"sent_at":{sent_at!r}}},'
            f'"id":"{job_id}","root_id":"{job_id}","expires":{expires},"kwargsrepr":{encode_basestring(shown)}}},'
            f'"properties":{self._properties},"correlation_id":"{job_id}","delivery_tag":"{job_id}"{expiration}}}}}'
        ).encode()


def _static_headers(spec: TaskSpec, cache: CachePolicy, reply_to: str) -> dict[str, Any]:
    """Celery's headers that do not change from job to job; Cortex's own comes last, for ``sent_at`` to follow."""
    return {
        "lang": "py",
        "task": spec.celery_name,
        "shadow": None,
        "eta": None,
        "group": None,
        "group_index": None,
        "retries": 0,
        "timelimit": [None, None],
        "parent_id": None,
        "argsrepr": "()",
        "origin": f"gen{os.getpid()}@{socket.gethostname()}",
        "ignore_result": False,
        "replaced_task_nesting": 0,
        "stamped_headers": None,
        "stamps": {},
        HEADER: {"packed": is_reply_channel(reply_to), "cache": cache},
    }


def _static_properties(queue: str, lane: Lane, reply_to: str) -> dict[str, Any]:
    return {
        "reply_to": reply_to,
        "delivery_mode": 2,
        "delivery_info": {"exchange": "", "routing_key": queue},
        "priority": priority_of(lane),
        # kombu takes a body so marked as it is; its default, base64, costs a third more.
        "body_encoding": "utf-8",
    }


def push_arguments(
    envelope: Envelope, messages: Sequence[bytes], *, partial: bool
) -> tuple[Sequence[str], Sequence[Any]]:
    """KEYS and ARGV of PUSH_SCRIPT."""
    return envelope.keys, (envelope.limit_jobs, envelope.target, int(partial), *messages)


def revoke_message(job_ids: Sequence[str], db: int = 0) -> tuple[str, bytes]:
    """Channel and message that tell every worker to drop jobs: what ``app.control.revoke`` publishes."""
    arguments = {"task_id": list(job_ids), "terminate": False, "signal": "SIGTERM"}
    body = {"method": "revoke", "arguments": arguments, "destination": None, "pattern": None, "matcher": None}
    message = {
        "body": _encode(body),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {"clock": 0, "expires": 0},
        "properties": {
            "delivery_mode": 2,
            "delivery_info": {"exchange": "celery.pidbox", "routing_key": ""},
            "priority": 0,
            "body_encoding": "utf-8",
            "delivery_tag": new_id(),
        },
    }
    return f"/{db}.celery.pidbox", _encode(message).encode()
