"""The callers who share a message: their seats, the groups they ride in, and who still waits to be published."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final

from cortex_tasks.book import Ticket
from cortex_tasks.client.core import Order, Plan
from cortex_tasks.client.cuts import cut, weight_of
from cortex_tasks.errors import CortexError

__all__ = ["Group", "LoopSeat", "Pending", "ThreadSeat", "board", "fail", "grouped", "together", "unknown"]

#: Inputs and characters of one message: few enough that one answer does not wait long for the others, and that
#: several messages are in flight where many callers ask.
GROUP_INPUTS: Final = 32
GROUP_CHARS: Final = 32_768


class Seat:
    """One caller's place in a message."""

    __slots__ = ("group", "value")

    def __init__(self, value: Any) -> None:
        self.value = value
        #: None until it is about to be published, by whomever.
        self.group: Group | None = None

    def settle(self, outcome: Any) -> None:
        """The caller's result, or the CortexError to raise."""
        raise NotImplementedError


class ThreadSeat(Seat):
    __slots__ = ("_gate", "outcome")

    def __init__(self, value: Any) -> None:
        super().__init__(value)
        self.outcome: Any = None
        self._gate = threading.Lock()
        self._gate.acquire()

    def settle(self, outcome: Any) -> None:
        if self.outcome is None:
            self.outcome = outcome
            self._gate.release()

    def wait(self, timeout_s: float) -> bool:
        return self._gate.acquire(timeout=min(timeout_s, threading.TIMEOUT_MAX))


class LoopSeat(Seat):
    __slots__ = ("future",)

    def __init__(self, value: Any, future: asyncio.Future[Any]) -> None:
        super().__init__(value)
        self.future = future

    def settle(self, outcome: Any) -> None:
        if self.future.done():
            return
        if isinstance(outcome, CortexError):
            self.future.set_exception(outcome)
        else:
            self.future.set_result(outcome)


class Group(Ticket):
    """The callers who share one message, and the ticket of its job."""

    __slots__ = ("_on_settled", "left", "order", "seats")

    def __init__(self, order: Order, seats: Sequence[Seat], on_settled: Callable[[Group], None]) -> None:
        super().__init__(order.drafts[0].id)
        self.order = order
        self.seats = seats
        #: Callers who have given up.
        self.left = 0
        self._on_settled = on_settled

    def _wake(self) -> None:
        self._on_settled(self)
        assert self.outcome is not None
        try:
            items: Sequence[Any] = self.order.result([self.outcome]).items
        except Exception as error:
            self.fail(error)
            return
        for seat, item in zip(self.seats, items, strict=True):
            seat.settle(item)

    def fail(self, error: BaseException) -> None:
        fail(self.seats, error)


def fail(seats: Sequence[Seat], error: BaseException) -> None:
    """Each caller raises an error of its own, so that their tracebacks do not grow into one another."""
    if not isinstance(error, CortexError):
        # A defect, or Ctrl-C in the thread that published for the others.
        error = CortexError(f"the call failed inside the client: {type(error).__name__}: {error}")
    for seat in seats:
        seat.settle(type(error)(error.message, error.details))


class Pending:
    """Who waits to be published, by kind of job. Not thread-safe."""

    def __init__(self) -> None:
        self._kinds: dict[Any, tuple[Plan, list[Any]]] = {}

    def add(self, plan: Plan, seat: Seat) -> None:
        key = (plan.envelope, plan.deadline_s, plan.timeout_s)
        known = self._kinds.get(key)
        if known is None:
            self._kinds[key] = (plan, [seat])
        else:
            known[1].append(seat)

    def take(self) -> list[tuple[Plan, list[Any]]]:
        """Everyone, by kind of job."""
        kinds, self._kinds = self._kinds, {}
        return list(kinds.values())


def _parts(plan: Plan, seats: list[Any]) -> list[list[Any]]:
    """Seats in lists that fit in a message each.

    Where they need several, alike ones share one: a worker runs texts of similar length together, and answers a message
    when the last of its texts has run.
    """
    if len(seats) == 1:
        return [seats]
    most = min(GROUP_INPUTS, plan.limits.inputs_per_job)
    if len(seats) > most:
        seats = sorted(seats, key=lambda seat: weight_of(seat.value))
    return [seats[part] for part in cut([seat.value for seat in seats], most, GROUP_CHARS)]


def grouped(plan: Plan, seats: list[Any], on_settled: Callable[[Group], None]) -> list[Group]:
    return [
        Group(plan.order_checked([seat.value for seat in part]), part, on_settled)
        for part in (_parts(plan, seats) if seats else ())
    ]


def board(groups: Sequence[Group]) -> None:
    for group in groups:
        for seat in group.seats:
            seat.group = group


def together(groups: Sequence[Group]) -> list[list[Group]]:
    """Those that one push takes."""
    by_envelope: dict[Any, list[Group]] = {}
    for group in groups:
        by_envelope.setdefault(group.order.plan.envelope, []).append(group)
    return list(by_envelope.values())


def unknown(seats: list[Any], found: Sequence[Any]) -> list[Any]:
    """The seats less those for which the cache ``found`` an answer, who get it."""
    if not found:
        return seats
    for seat, item in zip(seats, found, strict=True):
        if item is not None:
            seat.settle(item)
    return [seat for seat, item in zip(seats, found, strict=True) if item is None]
