"""``Cache`` and ``AsyncCache``: the searches of ``shelf`` over redis-py. A cache that fails is a cache that knows
nothing: no error of it reaches a caller, and none costs more than a few milliseconds."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any, Final

import redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from cortex_tasks.cache.breaker import Breaker
from cortex_tasks.cache.counters import Counters, Counts, refused, tell
from cortex_tasks.cache.shelf import SEARCH_INPUTS, Question, Search, Shelf
from cortex_tasks.loop_line import drop, heeded, pooled
from cortex_tasks.payloads import Result
from cortex_tasks.settings import Settings, mask_url

__all__ = ["AsyncCache", "Cache", "cache_options"]

_log = logging.getLogger(__name__)

#: A look that takes longer is worth less than it costs: for one input, and for so many that computing them takes long.
LOOK_TIMEOUT_S: Final = 0.02
BULK_TIMEOUT_S: Final = 0.1
_BULK_KEYS: Final = 64
CONNECT_TIMEOUT_S: Final = 0.05
#: What else the event loop does meanwhile counts as well: a full garbage collection alone takes over 50 ms.
ASYNC_CONNECT_TIMEOUT_S: Final = 0.2
#: Looks of one event loop at a time.
_LOOKS: Final = 16
#: A thread holds one while it looks, however many threads there are: redis-py stops at 100 by itself.
_THREAD_CONNECTIONS: Final = 2**31

Found = list[Result | None]


def cache_options(retry: Any, timeout_s: float) -> dict[str, Any]:
    """redis-py's options for connections to the cache: quick to give up."""
    return {"socket_timeout": timeout_s, "socket_connect_timeout": CONNECT_TIMEOUT_S, "retry": retry}


def _found(replies: Sequence[Any], counts: Counts, counters: Counters) -> Sequence[bytes | None]:
    """What a pipeline of MGET and ``tell`` found. A full Redis still answers although it refuses to count."""
    found: Sequence[bytes | None] | Exception = replies[0]
    if isinstance(found, Exception):
        raise found
    counters.give_back(refused(counts, replies[1:]))
    return found


class Cache:
    """For threads."""

    def __init__(self, settings: Settings, shelf: Shelf) -> None:
        self.shelf = shelf
        self.breaker = Breaker(mask_url(settings.cache), shelf.clock)
        # Any: redis-py types its commands for both of its clients at once.
        self._quick: Any = self._connect(settings, LOOK_TIMEOUT_S)
        self._bulk: Any = self._connect(settings, BULK_TIMEOUT_S)

    @staticmethod
    def _connect(settings: Settings, timeout_s: float) -> Any:
        options = cache_options(redis.retry.Retry(NoBackoff(), 0), timeout_s)
        return redis.Redis.from_url(settings.cache, **options, max_connections=_THREAD_CONNECTIONS)

    def nearby(self, question: Question, value: Any) -> Result | None:
        """The answer to one checked input, if it is in near memory."""
        return self.shelf.nearby(question, value)

    def look_up(self, question: Question, values: Sequence[Any]) -> Found:
        """A result or None for each checked input: one MGET for up to SEARCH_INPUTS of them."""
        found: Found = []
        for first in range(0, len(values), SEARCH_INPUTS):
            search = Search(self.shelf, question, values[first : first + SEARCH_INPUTS])
            while (names := search.wants()) and (replies := self._read(names, question.alias)) is not None:
                search.hear(replies)
            search.count()
            found += search.found
        return found

    def forget(self, question: Question, values: Sequence[Any]) -> None:
        """Drop these from near memory: they are computed anew."""
        self.shelf.forget(question, values)

    def _read(self, names: Sequence[bytes], alias: str) -> list[bytes | None] | None:
        counters, breaker = self.shelf.counters, self.breaker
        if not breaker.allows():
            counters.add(alias, skipped=1)
            return None
        counts = counters.take() if counters.due else Counts()
        client = self._quick if len(names) <= _BULK_KEYS else self._bulk
        try:
            if counts:
                with client.pipeline(transaction=False) as pipe:
                    pipe.mget(names)
                    tell(pipe, counts)
                    replies = _found(pipe.execute(raise_on_error=False), counts, counters)
            else:
                replies = client.mget(names)
        except (RedisError, OSError) as error:
            counters.give_back(counts)
            breaker.failed(error)
            return None
        breaker.succeeded()
        return list(replies)

    def close(self) -> None:
        """Tell what was counted, and give the connections back."""
        counts = self.shelf.counters.take()
        if counts and not self.breaker.open:
            try:
                with self._quick.pipeline(transaction=False) as pipe:
                    tell(pipe, counts)
                    pipe.execute()
            except (RedisError, OSError) as error:
                _log.debug("the cache's counts could not be told: %s", error)
        self._quick.close()
        self._bulk.close()


class AsyncCache:
    """For the coroutines of one event loop; see ``Cache``."""

    def __init__(self, settings: Settings, shelf: Shelf) -> None:
        from redis.asyncio import Redis
        from redis.asyncio.retry import Retry

        self.shelf = shelf
        self.breaker = Breaker(mask_url(settings.cache), shelf.clock)
        # Waited for before the breaker is asked: where the first looks fail, the others are spared.
        self._turns = asyncio.Semaphore(_LOOKS)

        def connect(timeout_s: float) -> Any:
            options = cache_options(Retry(NoBackoff(), 0), timeout_s)
            options["socket_connect_timeout"] = ASYNC_CONNECT_TIMEOUT_S
            return Redis.from_url(settings.cache, **options)

        self._quick, self._bulk = connect(LOOK_TIMEOUT_S), connect(BULK_TIMEOUT_S)

    def nearby(self, question: Question, value: Any) -> Result | None:
        """The answer to one checked input, if it is in near memory."""
        return self.shelf.nearby(question, value)

    async def look_up(self, question: Question, values: Sequence[Any]) -> Found:
        """A result or None for each checked input; see ``Cache.look_up``."""
        found: Found = []
        for first in range(0, len(values), SEARCH_INPUTS):
            search = Search(self.shelf, question, values[first : first + SEARCH_INPUTS])
            while (names := search.wants()) and (replies := await self._read(names, question.alias)) is not None:
                search.hear(replies)
            search.count()
            found += search.found
        return found

    def forget(self, question: Question, values: Sequence[Any]) -> None:
        """Drop these from near memory: they are computed anew."""
        self.shelf.forget(question, values)

    async def _read(self, names: Sequence[bytes], alias: str) -> list[bytes | None] | None:
        async with self._turns:
            with heeded():
                return await self._ask(names, alias)

    async def _ask(self, names: Sequence[bytes], alias: str) -> list[bytes | None] | None:
        counters, breaker = self.shelf.counters, self.breaker
        if not breaker.allows():
            counters.add(alias, skipped=1)
            return None
        counts = counters.take() if counters.due else Counts()
        client = self._quick if len(names) <= _BULK_KEYS else self._bulk
        try:
            if counts:
                async with client.pipeline(transaction=False) as pipe:
                    pipe.mget(names)
                    tell(pipe, counts)
                    replies = _found(await pipe.execute(raise_on_error=False), counts, counters)
            else:
                replies = await client.mget(names)
        except (RedisError, OSError) as error:
            counters.give_back(counts)
            breaker.failed(error)
            return None
        breaker.succeeded()
        return list(replies)

    async def close(self) -> None:
        """Tell what was counted, and give the connections back."""
        counts = self.shelf.counters.take()
        if counts and not self.breaker.open:
            try:
                async with self._quick.pipeline(transaction=False) as pipe:
                    tell(pipe, counts)
                    await pipe.execute()
            except (RedisError, OSError) as error:
                _log.debug("the cache's counts could not be told: %s", error)
        for client in (self._quick, self._bulk):
            await client.aclose()
            await client.connection_pool.disconnect()

    def drop(self) -> None:
        """``close``, where the event loop was closed before: nothing is told."""
        for client in (self._quick, self._bulk):
            drop(pooled(client))
