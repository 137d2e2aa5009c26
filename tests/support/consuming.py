"""The consuming side of a worker without Celery: kombu's hub and the cortex transport, turned by hand."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from kombu import Connection, Consumer, Exchange, Queue
from kombu.asynchronous import Hub

from cortex_tasks.codec import queue_key
from workers.celery_hooks.transport import register_transport

#: No test turns the hub for longer than this.
PATIENCE_S = 20.0


def message(name: str, priority: int = 0, **properties: Any) -> bytes:
    """A message as a client pushes it; its name is its body."""
    return json.dumps(
        {
            "body": json.dumps(name),
            "content-type": "application/json",
            "content-encoding": "utf-8",
            "headers": {"id": name},
            "properties": {
                "delivery_tag": name,
                "priority": priority,
                "delivery_info": {"exchange": "", "routing_key": "q"},
                "body_encoding": "utf-8",
                **properties,
            },
        }
    ).encode()


def push(client: Any, *names: str, queue: str = "q", priority: int = 0) -> None:
    client.lpush(queue_key(queue, priority), *(message(name, priority) for name in names))


class Consuming:
    """One connection and channel that consumes ``queues``; what arrives is kept in ``messages``, unacknowledged."""

    def __init__(self, url: str, *queues: str, prefetch: int = 0, **options: Any) -> None:
        self.hub = Hub()
        self.connection = Connection(
            url, transport=register_transport(), transport_options={"body_encoding": "utf-8", **options}
        )
        self.connection.connect()
        self.hub.propagate_errors = self.connection.connection_errors
        self.channel = self.connection.channel()
        self.connection.transport.register_with_event_loop(self.connection.connection, self.hub)
        self.messages: list[Any] = []
        self.consumer = Consumer(
            self.channel,
            [Queue(name, Exchange(name, type="direct"), routing_key=name) for name in queues or ("q",)],
            on_message=self.messages.append,
            accept=["json"],
        )
        self.channel.basic_qos(0, prefetch, False)
        self.consumer.consume()
        self._loop = self.hub.create_loop()

    @property
    def names(self) -> list[str]:
        return [one.headers["id"] for one in self.messages]

    @property
    def tags(self) -> list[str]:
        return [one.delivery_tag for one in self.messages]

    def turn(self, times: int = 1) -> None:
        """Let the hub turn. It must not sleep: a timer of ours ends each poll."""
        for _ in range(times):
            self.hub.call_later(0.001, lambda: None)
            next(self._loop)

    def turn_until(self, true: Callable[[], object], what: str) -> None:
        until_s = time.monotonic() + PATIENCE_S
        while not true():
            assert time.monotonic() < until_s, f"not in time: {what}; got {self.names}"
            self.turn()

    def expect(self, *names: str) -> None:
        """Turn until so many messages are there; these must be they, in this order."""
        self.turn_until(lambda: len(self.messages) >= len(names), f"{len(names)} messages")
        assert self.names == list(names)

    def close(self) -> None:
        self.connection.close()
        self.hub.close()


@contextmanager
def consuming(url: str, *queues: str, **options: Any) -> Iterator[Consuming]:
    made = Consuming(url, *queues, **options)
    try:
        yield made
    finally:
        made.close()
