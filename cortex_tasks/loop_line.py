"""A connection of one event loop to Redis, whose replies are taken as their bytes arrive.

redis-py opens and closes it: TLS, passwords, time-outs are its own. What it does for a reply in between (a stream, a
future, another turn of the loop, a dozen coroutines on top of each other, a time-out) costs several times what the
reply does, and on an idle machine, whose caches have forgotten it, a tenth of a millisecond (docs/performance.md).

Touches ``_writer``, ``_reader`` and ``_parser`` of redis-py's asynchronous connection and the lists of its pool; of
asyncio's transports, where their event loop was closed, their socket.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final, Self

import hiredis
import redis
from redis.exceptions import InvalidResponse

__all__ = ["LoopLine", "Pipe", "Subscription", "abandoned", "drop", "heeded", "pooled"]

_MORE: Final = object()
_PING: Final = b"*1\r\n$4\r\nPING\r\n"


@contextmanager
def heeded() -> Iterator[None]:
    """A cancellation that comes within is raised by the end of the block: Python 3.11's wait_for, which redis-py uses,
    loses one that comes as what it awaits is done."""
    task = asyncio.current_task()
    assert task is not None
    before = task.cancelling()
    yield
    if task.cancelling() > before:
        raise asyncio.CancelledError


def pooled(client: Any) -> list[Any]:
    """The connections of a ``redis.asyncio`` client."""
    pool = client.connection_pool
    return [*pool._available_connections, *pool._in_use_connections]


def drop(connections: Iterable[Any]) -> None:
    """Close connections whose event loop was closed: asyncio, which would ask that loop, can not any more."""
    for connection in connections:
        writer, connection._writer, connection._reader = connection._writer, None, None
        if writer is None:
            continue
        transport = writer.transport
        # What TLS runs over.
        carrier = getattr(getattr(transport, "_ssl_protocol", None), "_transport", None) or transport
        with suppress(RuntimeError):
            transport.abort()
        # Other loops than asyncio's own take their sockets with them.
        if (sock := getattr(carrier, "_sock", None)) is not None:
            carrier._sock = None
            sock.close()


def abandoned(task: asyncio.Task[Any]) -> None:
    """Of a loop that was closed before the task's end: it is known of, and nobody need be warned."""
    task._log_destroy_pending = False  # type: ignore[attr-defined]


class LoopLine(asyncio.Protocol):
    """Takes the place of redis-py's stream, which goes on to hear how the connection fares."""

    def __init__(self, connection: Any) -> None:
        """``connection``: redis-py's, connected, for nothing else."""
        self._connection = connection
        self._transport = connection._writer.transport
        self._stream = self._transport.get_protocol()
        self._reader: Any = hiredis.Reader(
            protocolError=InvalidResponse, replyError=connection._parser.parse_error, notEnoughData=_MORE
        )
        #: Why it is there no more.
        self.lost: redis.ConnectionError | None = None
        self._transport.set_protocol(self)

    @classmethod
    async def open(cls, client: Any, *args: Any) -> Self:
        """A new connection with the settings of a ``redis.asyncio`` client. Raises what redis-py raises."""
        pool = client.connection_pool
        connection = pool.connection_class(**pool.connection_kwargs)
        try:
            with heeded():
                await connection.connect()
        except BaseException:
            # Also where a time-out ends it halfway.
            await connection.disconnect(nowait=True)
            raise
        return cls(connection, *args)

    def send(self, command: bytes) -> None:
        """Raises redis-py's ConnectionError once it is lost."""
        if self.lost is not None:
            raise self.lost
        self._transport.write(command)

    @property
    def congested(self) -> bool:
        """Whether Redis has yet to take what was sent."""
        return bool(self._transport.get_write_buffer_size())

    def abort(self) -> None:
        """Give it up at once: it answers no more."""
        # asyncio says so a turn later, and until then somebody might ask.
        if self.lost is None:
            self.lost = redis.ConnectionError("the connection to Redis was given up")
        self._transport.abort()

    async def close(self) -> None:
        await self._connection.disconnect()

    def drop(self) -> None:
        """See ``drop``."""
        drop([self._connection])

    # ------------------------------------------------------------------------- what a subclass hears

    def _heard(self, reply: Any) -> None:
        """A reply of Redis; one that is an error is an exception."""
        raise NotImplementedError

    def _gone(self, error: redis.ConnectionError) -> None:
        """No reply will come any more."""
        raise NotImplementedError

    # ---------------------------------------------------------------------------- what asyncio calls

    def data_received(self, data: bytes) -> None:
        reader = self._reader
        reader.feed(data)
        while (reply := reader.gets()) is not _MORE:
            self._heard(reply)

    def pause_writing(self) -> None:
        self._stream.pause_writing()

    def resume_writing(self) -> None:
        self._stream.resume_writing()

    def connection_lost(self, error: Exception | None) -> None:
        self._stream.connection_lost(error)
        self.lost = redis.ConnectionError(f"the connection to Redis was lost{f': {error}' if error else ''}")
        self._gone(self.lost)


class Pipe(LoopLine):
    """Commands in, their answers out, in the same order; nobody waits for his turn."""

    def __init__(self, connection: Any, patience_s: float | None = None) -> None:
        """``patience_s``: while bytes of a long answer keep coming, it is given so much longer, again and again; None:
        an answer is whole in time, or late."""
        super().__init__(connection)
        self._asked: deque[asyncio.Future[Any]] = deque()
        self._patience_s = patience_s
        #: Whether anything came since something was asked for, or given longer.
        self._came = False

    def __len__(self) -> int:
        """Commands whose answers are still to come."""
        return len(self._asked)

    async def ask(self, command: bytes, until_s: float) -> Any:
        """Raises what redis-py raises. What is not answered in time (of the loop's clock) ends the connection: nobody
        may read a late answer."""
        self.send(command)
        self._came = False
        loop = asyncio.get_running_loop()
        answer = loop.create_future()
        self._asked.append(answer)
        timer = loop.call_at(until_s, self._late, answer)
        try:
            return await answer
        finally:
            timer.cancel()

    def data_received(self, data: bytes) -> None:
        self._came = True
        super().data_received(data)

    def _late(self, answer: asyncio.Future[Any]) -> None:
        if answer.done():
            return
        if self._came and self._patience_s is not None:
            self._came = False
            asyncio.get_running_loop().call_later(self._patience_s, self._late, answer)
            return
        answer.set_exception(redis.TimeoutError("no answer in time"))
        self.abort()

    def _heard(self, reply: Any) -> None:
        if isinstance(reply, hiredis.PushNotification):
            return
        answer = self._asked.popleft()
        # Cancelled: whoever asked has left.
        if answer.done():
            return
        if isinstance(reply, Exception):
            answer.set_exception(reply)
        else:
            answer.set_result(reply)

    def _gone(self, error: redis.ConnectionError) -> None:
        asked, self._asked = self._asked, deque()
        for answer in asked:
            if not answer.done():
                answer.set_exception(redis.ConnectionError(*error.args))


class Subscription(LoopLine):
    """What is published on one channel, handed on as it comes."""

    def __init__(
        self, connection: Any, heard: Callable[[bytes], None], gone: Callable[[redis.ConnectionError], None]
    ) -> None:
        """``heard`` is called with each message, ``gone`` once none will come any more."""
        super().__init__(connection)
        self._hand_on, self._tell_gone = heard, gone
        self._standing: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._timer: asyncio.TimerHandle | None = None
        #: Since the last check: whether anything came, and whether that was asked for.
        self._came = self._asked = True
        self._closing = False

    async def begin(self, command: bytes, timeout_s: float, check_s: float) -> None:
        """Subscribe, and return when the subscription stands; from then on see every ``check_s`` whether it does.

        ``command``: packed. Raises what redis-py raises.
        """
        self.send(command)
        try:
            async with asyncio.timeout(timeout_s):
                await self._standing
        except TimeoutError:
            raise redis.TimeoutError(f"no answer within {timeout_s:g} s") from None
        self._check(check_s)

    def _check(self, every_s: float) -> None:
        """Ask a silent connection for a word, and give it up when even that does not come."""
        if self._asked and not self._came:
            self.abort()
            return
        self._asked, self._came = not self._came, False
        if self._asked:
            self.send(_PING)
        self._timer = asyncio.get_running_loop().call_later(every_s, self._check, every_s)

    async def close(self) -> None:
        self._closing = True
        await super().close()

    def _heard(self, reply: Any) -> None:
        self._came = True
        if isinstance(reply, Exception):
            if not self._standing.done():
                self._standing.set_exception(reply)
        elif isinstance(reply, list):
            if reply[0] == b"message":
                self._hand_on(reply[2])
            elif reply[0] == b"subscribe" and not self._standing.done():
                self._standing.set_result(None)

    def _gone(self, error: redis.ConnectionError) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if not self._standing.done():
            self._standing.set_exception(error)
        elif not self._closing:
            self._tell_gone(error)
