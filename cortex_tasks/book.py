"""Which answers are awaited, and when to look for them: no IO, and no clock is read here.

An announcement may be lost, and a stock worker makes none: so keys are polled as well, first soon, then at growing
intervals, and all of them at once after a reconnect. ``replies`` drives a book with a thread or a task.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final
from weakref import ref

from cortex_tasks import codec
from cortex_tasks.errors import ClientClosed, CortexError, ModelError, ResultLost
from cortex_tasks.polling import LOOK_KEYS, Round
from cortex_tasks.results import FINAL_STATES

__all__ = ["FIRST_POLL_S", "LONGEST_POLL_S", "Book", "LoopTicket", "Outcome", "ThreadTicket", "Ticket", "closed"]

#: How a job ended: its final result meta, or why there is none.
Outcome = Mapping[str, Any] | CortexError

FIRST_POLL_S: Final = 0.05
LONGEST_POLL_S: Final = 1.0
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
        #: By their jobs' ids. Tickets that nobody holds any more are noticed when they are looked for.
        self._awaited: dict[str, ref[Ticket]] = {}
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
                self._awaited[ticket.id] = ref(ticket)
        self._soon(now)

    def forget(self, tickets: Iterable[Ticket]) -> None:
        """Await these no longer."""
        for ticket in tickets:
            self._awaited.pop(ticket.id, None)

    def close(self) -> None:
        """Nobody looks for these answers any more: whoever waits is told so."""
        awaited, self._awaited = self._awaited, {}
        for held in awaited.values():
            if (ticket := held()) is not None:
                ticket.settle(closed())

    def poll_now(self) -> None:
        """Announcements may have been missed: look for every answer at once."""
        self._next_poll, self._sweeps = 0.0, True

    def heard(self, jobs: Iterable[codec.Heard], now: float) -> list[str]:
        """Take the results that announcements carried; returns which of the announced jobs to fetch."""
        wanted = [(job_id, raw) for job_id, raw in jobs if job_id in self._awaited]
        if not wanted:
            return []
        carried = {job_id: raw for job_id, raw in wanted if raw is not None}
        self.received(list(carried), list(carried.values()), now, announced=False)
        self._soon(now)
        return [job_id for job_id, raw in wanted if raw is None]

    def due(self, now: float) -> list[str]:
        """The jobs to poll for, if it is time to."""
        if now < self._next_poll:
            return []
        if self._sweeps:
            ids = list(self._awaited)
        else:
            self._missing = {job_id for job_id in self._missing if job_id in self._awaited}
            ids = list(dict.fromkeys([*self._missing, *self._round.pick(self._awaited, len(self._awaited))]))
        dropped = [job_id for job_id in ids if self._awaited[job_id]() is None]
        for job_id in dropped:
            del self._awaited[job_id]
        self._sweeps = False
        self._last_poll = now
        self._pause_s = min(self._pause_s * 2, LONGEST_POLL_S)
        # Where some were dropped, more were: a look takes a part, and nobody is to look for minutes.
        self._next_poll = _NEVER if not self._awaited else now if dropped else now + self._pause_s
        return [job_id for job_id in ids if job_id in self._awaited]

    def wait_s(self, now: float) -> float:
        """How long nothing needs to be done unless something is announced."""
        return max(0.0, self._next_poll - now)

    def received(self, job_ids: Sequence[str], raws: Sequence[bytes | None], now: float, *, announced: bool) -> None:
        """What a fetch found."""
        before = len(self._awaited)
        for job_id, raw in zip(job_ids, raws, strict=True):
            held = self._awaited.get(job_id)
            ticket = held() if held is not None else None
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


def closed() -> ClientClosed:
    """For a call that is under way when its client is closed."""
    return ClientClosed("the client was closed during this call; its jobs that were on their way go on: ask again")


def _outcome(raw: bytes) -> Outcome | None:
    """A stored result meta, if it is final. One that nobody can read is an outcome too."""
    try:
        meta = codec.loads(raw)
        if meta["status"] == "SUCCESS" and "result" not in meta:
            raise ValueError("it has no result")
        return meta if meta["status"] in FINAL_STATES else None
    except (ValueError, KeyError, TypeError) as error:
        return ModelError(f"the stored answer cannot be read: {error}")
