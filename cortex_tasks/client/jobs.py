"""A job that was submitted: ask for its state, wait for its result, cancel it."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final, Generic, Literal, TypeVar, cast

from cortex_tasks import codec
from cortex_tasks.book import LoopTicket, Outcome, ThreadTicket
from cortex_tasks.client.core import Order
from cortex_tasks.errors import ClientClosed, CortexError, InvalidParameter, JobCancelled
from cortex_tasks.publish import new_id
from cortex_tasks.results import JobResult

if TYPE_CHECKING:
    from cortex_tasks.client.aio import AsyncCortex
    from cortex_tasks.client.sync import Cortex

__all__ = ["AsyncJob", "Job", "State"]

T = TypeVar("T")
K = TypeVar("K", LoopTicket, ThreadTicket)
State = Literal["PENDING", "STARTED", "SUCCESS", "FAILURE", "REVOKED"]
_STARTED: Final = frozenset({"STARTED", "RETRY"})
_renewing: Final = threading.Lock()


def _cancelled() -> JobCancelled:
    return JobCancelled("the job was cancelled by its submitter")


def _patience_s(order: Order, timeout_s: float | None) -> float:
    """How long to wait for an answer; not at all where a caller's time is up."""
    if timeout_s is None:
        return order.plan.timeout_s
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float) or timeout_s != timeout_s:
        raise InvalidParameter(f"timeout_s must be a number of seconds, not {timeout_s!r}")
    return timeout_s


def _state(outcome: Outcome | None, stored: bytes | None) -> State:
    """The state of a job whose outcome may not be known yet. ``stored``: its result meta, as far as there is one."""
    if isinstance(outcome, JobCancelled):
        return "REVOKED"
    if isinstance(outcome, CortexError):
        return "FAILURE"
    status = outcome["status"] if outcome is not None else codec.loads(stored)["status"] if stored else "PENDING"
    return "STARTED" if status in _STARTED else cast("State", status)


class _Submitted(Generic[K]):
    """What both kinds of jobs are."""

    def __init__(self, order: Order, ticket: K | None) -> None:
        self._order = order
        # Every input was refused on the spot: nothing travels.
        self._last: K | None = ticket
        #: The Celery task id.
        self.id = ticket.id if ticket else new_id()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._order.plan.spec.name} {self.id}>"

    @property
    def _ticket(self) -> K | None:
        """A new one once the client was closed: that ended who waited, but not the job."""
        ticket = self._last
        if ticket is not None and isinstance(ticket.outcome, ClientClosed):
            with _renewing:
                # One for all who ask at the same time.
                if self._last is ticket:
                    self._last = type(ticket)(self.id)
        return self._last

    def done(self) -> bool:
        """Whether ``result`` would return or raise at once. Asks nobody."""
        ticket = self._ticket
        return ticket is None or ticket.outcome is not None


class Job(_Submitted[ThreadTicket], Generic[T]):
    """A job submitted by ``Cortex.submit``. Dropping it loses interest in the answer, but does not cancel it."""

    def __init__(self, client: Cortex, order: Order, ticket: ThreadTicket | None) -> None:
        super().__init__(order, ticket)
        self._client = client

    @property
    def state(self) -> State:
        """Celery's state. Raises BrokerUnavailable."""
        ticket = self._ticket
        if ticket is None:
            return "SUCCESS"
        stored = None if ticket.outcome else self._client._link().wire.fetch([self.id])[0]
        return _state(ticket.outcome, stored)

    def result(self, timeout_s: float | None = None) -> JobResult[T]:
        """Wait for the answer: one entry an input. May be called again after a time-out, or once the client was closed.

        Raises ResultTimeout (NoConsumer, when no worker consumes the queue), JobCancelled, DeadlineExceeded,
        ModelError when the job failed as a whole, BrokerUnavailable, ClientClosed.
        """
        patience_s, ticket = _patience_s(self._order, timeout_s), self._ticket
        if ticket is None:
            return self._order.result([])
        if ticket.outcome is None:
            # Again, since the process may have forked or the client been closed meanwhile.
            link = self._client._link()
            link.replies.watch([ticket])
            link.wait(self._order.plan, [ticket], patience_s)
        return self._order.result([cast("Outcome", ticket.outcome)])

    def cancel(self) -> bool:
        """Tell the workers to drop the job unless they have begun; False if it is over already."""
        ticket = self._ticket
        if ticket is None or ticket.outcome is not None:
            return False
        self._client._link().wire.revoke([self.id])
        ticket.settle(_cancelled())
        return True


class AsyncJob(_Submitted[LoopTicket], Generic[T]):
    """A job submitted by ``AsyncCortex.submit``; see ``Job``."""

    def __init__(self, client: AsyncCortex, order: Order, ticket: LoopTicket | None) -> None:
        super().__init__(order, ticket)
        self._client = client

    async def state(self) -> State:
        """Celery's state. Raises BrokerUnavailable."""
        ticket = self._ticket
        if ticket is None:
            return "SUCCESS"
        stored = None if ticket.outcome else (await self._client._link().wire.fetch([self.id]))[0]
        return _state(ticket.outcome, stored)

    async def result(self, timeout_s: float | None = None) -> JobResult[T]:
        """Wait for the answer: one entry an input; see ``Job.result``."""
        patience_s, ticket = _patience_s(self._order, timeout_s), self._ticket
        if ticket is None:
            return self._order.result([])
        if ticket.outcome is None:
            link = self._client._link()
            await link.replies.watch([ticket])
            await link.wait(self._order.plan, [ticket], patience_s)
        return self._order.result([cast("Outcome", ticket.outcome)])

    async def cancel(self) -> bool:
        """Tell the workers to drop the job unless they have begun; False if it is over already."""
        ticket = self._ticket
        if ticket is None or ticket.outcome is not None:
            return False
        await self._client._link().wire.revoke([self.id])
        ticket.settle(_cancelled())
        return True
