"""How answers come back: one subscription a client, polling as the safety net.

``Replies`` drives a ``Book`` with a thread, ``AsyncReplies`` with a task. A worker announces the jobs that it finished
together in one message, which carries their results unless they are long; those are fetched in one round trip.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Final

from cortex_tasks import codec
from cortex_tasks.book import FIRST_POLL_S, LONGEST_POLL_S, Book, Ticket, closed
from cortex_tasks.errors import BrokerUnavailable
from cortex_tasks.loop_line import abandoned
from cortex_tasks.quiet import Quiet
from cortex_tasks.wire import AsyncWire, Wire

__all__ = ["AsyncReplies", "Replies"]

_log = logging.getLogger(__name__)

#: Keys of one MGET.
FETCH_KEYS: Final = 500
#: A listener with nothing awaited ends after so long, and begins anew when needed.
IDLE_S: Final = 30.0


def _chunks(job_ids: list[str]) -> list[list[str]]:
    return [job_ids[first : first + FETCH_KEYS] for first in range(0, len(job_ids), FETCH_KEYS)]


def _down(error: Exception) -> BrokerUnavailable:
    """Why nothing is heard. What Redis did not say is a defect, over which the answers to others are not given up."""
    if isinstance(error, BrokerUnavailable):
        return error
    _log.error("reading answers failed, and begins anew", exc_info=error)
    return BrokerUnavailable(f"reading answers failed: {type(error).__name__}: {error}")


class _Failures:
    """Why subscribing failed, for those who meanwhile waited for their turn to try: a Redis that hangs is not tried by
    one after the other, each for a whole time-out."""

    def __init__(self) -> None:
        self.count = 0
        self._last = BrokerUnavailable()

    def check(self, seen: int) -> None:
        """Raise the last one, if there were more than ``seen``."""
        if self.count > seen:
            raise BrokerUnavailable(self._last.message, self._last.details)

    @contextmanager
    def noted(self) -> Iterator[None]:
        """A failure of the block counts."""
        try:
            yield
        except BrokerUnavailable as error:
            self.count, self._last = self.count + 1, error
            raise


class Replies:
    """The subscription of a ``Cortex`` and the thread that reads it, both there only while answers are awaited."""

    #: The longest the thread sleeps while answers are awaited, so that a new ticket's first poll is not late.
    _NAP_S = 0.05

    def __init__(self, wire: Wire, channel: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._wire = wire
        self._channel = channel
        self._clock = clock
        self._book = Book()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._failures = _Failures()
        #: Why nothing can be heard at the moment, if so.
        self.down: BrokerUnavailable | None = None

    def watch(self, tickets: Iterable[Ticket]) -> None:
        """Await these jobs; call it before they are published. Raises BrokerUnavailable, ClientClosed."""
        seen = self._failures.count
        with Quiet(), self._changed:
            if self._closed:
                raise closed()
            # One may be there that the system refused to start, or that ended as no thread should.
            if self._thread is None or not self._thread.is_alive():
                self._failures.check(seen)
                with self._failures.noted():
                    self._wire.listen(self._channel)
                self._thread = threading.Thread(target=self._run, name="cortex-replies", daemon=True)
                self._thread.start()
            self._book.add(tickets, self._clock())
            self._changed.notify_all()

    def forget(self, tickets: Sequence[Ticket]) -> None:
        """Await these no longer."""
        with self._changed:
            self._book.forget(tickets)

    @contextmanager
    def giving_up(self, tickets: Sequence[Ticket]) -> Iterator[None]:
        """Await these no longer when the block fails: a time-out, Ctrl-C, a full queue."""
        try:
            yield
        except BaseException:
            self.forget(tickets)
            raise

    def close(self) -> None:
        """End the thread, for good. Whoever waits is told so."""
        with self._changed:
            thread, self._closed = self._thread, True
            self._book.close()
            self._changed.notify_all()
        if thread is not None and thread.is_alive() and thread is not threading.current_thread():
            thread.join(5)

    def _run(self) -> None:
        pause_s = FIRST_POLL_S
        while self._needed():
            try:
                if self.down is not None:
                    self._wire.listen(self._channel)
                    with self._changed:
                        self._book.poll_now()
                self._turn()
                self.down, pause_s = None, FIRST_POLL_S
            except Exception as error:
                self.down = _down(error)
                with self._changed:
                    self._changed.wait_for(lambda: self._closed, timeout=pause_s)
                pause_s = min(pause_s * 2, LONGEST_POLL_S)

    def _needed(self) -> bool:
        """Wait until an answer is awaited. False: the thread is to end."""
        with self._changed:
            if not self._closed and not len(self._book):
                self._changed.wait_for(lambda: self._closed or len(self._book), timeout=IDLE_S)
            if not self._closed and len(self._book):
                return True
            # Under the lock: whoever comes next starts a thread and a subscription of their own.
            self._wire.unlisten()
            self._thread, self.down = None, None
            return False

    def _turn(self) -> None:
        with self._changed:
            wait_s = self._book.wait_s(self._clock())
        heard = self._wire.receive(min(wait_s, self._NAP_S))
        with self._changed:
            now = self._clock()
            announced, due = self._book.heard(heard, now), self._book.due(now)
        for ids, was_announced in ((announced, True), (due, False)):
            for chunk in _chunks(ids):
                raws = self._wire.fetch(chunk)
                with self._changed:
                    self._book.received(chunk, raws, self._clock(), announced=was_announced)


class AsyncReplies:
    """The subscription of an ``AsyncCortex``, and the task that polls; see ``Replies``.

    What an announcement carries is given to whoever waits for it at once, in the turn of the loop in which it came.
    """

    #: The longest the task sleeps while answers are awaited, so that a new ticket's first poll is not late.
    _NAP_S = 0.05

    def __init__(self, wire: AsyncWire, channel: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._wire = wire
        self._channel = channel
        self._clock = clock
        self._book = Book()
        self._starting = asyncio.Lock()
        self._failures = _Failures()
        self._closed = False
        #: Something for the task to do before its time.
        self._news = asyncio.Event()
        #: The task sleeps until there are news.
        self._idle = False
        self._task: asyncio.Task[None] | None = None
        #: Announced, and to be fetched.
        self._announced: list[str] = []
        self._lost: BrokerUnavailable | None = None
        self.down: BrokerUnavailable | None = None

    async def watch(self, tickets: Iterable[Ticket]) -> None:
        """Await these jobs; call it before they are published. Raises BrokerUnavailable, ClientClosed."""
        if self._task is None or self._task.done():
            seen = self._failures.count
            async with self._starting:
                if self._closed:
                    raise closed()
                if self._task is None or self._task.done():
                    self._failures.check(seen)
                    with self._failures.noted():
                        await self._listen()
                    self.down = None
                    self._task = asyncio.create_task(self._run(), name="cortex-replies")
        self._book.add(tickets, self._clock())
        if self._idle:
            self._news.set()

    def forget(self, tickets: Sequence[Ticket]) -> None:
        """Await these no longer."""
        self._book.forget(tickets)

    @contextmanager
    def giving_up(self, tickets: Sequence[Ticket]) -> Iterator[None]:
        """Await these no longer when the block fails: a time-out, a cancelled coroutine, a full queue."""
        try:
            yield
        except BaseException:
            self._book.forget(tickets)
            raise

    async def close(self) -> None:
        """End the task, for good. Whoever waits is told so."""
        self._closed = True
        self._book.close()
        task, self._task = self._task, None
        while task is not None and not task.done():
            task.cancel()
            # Python 3.11's wait_for, which redis-py uses, loses a cancellation that comes as what it awaits is done.
            await asyncio.wait({task}, timeout=FIRST_POLL_S)

    def drop(self) -> None:
        """``close``, where the event loop was closed before: nobody is there to wait."""
        self._closed = True
        if self._task is not None:
            abandoned(self._task)

    async def _listen(self) -> None:
        self._lost = None
        await self._wire.listen(self._channel, self._on_heard, self._on_lost)
        if self._closed:
            # Meanwhile: nobody else would give this connection back.
            await self._wire.unlisten()
            raise closed()

    def _on_heard(self, jobs: Iterable[codec.Heard]) -> None:
        self._announced += self._book.heard(jobs, self._clock())
        if self._announced:
            self._news.set()

    def _on_lost(self, error: BrokerUnavailable) -> None:
        self._lost = error
        self._news.set()

    async def _run(self) -> None:
        pause_s = FIRST_POLL_S
        task = asyncio.current_task()
        assert task is not None
        # asyncio.run cancels once, which redis-py may lose (see ``close``); the task itself remembers it.
        while not task.cancelling():
            try:
                if self.down is not None:
                    await self._listen()
                    self._book.poll_now()
                await self._turn()
                self.down, pause_s = None, FIRST_POLL_S
            except Exception as error:
                self.down = _down(error)
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, LONGEST_POLL_S)

    async def _turn(self) -> None:
        await self._rest()
        if self._lost is not None:
            raise self._lost
        announced, self._announced = self._announced, []
        for ids, was_announced in ((announced, True), (self._book.due(self._clock()), False)):
            for chunk in _chunks(ids):
                raws = await self._wire.fetch(chunk)
                self._book.received(chunk, raws, self._clock(), announced=was_announced)

    async def _rest(self) -> None:
        """Until there is something to do: news, or answers to poll for."""
        self._news.clear()
        if self._announced or self._lost is not None:
            return
        # One that was down looks at once, and does not rest: a cancellation is noticed between two turns only.
        self._idle = not len(self._book) and self.down is None
        nap_s = None if self._idle else min(self._book.wait_s(self._clock()), self._NAP_S)
        with suppress(TimeoutError):
            async with asyncio.timeout(nap_s):
                await self._news.wait()
        self._idle = False
