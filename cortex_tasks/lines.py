"""One Lua script over one connection, and nothing in between.

redis-py's way through pool, retries, clocks and metrics costs more than the command: on an idle machine, whose caches
have forgotten it, 0.15 to 0.2 ms before the first byte leaves. A line holds a connection for its script and sends at
once; who finds it taken goes through the pool.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any, Final, cast

import redis
from hiredis import pack_command
from redis.exceptions import NoScriptError, ReadOnlyError, RedisError, ResponseError

from cortex_tasks.errors import ClientClosed
from cortex_tasks.loop_line import Pipe

__all__ = ["AsyncLine", "AsyncScriptLine", "ScriptLine", "outdated", "packed"]

#: Commands of one connection that are under way at once.
_UNDER_WAY: Final = 16


def packed(*command: str | bytes | int | float) -> bytes:
    """A command as it travels, in one call into C: redis-py's way of packing costs as much as all else of sending one,
    the asynchronous one (written in Python) several times that."""
    # hiredis' stub takes a tuple of one element.
    travelling: bytes = pack_command(cast("tuple[Any]", command))
    return travelling


def _by_name(script: Any, keys: Sequence[Any], args: Sequence[Any]) -> bytes:
    return packed("EVALSHA", script.sha, len(keys), *keys, *args)


def _by_text(script: Any, keys: Sequence[Any], args: Sequence[Any]) -> bytes:
    """For a Redis that does not know the script by its name."""
    return packed("EVAL", script.script, len(keys), *keys, *args)


def outdated(error: BaseException) -> bool:
    """Whether a new connection may mend this: the old one was lost, or leads to what became a replica in a failover,
    while the address leads to the new primary by now."""
    # A script's error has no class of its own before Redis 7.
    read_only = isinstance(error, ReadOnlyError) or (isinstance(error, ResponseError) and "-READONLY " in str(error))
    return read_only or isinstance(error, redis.ConnectionError)


class ScriptLine:
    """For threads. ``client``: a redis-py client, whose settings count."""

    def __init__(self, client: Any, script: str) -> None:
        self._script = client.register_script(script)
        self._pool = client.connection_pool
        self._connection: Any = None
        self._taken = threading.Lock()

    def run(self, keys: Sequence[Any], args: Sequence[Any]) -> Any:
        """What the script returns. Raises what redis-py raises; what a new connection may mend is tried once more."""
        if not self._taken.acquire(blocking=False):
            return self._pooled(keys, args)
        try:
            try:
                return self._try_twice(_by_name(self._script, keys, args))
            except NoScriptError:
                return self._try_twice(_by_text(self._script, keys, args))
        finally:
            self._taken.release()

    def _pooled(self, keys: Sequence[Any], args: Sequence[Any]) -> Any:
        try:
            return self._script(keys, args)
        except ResponseError as error:
            if not outdated(error):
                raise
            # The one that answered is among them.
            self._pool.disconnect(inuse_connections=False)
            return self._script(keys, args)

    def _try_twice(self, command: bytes) -> Any:
        try:
            return self._call(command)
        except RedisError as error:
            if not outdated(error):
                raise
            return self._call(command)

    def _call(self, command: bytes) -> Any:
        if self._connection is None:
            self._connection = self._pool.get_connection()
        # It connects anew by itself.
        try:
            self._connection.send_packed_command([command])
            return self._connection.read_response()
        except BaseException as error:
            # Anything but an answer, Ctrl-C for one: nobody else may read what is still to come.
            if not isinstance(error, ResponseError) or outdated(error):
                self._connection.disconnect()
            raise

    def close(self) -> None:
        """Give the connection back."""
        with self._taken:
            connection, self._connection = self._connection, None
            if connection is not None:
                self._pool.release(connection)


class AsyncLine:
    """For the coroutines of one event loop, several of which may be under way at once.

    ``client``: a ``redis.asyncio`` client, whose settings count. ``timeout_s``: how long a command may take;
    ``patience_s``: see ``Pipe``.
    """

    def __init__(self, client: Any, timeout_s: float, patience_s: float | None = None) -> None:
        self._client = client
        self._timeout_s = timeout_s
        self._patience_s = patience_s
        self._pipe: Pipe | None = None
        self._opening = asyncio.Lock()
        self._closed = False

    @property
    def taken(self) -> bool:
        """Whether another command would have to wait long for its turn."""
        pipe = self._pipe
        return pipe is not None and (len(pipe) >= _UNDER_WAY or pipe.congested)

    async def ask(self, command: bytes, until_s: float | None = None) -> Any:
        """The answer to a packed command. Raises ClientClosed, and what redis-py raises; what a new connection may mend
        is tried once more. ``until_s``: of the loop's clock."""
        if until_s is None:
            until_s = self._until_s()
        try:
            try:
                return await self._call(command, until_s)
            except RedisError as error:
                if not outdated(error):
                    raise
                return await self._call(command, until_s)
        except redis.TimeoutError as error:
            raise redis.TimeoutError(f"no answer within {self._timeout_s:g} s") from error

    def _until_s(self) -> float:
        return asyncio.get_running_loop().time() + self._timeout_s

    async def _call(self, command: bytes, until_s: float) -> Any:
        pipe = self._pipe
        if pipe is None or pipe.lost is not None:
            pipe = await self._open(until_s)
        try:
            return await pipe.ask(command, until_s)
        except ResponseError as error:
            if outdated(error):
                pipe.abort()
            raise

    async def _open(self, until_s: float) -> Pipe:
        try:
            async with asyncio.timeout_at(until_s):
                return await self._open_now()
        except TimeoutError:
            raise redis.TimeoutError("no connection in time") from None

    async def _open_now(self) -> Pipe:
        async with self._opening:
            if self._closed:
                raise ClientClosed("the client was closed while it asked Redis")
            if self._pipe is not None and self._pipe.lost is not None:
                lost, self._pipe = self._pipe, None
                await lost.close()
            if self._pipe is None:
                self._pipe = await Pipe.open(self._client, self._patience_s)
            return self._pipe

    async def close(self) -> None:
        """End the connection, for good."""
        self._closed = True
        async with self._opening:
            pipe, self._pipe = self._pipe, None
        if pipe is not None:
            await pipe.close()

    def drop(self) -> None:
        """``close``, where the event loop was closed before."""
        self._closed = True
        if self._pipe is not None:
            self._pipe.drop()


class AsyncScriptLine(AsyncLine):
    """One script over an ``AsyncLine``."""

    def __init__(self, client: Any, script: str, timeout_s: float) -> None:
        super().__init__(client, timeout_s)
        self._script = client.register_script(script)

    async def run(self, keys: Sequence[Any], args: Sequence[Any]) -> Any:
        """What the script returns. Raises what redis-py raises; what a new connection may mend is tried once more."""
        until_s = self._until_s()
        try:
            return await self.ask(_by_name(self._script, keys, args), until_s)
        except NoScriptError:
            return await self.ask(_by_text(self._script, keys, args), until_s)
