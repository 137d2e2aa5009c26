"""Looks into Redis: what becomes of one that is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import pytest

from cortex_tasks.cache import AsyncCache, Question, Shelf
from cortex_tasks.catalog import TASKS
from cortex_tasks.payloads import EmbedParams
from cortex_tasks.settings import Settings


def asking(shelf: Shelf) -> Question:
    return shelf.question(TASKS["embed"], "m", EmbedParams(), "echo")


class Deaf:
    """A redis-py client that loses a cancellation, as Python 3.11's wait_for may, and then replies or fails."""

    def __init__(self, end: Callable[[Sequence[bytes]], list[None]]) -> None:
        self.end = end
        self.asked = asyncio.Event()

    async def mget(self, names: Sequence[bytes]) -> list[None]:
        self.asked.set()
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        return self.end(names)


def nothing(names: Sequence[bytes]) -> list[None]:
    return [None] * len(names)


def gone(names: Sequence[bytes]) -> list[None]:
    raise ConnectionResetError("gone")


@pytest.mark.parametrize("end", [nothing, gone])
async def test_a_cancellation_that_redis_py_loses_still_ends_the_look(end: Callable[[Any], list[None]]) -> None:
    shelf = Shelf(0, 60)
    cache = AsyncCache(Settings(), shelf)
    cache._quick = client = Deaf(end)
    look = asyncio.create_task(cache.look_up(asking(shelf), ["text"]))
    await client.asked.wait()
    look.cancel()
    with pytest.raises(asyncio.CancelledError):
        await look
