"""Messages that cannot be read: parked on their queue's dead-letter list, so that they stop nobody.

Anyone may write to a queue. Stock kombu 5.7 logs a message that breaks its reading and leaves it unacknowledged;
here it is taken out of ``unacked`` in the same step that parks it.
"""

from __future__ import annotations

import json
import logging
import time
from typing import Any, Final

from celery.worker import state as worker_state

from workers.dead_letters import add_dead_letter, dead_letter_key

__all__ = ["UNREADABLE", "forget_request", "park", "split_record"]

logger = logging.getLogger(__name__)

#: What reading a message as JSON, or as parts of known types, may raise.
UNREADABLE: Final = (ValueError, TypeError, LookupError, AttributeError, RecursionError)


def park(client: Any, unacked: tuple[str, str], queue: str, tag: str, raw: bytes, error: Exception) -> None:
    """Park a message and take its tag out of ``unacked`` (the hash's and the index's key)."""
    message = _decoded(raw)
    reason = f"the message cannot be read: {type(error).__name__}: {str(error)[:200]}"
    with client.pipeline() as pipe:
        add_dead_letter(pipe, queue, _job_id(message), reason, message, time.time())
        pipe.hdel(unacked[0], tag)
        pipe.zrem(unacked[1], tag)
        pipe.execute()
    logger.error("a message of queue %s was parked on %s: %s", queue, dead_letter_key(queue), reason)


def split_record(record: bytes) -> tuple[bytes, str]:
    """(message, queue) of an entry of ``unacked``, whose message may be no JSON."""
    try:
        readable, _, name = json.loads(record)
        return json.dumps(readable).encode(), name
    except (ValueError, TypeError, RecursionError):
        message, _, queue = record.removeprefix(b"[").removesuffix(b"]").rpartition(b',"",')
        return message, queue.strip(b'"').decode(errors="replace")


def forget_request(tag: str) -> None:
    """Take the request that Celery made of an unreadable message, if it came that far, out of its books."""
    for request in list(worker_state.requests.values()):
        if request.message.delivery_tag == tag:
            worker_state.task_ready(request)


def _decoded(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return raw.decode(errors="backslashreplace")


def _job_id(message: Any) -> str:
    headers = message.get("headers") if isinstance(message, dict) else None
    found = headers.get("id") if isinstance(headers, dict) else None
    return found if isinstance(found, str) else ""
