"""What a client needs of Redis, and nothing else: two small interfaces and their two implementations.

``cortex_tasks.testing`` implements the same interfaces in memory. Every method raises BrokerUnavailable when
Redis does not answer or refuses; the message says which, and names its URL with the password masked.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, Protocol

import redis
from redis.backoff import ConstantBackoff, NoBackoff
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)

from cortex_tasks.codec import Heard, is_reply_channel, queue_keys, read_reply, result_key
from cortex_tasks.config import Settings, mask_url
from cortex_tasks.errors import BrokerUnavailable, ConfigError
from cortex_tasks.lines import AsyncLine, AsyncScriptLine, ScriptLine, outdated, packed
from cortex_tasks.loop_line import Subscription, drop, heeded, pooled
from cortex_tasks.presence import WORKERS_KEY, WorkerCard, parse_cards, read_cards, worker_key
from cortex_tasks.publish import PUSH_SCRIPT, Envelope, push_arguments, revoke_message
from cortex_tasks.quiet import warn

if TYPE_CHECKING:
    import redis.asyncio

__all__ = ["AsyncRedisWire", "AsyncWire", "RedisWire", "Wire", "unavailable"]

_log = logging.getLogger(__name__)

#: A command that takes longer than this finds Redis unavailable.
COMMAND_TIMEOUT_S: Final = 4.0
#: Connections of one Cortex: as many as threads ask at once. redis-py's own limit of 100 fails whoever comes then.
THREAD_CONNECTIONS: Final = 2**31
#: Connections of one AsyncCortex; more commands at once wait for one of them.
ASYNC_CONNECTIONS: Final = 16
#: How often a silent subscription is asked whether it still stands.
_CHECK_S: Final = 15.0


class Wire(Protocol):
    """What ``Cortex`` needs. One thread calls ``listen``, ``receive`` and ``unlisten``; any thread the others."""

    def push(self, envelope: Envelope, messages: Sequence[bytes], *, partial: bool) -> tuple[int, int]:
        """Queue messages, if the queue's limit allows: all or none of them, or (``partial``) the first so many.

        Returns how many were queued, and the jobs that wait in the queue afterwards.
        """

    def fetch(self, job_ids: Sequence[str]) -> list[bytes | None]:
        """The stored result metas of jobs, in one round trip; None where there is none yet."""

    def listen(self, channel: str) -> None:
        """Subscribe, on a connection of its own. Returns when the subscription stands.

        Where ``channel`` is no reply channel nobody announces anything, and answers are polled for.
        """

    def receive(self, timeout_s: float) -> list[Heard]:
        """Finished jobs that were announced, some with their result meta; waits for the first up to ``timeout_s``."""

    def unlisten(self) -> None:
        """Give the subscription's connection back."""

    def revoke(self, job_ids: Sequence[str]) -> None:
        """Tell every worker to drop these jobs, in one broadcast."""

    def cards(self) -> list[WorkerCard]:
        """The workers that are there."""

    def depth(self, queue: str) -> int:
        """Jobs that wait in a queue and were not yet taken by a worker."""

    def close(self) -> None:
        """Give every connection back."""


class AsyncWire(Protocol):
    """``Wire``, as coroutines of one event loop, which is told what it need not ask for."""

    async def push(self, envelope: Envelope, messages: Sequence[bytes], *, partial: bool) -> tuple[int, int]: ...
    async def fetch(self, job_ids: Sequence[str]) -> list[bytes | None]: ...
    async def listen(
        self, channel: str, heard: Callable[[list[Heard]], None], lost: Callable[[BrokerUnavailable], None]
    ) -> None:
        """Subscribe, on a connection of its own. ``heard`` is called with finished jobs as they are announced, in the
        loop; ``lost`` once, when none will be any more."""

    async def unlisten(self) -> None: ...
    async def revoke(self, job_ids: Sequence[str]) -> None: ...
    async def cards(self) -> list[WorkerCard]: ...
    async def depth(self, queue: str) -> int: ...
    async def close(self) -> None: ...
    def drop(self) -> None:
        """``close``, where the event loop was closed before."""


#: How Redis says no: redis-py's class, the word in its text (a script's error has no class of its own before Redis 7),
#: what that means, the remedy. The first that fits counts.
_REFUSALS: Final = (
    (
        OutOfMemoryError,
        "OOM",
        "is full (maxmemory)",
        "raise its maxmemory, or find what fills it with redis-cli --bigkeys",
    ),
    (ReadOnlyError, "READONLY", "is a read-only replica", "name its primary in the URL"),
    (
        NoPermissionError,
        "NOPERM",
        "does not permit this",
        "let the URL's user run Cortex's commands on its keys and channels (ACL)",
    ),
    (AuthenticationError, "NOAUTH", "does not let us in", "give a valid user and password in the URL"),
    (BusyLoadingError, "LOADING", "is starting", "try again when it has loaded its data"),
    (ResponseError, "", "refuses", "see its log"),
)


def unavailable(url: str, error: BaseException) -> BrokerUnavailable:
    """What redis-py raised (itself, or as the cause of ``error``), as the BrokerUnavailable to raise: whether Redis is
    full, keeps us out, or does not answer."""
    shown, said = mask_url(url), error
    while not isinstance(said, RedisError) and said.__cause__ is not None:
        said = said.__cause__
    for kind, word, means, remedy in _REFUSALS:
        if isinstance(said, kind) or (word and isinstance(said, ResponseError) and f"-{word} " in str(said)):
            return BrokerUnavailable(f"Redis at {shown} {means}: {said}; {remedy}", {"url": shown})
    return BrokerUnavailable(f"Redis at {shown} does not answer: {error}", {"url": shown})


@contextmanager
def _reaching(url: str) -> Iterator[None]:
    """Raise what redis-py raises as BrokerUnavailable."""
    try:
        yield
    except (RedisError, OSError) as error:
        raise unavailable(url, error) from error


def _client_options(settings: Settings, retry: Any) -> dict[str, Any]:
    return {
        "socket_connect_timeout": settings.connect_timeout_s,
        "socket_timeout": COMMAND_TIMEOUT_S,
        "health_check_interval": 30,
        "retry": retry,
    }


def _announced(message: Any) -> list[Heard]:
    return read_reply(message["data"]) if message["type"] == "message" else []


@contextmanager
def _no_permission(channel: str) -> Iterator[None]:
    """An ACL user may lack the channel: answers are then found by polling, which is slower but works."""
    try:
        yield
    except NoPermissionError:
        warn(_log, "no permission to subscribe to %s: answers will be polled for; grant &cortex:reply:*", channel)


@contextmanager
def _valid(url: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"{mask_url(url)} is not a Redis URL: {error}") from None


class RedisWire:
    """``Wire`` over redis-py. Broker and results may be two servers."""

    def __init__(self, settings: Settings) -> None:
        self._broker_url, self._results_url = settings.broker, settings.results
        # One retry mends a connection that died in the pool; a time-out is final, or it would add up.
        once = redis.retry.Retry(ConstantBackoff(0.05), 1, (redis.ConnectionError,))
        never = redis.retry.Retry(NoBackoff(), 0)
        most = {"max_connections": THREAD_CONNECTIONS}
        # Any: redis-py types its commands for both of its clients at once.
        self._broker: Any
        self._results: Any
        self._listener: Any
        with _valid(self._broker_url):
            self._broker = redis.Redis.from_url(self._broker_url, **_client_options(settings, once), **most)
        with _valid(self._results_url):
            self._results = redis.Redis.from_url(self._results_url, **_client_options(settings, once), **most)
            # A silent reconnect would hide that announcements were missed.
            self._listener = redis.Redis.from_url(self._results_url, **_client_options(settings, never))
        self._push = ScriptLine(self._broker, PUSH_SCRIPT)
        self._db = int(self._broker.get_connection_kwargs().get("db", 0))
        self._pubsub: Any = None

    def push(self, envelope: Envelope, messages: Sequence[bytes], *, partial: bool) -> tuple[int, int]:
        keys, args = push_arguments(envelope, messages, partial=partial)
        with _reaching(self._broker_url):
            pushed, depth = self._push.run(keys, args)
        return int(pushed), int(depth)

    def fetch(self, job_ids: Sequence[str]) -> list[bytes | None]:
        with _reaching(self._results_url):
            found = self._results.mget([result_key(job_id) for job_id in job_ids])
        return list(found)

    def listen(self, channel: str) -> None:
        self.unlisten()
        if not is_reply_channel(channel):
            return
        with _reaching(self._results_url), _no_permission(channel):
            pubsub = self._listener.pubsub()
            pubsub.subscribe(channel)
            pubsub.get_message(timeout=COMMAND_TIMEOUT_S)
            self._pubsub = pubsub

    def receive(self, timeout_s: float) -> list[Heard]:
        if self._pubsub is None:
            time.sleep(timeout_s)
            return []
        with _reaching(self._results_url):
            message = self._pubsub.get_message(timeout=timeout_s)
        return _announced(message) if message is not None else []

    def unlisten(self) -> None:
        if self._pubsub is not None:
            self._pubsub.close()
            self._pubsub = None

    def revoke(self, job_ids: Sequence[str]) -> None:
        channel, message = revoke_message(job_ids, self._db)
        with _reaching(self._broker_url):
            self._broker.publish(channel, message)

    def cards(self) -> list[WorkerCard]:
        with _reaching(self._broker_url):
            return read_cards(self._broker)

    def depth(self, queue: str) -> int:
        with _reaching(self._broker_url), self._broker.pipeline(transaction=False) as pipe:
            for key in queue_keys(queue):
                pipe.llen(key)
            return int(sum(pipe.execute()))

    def close(self) -> None:
        self._push.close()
        for client in (self._broker, self._results, self._listener):
            client.close()


class AsyncRedisWire:
    """``AsyncWire`` over ``redis.asyncio``."""

    def __init__(self, settings: Settings) -> None:
        from redis.asyncio import BlockingConnectionPool, Redis
        from redis.asyncio.retry import Retry

        self._broker_url, self._results_url = settings.broker, settings.results
        once = Retry(ConstantBackoff(0.05), 1, (redis.ConnectionError,))
        never = Retry(NoBackoff(), 0)
        self._broker: Any
        self._listener: Any
        self._publisher: Any
        with _valid(self._broker_url):
            options = {**_client_options(settings, once), "max_connections": ASYNC_CONNECTIONS, "timeout": None}
            self._broker = Redis.from_pool(BlockingConnectionPool.from_url(self._broker_url, **options))
        with _valid(self._results_url):
            self._listener = Redis.from_url(self._results_url, **_client_options(settings, never))
            self._publisher = Redis.from_url(self._broker_url, **_client_options(settings, never))
        self._push = self._broker.register_script(PUSH_SCRIPT)
        self._line = AsyncScriptLine(self._publisher, PUSH_SCRIPT, COMMAND_TIMEOUT_S)
        # A long answer may take longer than a command to cross the network, as long as it comes.
        self._results = AsyncLine(self._listener, COMMAND_TIMEOUT_S, patience_s=COMMAND_TIMEOUT_S)
        self._db = int(self._broker.get_connection_kwargs().get("db", 0))
        self._subscription: Subscription | None = None

    async def push(self, envelope: Envelope, messages: Sequence[bytes], *, partial: bool) -> tuple[int, int]:
        keys, args = push_arguments(envelope, messages, partial=partial)
        push = self._pooled if self._line.taken else self._line.run
        # As ``_reaching``, which takes longer.
        try:
            pushed, depth = await push(keys, args)
        except (RedisError, OSError) as error:
            raise unavailable(self._broker_url, error) from error
        return int(pushed), int(depth)

    async def _pooled(self, keys: Sequence[Any], args: Sequence[Any]) -> Any:
        with heeded():
            try:
                return await self._push(keys, args)
            except ResponseError as error:
                if not outdated(error):
                    raise
                # The one that answered is among them.
                await self._broker.connection_pool.disconnect(inuse_connections=False)
                return await self._push(keys, args)

    async def fetch(self, job_ids: Sequence[str]) -> list[bytes | None]:
        with _reaching(self._results_url):
            found = await self._results.ask(packed("MGET", *[result_key(job_id) for job_id in job_ids]))
        return list(found)

    async def listen(
        self, channel: str, heard: Callable[[list[Heard]], None], lost: Callable[[BrokerUnavailable], None]
    ) -> None:
        await self.unlisten()
        if not is_reply_channel(channel):
            return
        url = self._results_url
        with _reaching(url), _no_permission(channel):
            line = await Subscription.open(
                self._listener, lambda message: heard(read_reply(message)), lambda error: lost(unavailable(url, error))
            )
            try:
                await line.begin(packed("SUBSCRIBE", channel), COMMAND_TIMEOUT_S, _CHECK_S)
            except BaseException:
                await line.close()
                raise
            self._subscription = line

    async def unlisten(self) -> None:
        if self._subscription is not None:
            subscription, self._subscription = self._subscription, None
            await subscription.close()

    async def revoke(self, job_ids: Sequence[str]) -> None:
        channel, message = revoke_message(job_ids, self._db)
        with _reaching(self._broker_url), heeded():
            await self._broker.publish(channel, message)

    async def cards(self) -> list[WorkerCard]:
        with _reaching(self._broker_url), heeded():
            nodes = [node.decode() for node in await self._broker.zrange(WORKERS_KEY, 0, -1)]
            raw = await self._broker.mget([worker_key(node) for node in nodes]) if nodes else []
        return parse_cards(raw)

    async def depth(self, queue: str) -> int:
        with _reaching(self._broker_url), heeded():
            async with self._broker.pipeline(transaction=False) as pipe:
                for key in queue_keys(queue):
                    pipe.llen(key)
                return int(sum(await pipe.execute()))

    async def close(self) -> None:
        await self.unlisten()
        for line in (self._line, self._results):
            await line.close()
        for client in (self._broker, self._publisher, self._listener):
            await client.aclose()
            await client.connection_pool.disconnect()

    def drop(self) -> None:
        for line in (self._subscription, self._line, self._results):
            if line is not None:
                line.drop()
        for client in (self._broker, self._publisher, self._listener):
            drop(pooled(client))
