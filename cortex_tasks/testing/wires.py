"""The clients' wires to a ``LocalFleet``: method calls where Redis would be."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from cortex_tasks.codec import Heard
from cortex_tasks.errors import BrokerUnavailable
from cortex_tasks.presence import WorkerCard
from cortex_tasks.publish import Envelope

if TYPE_CHECKING:
    from cortex_tasks.testing.local import LocalFleet

__all__ = ["AsyncMemoryWire", "MemoryWire"]


class MemoryWire:
    """``cortex_tasks.wire.Wire`` in memory."""

    def __init__(self, fleet: LocalFleet) -> None:
        self._fleet = fleet
        self._heard: queue.SimpleQueue[list[str]] = queue.SimpleQueue()
        self._channel = ""
        self.fetch, self.revoke, self.cards = fleet.fetch, fleet.revoke, fleet.cards

    def push(self, envelope: Envelope, messages: Sequence[bytes], *, partial: bool) -> tuple[int, int]:
        return self._fleet.push(envelope, messages, partial)

    def listen(self, channel: str) -> None:
        self._channel = channel
        self._fleet.listen(channel, self._heard.put)

    def receive(self, timeout_s: float) -> list[Heard]:
        self._fleet.reach()
        try:
            return [(job_id, None) for job_id in self._heard.get(timeout=timeout_s)]
        except queue.Empty:
            return []

    def unlisten(self) -> None:
        self._fleet.unlisten(self._channel)

    def depth(self, queue: str) -> int:
        self._fleet.reach()
        return self._fleet.depth(queue)

    def close(self) -> None:
        self.unlisten()


class AsyncMemoryWire:
    """``cortex_tasks.wire.AsyncWire`` in memory."""

    def __init__(self, fleet: LocalFleet) -> None:
        self._fleet = fleet
        self._channel = ""

    async def push(self, envelope: Envelope, messages: Sequence[bytes], *, partial: bool) -> tuple[int, int]:
        return self._fleet.push(envelope, messages, partial)

    async def fetch(self, job_ids: Sequence[str]) -> list[bytes | None]:
        return self._fleet.fetch(job_ids)

    async def listen(
        self, channel: str, heard: Callable[[list[Heard]], None], lost: Callable[[BrokerUnavailable], None]
    ) -> None:
        loop, self._channel = asyncio.get_running_loop(), channel

        def tell(ids: list[str]) -> None:
            # Answers may come from whichever thread called release().
            jobs: list[Heard] = [(job_id, None) for job_id in ids]
            loop.call_soon_threadsafe(heard, jobs)

        self._fleet.listen(channel, tell)

    async def unlisten(self) -> None:
        self._fleet.unlisten(self._channel)

    async def revoke(self, job_ids: Sequence[str]) -> None:
        self._fleet.revoke(job_ids)

    async def cards(self) -> list[WorkerCard]:
        return self._fleet.cards()

    async def depth(self, queue: str) -> int:
        self._fleet.reach()
        return self._fleet.depth(queue)

    async def close(self) -> None:
        self.drop()

    def drop(self) -> None:
        self._fleet.unlisten(self._channel)
