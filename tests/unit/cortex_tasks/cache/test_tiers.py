"""Looks into Redis: one that is cancelled, many at once, and those into a Redis that is full or says nothing."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import redis
from pydantic import SecretStr

from cortex_tasks.cache import AsyncCache, Cache, Question, Shelf
from cortex_tasks.cache.counters import TOLD_EVERY_S
from cortex_tasks.cache.frame import sealed
from cortex_tasks.cache.names import model_key, stats_key
from cortex_tasks.catalog import TASKS
from cortex_tasks.keys import Address, stored_params
from cortex_tasks.payloads import EmbedParams, Result
from cortex_tasks.settings import Settings
from tests.support.redis_server import RedisServer


def asking(shelf: Shelf) -> Question:
    return shelf.question(TASKS["embed"], "m", EmbedParams(), "echo")


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine is no cache that does not answer."""
    for name in ("LOOK_TIMEOUT_S", "CONNECT_TIMEOUT_S", "ASYNC_CONNECT_TIMEOUT_S"):
        monkeypatch.setattr(f"cortex_tasks.cache.tiers.{name}", 30.0)


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[RedisServer]:
    """A server that a test may fill."""
    with RedisServer(directory=tmp_path) as server:
        yield server


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


def store(raw: Any, question: Question, text: str) -> None:
    """The answer to a text, as a worker stores it."""
    raw.set(model_key("m"), json.dumps({"revision": "r1", "at": 0}))
    key = Address("embed", "m", "r1", stored_params(EmbedParams(), "echo").canonical()).key(text)
    raw.set(question.entries + key, sealed(key, {"data": b"1234", "truncated": False}))


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("kind", [Cache, AsyncCache])
async def test_a_full_redis_still_answers_and_is_told_the_counts_when_it_has_room(
    own_server: RedisServer, kind: type[Cache | AsyncCache]
) -> None:
    clock = Clock()
    shelf = Shelf(0, 60, clock)
    question = asking(shelf)
    cache = kind(Settings(broker_url=SecretStr(own_server.url)), shelf)

    async def look() -> list[Result | None]:
        clock.now_s += TOLD_EVERY_S
        found = cache.look_up(question, ["known"])
        return found if isinstance(found, list) else await found

    with redis.Redis.from_url(own_server.url) as raw:
        store(raw, question, "known")
        for maxmemory in (0, 1, 1, 0):
            raw.config_set("maxmemory", maxmemory)
            assert [item is not None for item in await look()] == [True]
        assert cache.breaker.failures == 0
        # Of the last look nothing was told yet.
        assert raw.hget(stats_key("m"), "l2_hits") == b"3"
    closed = cache.close()
    if closed is not None:
        await closed


def test_a_thread_never_lacks_a_connection_to_the_cache() -> None:
    cache = Cache(Settings(), Shelf(0, 60))
    for client in (cache._quick, cache._bulk):
        assert len([client.connection_pool.make_connection() for _ in range(300)]) == 300


async def test_of_many_looks_at_once_only_the_first_wait_for_a_cache_that_says_nothing() -> None:
    shelf = Shelf(0, 60, Clock())
    silent = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    async with silent:
        port = silent.sockets[0].getsockname()[1]
        cache = AsyncCache(Settings(broker_url=SecretStr(f"redis://127.0.0.1:{port}/0")), shelf)
        found = await asyncio.gather(*(cache.look_up(asking(shelf), [f"text {number}"]) for number in range(200)))
        assert found == [[None]] * 200
        assert (cache.breaker.failures, cache.breaker.skips) == (16, 184)
        await cache.close()
