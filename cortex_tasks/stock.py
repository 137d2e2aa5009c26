"""Publishing as stock Celery does it (``CORTEX_PUBLISH=stock``): one message a job, each by ``send_task``.

The queue's limit is looked at before. One client keeps it exactly; several that publish at the same moment may exceed
it together.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Sequence

from celery.exceptions import OperationalError
from redis.exceptions import RedisError

from cortex_tasks.app import make_app
from cortex_tasks.codec import HEADER
from cortex_tasks.config import FleetConfig, Settings
from cortex_tasks.publish import Envelope
from cortex_tasks.wire import AsyncRedisWire, RedisWire, unavailable

__all__ = ["AsyncStockWire", "StockWire"]


class _Sender:
    """A Celery app and a connection of its own."""

    def __init__(self, settings: Settings, fleet: FleetConfig) -> None:
        self._url = settings.broker
        self._app = make_app(settings, fleet, fail_fast=True)
        # Celery would subscribe to the answer of each job; here the client looks for them.
        self._app.conf.result_backend = "disabled"
        # Not of Celery's pools, which a forked child would share with its parent.
        self._connection = self._app.connection_for_write()
        self._producer = self._app.amqp.Producer(self._connection)
        #: One thread sends at a time. Celery warns of a deadline that has passed: what handles that may send, too.
        self.lock = threading.RLock()

    def send(self, messages: Sequence[bytes]) -> None:
        """Send what sealed messages say. Raises BrokerUnavailable; those before are sent."""
        try:
            with self.lock:
                for message in messages:
                    self._send(json.loads(message))
        except (OperationalError, RedisError, OSError) as error:
            raise unavailable(self._url, error) from error

    def _send(self, sealed: dict[str, dict[str, object]]) -> None:
        headers, properties = sealed["headers"], sealed["properties"]
        _, kwargs, _ = json.loads(str(sealed["body"]))
        self._app.send_task(
            headers["task"],
            kwargs=kwargs,
            task_id=headers["id"],
            root_id=headers["id"],
            expires=headers["expires"],
            priority=properties["priority"],
            queue=properties["delivery_info"]["routing_key"],  # type: ignore[index]
            reply_to=properties["reply_to"],
            headers={HEADER: headers[HEADER]},
            argsrepr=headers["argsrepr"],
            kwargsrepr=headers["kwargsrepr"],
            ignore_result=False,
            add_to_parent=False,
            producer=self._producer,
        )

    def close(self) -> None:
        with self.lock:
            self._connection.release()
            self._app.close()


def _fitting(envelope: Envelope, messages: Sequence[bytes], depth: int, partial: bool) -> Sequence[bytes]:
    """Those for which the queue has room, as ``PUSH_SCRIPT`` counts it."""
    room = max(0, envelope.limit_jobs - depth)
    return messages if len(messages) <= room else messages[:room] if partial else ()


class StockWire(RedisWire):
    """``RedisWire``, but that jobs are published by Celery."""

    def __init__(self, settings: Settings, fleet: FleetConfig) -> None:
        super().__init__(settings)
        self._sender = _Sender(settings, fleet)

    def push(self, envelope: Envelope, messages: Sequence[bytes], *, partial: bool) -> tuple[int, int]:
        with self._sender.lock:
            depth = self.depth(envelope.queue)
            fitting = _fitting(envelope, messages, depth, partial)
            self._sender.send(fitting)
        return len(fitting), depth + len(fitting)

    def close(self) -> None:
        self._sender.close()
        super().close()


class AsyncStockWire(AsyncRedisWire):
    """``AsyncRedisWire``, but that jobs are published by Celery, on another thread."""

    def __init__(self, settings: Settings, fleet: FleetConfig) -> None:
        super().__init__(settings)
        self._sender = _Sender(settings, fleet)
        self._sending = asyncio.Lock()

    async def push(self, envelope: Envelope, messages: Sequence[bytes], *, partial: bool) -> tuple[int, int]:
        async with self._sending:
            depth = await self.depth(envelope.queue)
            fitting = _fitting(envelope, messages, depth, partial)
            await asyncio.to_thread(self._sender.send, fitting)
        return len(fitting), depth + len(fitting)

    async def close(self) -> None:
        await asyncio.to_thread(self._sender.close)
        await super().close()

    def drop(self) -> None:
        self._sender.close()
        super().drop()
