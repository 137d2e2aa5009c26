"""How answers come back: one subscription a client, polling as the safety net.

``Book`` knows which answers are awaited, what to fetch and when; it does no IO and reads no clock. ``Replies``
drives it with a thread, ``AsyncReplies`` with a task. A worker announces the jobs that it finished together in one
message, which carries their results unless they are long; those are fetched in one round trip. An announcement may be
lost, and a stock worker makes none: so keys are polled as well, first soon, then at growing intervals, and all of them
at once after a reconnect.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final
from weakref import WeakValueDictionary

from cortex_tasks import codec
from cortex_tasks.errors import BrokerUnavailable, CortexError, ModelError, ResultLost
from cortex_tasks.polling import LOOK_KEYS, Round
from cortex_tasks.results import FINAL_STATES
from cortex_tasks.wire import AsyncWire, Wire

__all__ = ["AsyncReplies", "Book", "LoopTicket", "Outcome", "Replies", "ThreadTicket", "Ticket"]

_log = logging.getLogger(__name__)

#: How a job ended: its final result meta, or why there is none.
Outcome = Mapping[str, Any] | CortexError

FIRST_POLL_S: Final = 0.05
LONGEST_POLL_S: Final = 1.0
#: Keys of one MGET.
FETCH_KEYS: Final = 500
#: A listener with nothing awaited ends after so long, and begins anew when needed.
IDLE_S: Final = 30.0
_NEVER: Final = float("inf")


class Ticket:
    """One awaited job. Whoever awaits the job holds it; the book does not keep it alive."""

    __slots__ = ("__weakref__", "id", "outcome")

    def __init__(self, job_id: str) -> None:
        self.id = job_id
        self.outcome: Outcome | None = None

    def settle(self, outcome: Outcome) -> None:
        """The job is over. Only the first outcome counts."""
        if self.outcome is None:
            self.outcome = outcome
            self._wake()

    def _wake(self) -> None:
        raise NotImplementedError


class ThreadTicket(Ticket):
    """A ticket that threads wait on."""

    __slots__ = ("_gate",)

    def __init__(self, job_id: str) -> None:
        super().__init__(job_id)
        # A bare lock, held until the job is over: far cheaper than an Event for each job.
        self._gate = threading.Lock()
        self._gate.acquire()

    def _wake(self) -> None:
        self._gate.release()

    def wait(self, timeout_s: float) -> bool:
        """Whether the job is over, waiting up to ``timeout_s``."""
        if self.outcome is not None:
            return True
        if self._gate.acquire(timeout=min(max(0.0, timeout_s), threading.TIMEOUT_MAX)):
            self._gate.release()
            return True
        return False


class LoopTicket(Ticket):
    """A ticket that coroutines of one event loop wait on."""

    __slots__ = ("_waiters",)

    def __init__(self, job_id: str) -> None:
        super().__init__(job_id)
        self._waiters: list[asyncio.Future[None]] = []

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def wait(self, timeout_s: float) -> bool:
        """Whether the job is over, waiting up to ``timeout_s``."""
        if self.outcome is not None:
            return True
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            async with asyncio.timeout(timeout_s if timeout_s != _NEVER else None):
                await waiter
        except TimeoutError:
            return self.outcome is not None
        finally:
            self._waiters.remove(waiter)
        return True


class Book:
    """Which answers are awaited, and when to look for them. Times are seconds of one monotonic clock."""

    def __init__(self) -> None:
        self._awaited: WeakValueDictionary[str, Ticket] = WeakValueDictionary()
        #: Announced, but not found when fetched: lost, if the next look does not find them either.
        self._missing: set[str] = set()
        self._round = Round()
        self._sweeps = False
        self._pause_s = FIRST_POLL_S
        self._next_poll = _NEVER
        self._last_poll = 0.0

    def __len__(self) -> int:
        return len(self._awaited)

    def add(self, tickets: Iterable[Ticket], now: float) -> None:
        """Await these jobs."""
        if self._next_poll == _NEVER:
            self._last_poll = now
        for ticket in tickets:
            if ticket.outcome is None:
                self._awaited[ticket.id] = ticket
        self._soon(now)

    def forget(self, tickets: Iterable[Ticket]) -> None:
        """Await these no longer."""
        for ticket in tickets:
            self._awaited.pop(ticket.id, None)

    def poll_now(self) -> None:
        """Announcements may have been missed: look for every answer at once."""
        self._next_poll, self._sweeps = 0.0, True

    def heard(self, jobs: Iterable[codec.Heard], now: float) -> list[str]:
        """Take the results that announcements carried; returns which of the announced jobs to fetch."""
        wanted = [(job_id, raw) for job_id, raw in jobs if job_id in self._awaited]
        for job_id, raw in wanted:
            if raw is not None:
                self.received([job_id], [raw], now, announced=False)
        if wanted:
            self._soon(now)
        return [job_id for job_id, raw in wanted if raw is None]

    def due(self, now: float) -> list[str]:
        """The jobs to poll for, if it is time to."""
        if now < self._next_poll:
            return []
        if self._sweeps:
            ids = list(self._awaited.keys())
        else:
            self._missing = {job_id for job_id in self._missing if job_id in self._awaited}
            ids = list(dict.fromkeys([*self._missing, *self._round.pick(self._awaited.keys(), len(self._awaited))]))
        self._sweeps = False
        self._last_poll = now
        self._pause_s = min(self._pause_s * 2, LONGEST_POLL_S)
        self._next_poll = now + self._pause_s if ids else _NEVER
        return ids

    def wait_s(self, now: float) -> float:
        """How long nothing needs to be done unless something is announced."""
        return max(0.0, self._next_poll - now)

    def received(self, job_ids: Sequence[str], raws: Sequence[bytes | None], now: float, *, announced: bool) -> None:
        """What a fetch found."""
        before = len(self._awaited)
        for job_id, raw in zip(job_ids, raws, strict=True):
            ticket = self._awaited.get(job_id)
            if ticket is None:
                continue
            outcome = _outcome(raw) if raw is not None else self._lost(job_id, announced)
            if outcome is not None:
                self._awaited.pop(job_id, None)
                self._missing.discard(job_id)
                ticket.settle(outcome)
        if announced:
            self._soon(now)
        elif before > LOOK_KEYS and len(self._awaited) < before:
            # Nobody announced these: there are more where they came from.
            self._next_poll = now

    def _soon(self, now: float) -> None:
        # While announcements arrive nothing needs polling, but one of them may still have been lost.
        self._pause_s = FIRST_POLL_S
        self._next_poll = min(now + FIRST_POLL_S, self._last_poll + LONGEST_POLL_S)

    def _lost(self, job_id: str, announced: bool) -> ResultLost | None:
        if announced:
            self._missing.add(job_id)
        elif job_id in self._missing:
            return ResultLost("the answer was announced, but expired or was evicted before it was read; submit again")
        return None


def _outcome(raw: bytes) -> Outcome | None:
    """A stored result meta, if it is final. One that nobody can read is an outcome too."""
    try:
        meta = codec.loads(raw)
        return meta if meta["status"] in FINAL_STATES else None
    except (ValueError, KeyError, TypeError) as error:
        return ModelError(f"the stored answer cannot be read: {error}")


def _chunks(job_ids: list[str]) -> list[list[str]]:
    return [job_ids[first : first + FETCH_KEYS] for first in range(0, len(job_ids), FETCH_KEYS)]


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
        #: Why nothing can be heard at the moment, if so.
        self.down: BrokerUnavailable | None = None

    def watch(self, tickets: Iterable[Ticket]) -> None:
        """Await these jobs; call it before they are published. Raises BrokerUnavailable."""
        with self._changed:
            if self._thread is None:
                self._wire.listen(self._channel)
                self._closed = False
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
        """End the thread."""
        with self._changed:
            thread, self._closed = self._thread, True
            self._changed.notify_all()
        if thread is not None and thread is not threading.current_thread():
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
            except BrokerUnavailable as error:
                self.down = error
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
        """Await these jobs; call it before they are published. Raises BrokerUnavailable."""
        if self._task is None or self._task.done():
            async with self._starting:
                if self._task is None or self._task.done():
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
        """End the task."""
        task, self._task = self._task, None
        while task is not None and not task.done():
            task.cancel()
            # Python 3.11's wait_for, which redis-py uses, loses a cancellation that comes as what it awaits is done.
            await asyncio.wait({task}, timeout=FIRST_POLL_S)

    async def _listen(self) -> None:
        self._lost = None
        await self._wire.listen(self._channel, self._on_heard, self._on_lost)

    def _on_heard(self, jobs: Iterable[codec.Heard]) -> None:
        self._announced += self._book.heard(jobs, self._clock())
        if self._announced:
            self._news.set()

    def _on_lost(self, error: BrokerUnavailable) -> None:
        self._lost = error
        self._news.set()

    async def _run(self) -> None:
        pause_s = FIRST_POLL_S
        while True:
            try:
                if self.down is not None:
                    await self._listen()
                    self._book.poll_now()
                await self._turn()
                self.down, pause_s = None, FIRST_POLL_S
            except BrokerUnavailable as error:
                self.down = error
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
        self._idle = not len(self._book)
        nap_s = None if self._idle else min(self._book.wait_s(self._clock()), self._NAP_S)
        with suppress(TimeoutError):
            async with asyncio.timeout(nap_s):
                await self._news.wait()
        self._idle = False
