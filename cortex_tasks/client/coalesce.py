"""Single inputs asked for at the same moment travel as one message, and come back as their own results.

Kafka's producers linger to fill a message; this never waits. Coroutines: what is asked in one turn of the event loop
goes together. Threads: what is asked while another thread publishes goes with the next one's. A lone call goes at
once and alone. A bad input, a refused message, a time-out are each caller's own error.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

from cortex_tasks.book import Ticket
from cortex_tasks.client.core import Draft, Order, Plan
from cortex_tasks.client.cuts import cut
from cortex_tasks.errors import CortexError

__all__ = ["LoopCoalescer", "ThreadCoalescer"]

#: Inputs and characters of one message: few enough that one answer does not wait long for the others, and that
#: several messages are in flight where many callers ask.
GROUP_INPUTS: Final = 32
GROUP_CHARS: Final = 32_768


class ThreadLink(Protocol):
    """What a ``ThreadCoalescer`` needs of its client."""

    def look_up(self, plan: Plan, values: Sequence[Any]) -> Sequence[Any]: ...
    def publish(self, plan: Plan, tickets: Sequence[Ticket], drafts: Sequence[Draft]) -> None: ...
    def forget(self, tickets: Sequence[Ticket]) -> None: ...
    def why_late(self, plan: Plan, waited_s: float) -> CortexError: ...


class LoopLink(Protocol):
    """What a ``LoopCoalescer`` needs of its client."""

    async def look_up(self, plan: Plan, values: Sequence[Any]) -> Sequence[Any]: ...
    async def publish(self, plan: Plan, tickets: Sequence[Ticket], drafts: Sequence[Draft]) -> None: ...
    def forget(self, tickets: Sequence[Ticket]) -> None: ...
    async def why_late(self, plan: Plan, waited_s: float) -> CortexError: ...


class _Seat:
    """One caller's place in a message."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def settle(self, outcome: Any) -> None:
        """The caller's result, or the CortexError to raise."""
        raise NotImplementedError


class _ThreadSeat(_Seat):
    __slots__ = ("_gate", "group", "outcome")

    def __init__(self, value: Any) -> None:
        super().__init__(value)
        self.outcome: Any = None
        #: None until a thread, this one or another, publishes it.
        self.group: _Group | None = None
        self._gate = threading.Lock()
        self._gate.acquire()

    def settle(self, outcome: Any) -> None:
        if self.outcome is None:
            self.outcome = outcome
            self._gate.release()

    def wait(self, timeout_s: float) -> bool:
        return self._gate.acquire(timeout=min(timeout_s, threading.TIMEOUT_MAX))


class _LoopSeat(_Seat):
    __slots__ = ("future", "group")

    def __init__(self, value: Any, future: asyncio.Future[Any]) -> None:
        super().__init__(value)
        self.future = future
        #: None until it is published.
        self.group: _Group | None = None

    def settle(self, outcome: Any) -> None:
        if self.future.done():
            return
        if isinstance(outcome, CortexError):
            self.future.set_exception(outcome)
        else:
            self.future.set_result(outcome)


class _Group(Ticket):
    """The callers who share one message, and the ticket of its job."""

    __slots__ = ("_on_settled", "left", "order", "seats")

    def __init__(self, order: Order, seats: Sequence[_Seat], on_settled: Callable[[_Group], None]) -> None:
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
        except CortexError as error:
            self.fail(error)
            return
        for seat, item in zip(self.seats, items, strict=True):
            seat.settle(item)

    def fail(self, error: CortexError) -> None:
        """Each caller raises an error of its own, so that their tracebacks do not grow into one another."""
        for seat in self.seats:
            seat.settle(type(error)(error.message, error.details))


class _Pending:
    """Who waits to be published, by kind of job. Not thread-safe."""

    def __init__(self) -> None:
        self._kinds: dict[Any, tuple[Plan, list[Any]]] = {}

    def add(self, plan: Plan, seat: _Seat) -> None:
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
    """Seats in lists that fit in a message each."""
    if len(seats) == 1:
        return [seats]
    most = min(GROUP_INPUTS, plan.limits.inputs_per_job)
    return [seats[part] for part in cut([seat.value for seat in seats], most, GROUP_CHARS)]


def _unknown(seats: list[Any], found: Sequence[Any]) -> list[Any]:
    """The seats less those for which the cache ``found`` an answer, who get it."""
    if not found:
        return seats
    for seat, item in zip(seats, found, strict=True):
        if item is not None:
            seat.settle(item)
    return [seat for seat, item in zip(seats, found, strict=True) if item is None]


class LoopCoalescer:
    """For the coroutines of one event loop."""

    def __init__(self, link: LoopLink) -> None:
        self._link = link
        self._pending = _Pending()
        self._scheduled = False
        #: Held here until they are settled; with the task that publishes them.
        self._riding: dict[_Group, asyncio.TimerHandle | None] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        #: Who is being published, some of whom do not ride yet.
        self._departing: list[list[_LoopSeat]] = []

    async def ask(self, plan: Plan, value: Any) -> Any:
        """The result of one checked input. Raises its error."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        seat = _LoopSeat(value, future)
        self._pending.add(plan, seat)
        if not self._scheduled:
            self._scheduled = True
            # It begins at the loop's next turn: whoever asks before that rides along.
            task = loop.create_task(self._depart())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        try:
            return await future
        except asyncio.CancelledError:
            self._leave(seat)
            raise

    async def _depart(self) -> None:
        self._scheduled = False
        kinds = self._pending.take()
        departing = [seat for _, seats in kinds for seat in seats]
        self._departing.append(departing)
        try:
            await self._publish(kinds)
        finally:
            self._departing.remove(departing)

    async def _publish(self, parts: list[tuple[Plan, list[_LoopSeat]]]) -> None:
        by_envelope: dict[Any, list[_Group]] = {}
        for plan, seats in parts:
            for waiting in _parts(plan, await self._look_up(plan, seats)):
                group = _Group(plan.order_checked([seat.value for seat in waiting]), waiting, self._settled)
                for seat in waiting:
                    seat.group = group
                by_envelope.setdefault(plan.envelope, []).append(group)
        for groups in by_envelope.values():
            await self._push(groups)

    async def _look_up(self, plan: Plan, seats: list[_LoopSeat]) -> list[_LoopSeat]:
        """Those who still wait once the cache was asked."""
        if plan.question is not None:
            seats = _unknown(seats, await self._link.look_up(plan, [seat.value for seat in seats]))
        return [seat for seat in seats if not seat.future.done()]

    async def _push(self, groups: list[_Group]) -> None:
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        self._riding.update(dict.fromkeys(groups))
        try:
            await self._link.publish(groups[0].order.plan, groups, [group.order.drafts[0] for group in groups])
        except CortexError as error:
            self._link.forget(groups)
            for group in groups:
                self._settled(group)
                group.fail(error)
            return
        # Only now: on an idle machine a timer costs as much as the sealing of a message.
        for group in groups:
            timeout_s = group.order.plan.timeout_s
            if group in self._riding and timeout_s < 1e9:
                self._riding[group] = loop.call_at(began_s + timeout_s, self._late, group)

    def _leave(self, seat: _LoopSeat) -> None:
        """A caller was cancelled; with the last one goes the interest in the answer."""
        group = seat.group
        if group is not None:
            group.left += 1
            if group.left == len(group.seats):
                self._settled(group)
                self._link.forget([group])

    def _settled(self, group: _Group) -> None:
        timer = self._riding.pop(group, None)
        if timer is not None:
            timer.cancel()

    def _late(self, group: _Group) -> None:
        """The time-out of a group: say why, which takes a look at Redis."""
        self._link.forget([group])
        task = asyncio.get_running_loop().create_task(self._explain(group))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _explain(self, group: _Group) -> None:
        plan = group.order.plan
        try:
            error = await self._link.why_late(plan, plan.timeout_s)
        except CortexError as unavailable:
            error = unavailable
        self._riding.pop(group, None)
        group.fail(error)

    async def close(self) -> None:
        """Nobody is left waiting: who still does gets a CancelledError."""
        left = [seat for seats in self._departing for seat in seats]
        left += [seat for _, seats in self._pending.take() for seat in seats]
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for waiting in left:
            waiting.future.cancel()
        riding, self._riding = self._riding, {}
        for group, timer in riding.items():
            if timer is not None:
                timer.cancel()
            for seat in group.seats:
                assert isinstance(seat, _LoopSeat)
                seat.future.cancel()


class ThreadCoalescer:
    """For the threads of one process."""

    def __init__(self, link: ThreadLink) -> None:
        self._link = link
        self._pending = _Pending()
        self._lock = threading.Lock()
        self._publishing = threading.Lock()
        self._riding: set[_Group] = set()

    def ask(self, plan: Plan, value: Any) -> Any:
        """The result of one checked input. Raises its error."""
        seat = _ThreadSeat(value)
        with self._lock:
            self._pending.add(plan, seat)
        with self._publishing:
            # Whoever publishes takes everyone who came meanwhile; those then find themselves taken.
            if seat.group is None and seat.outcome is None:
                self._depart()
        try:
            if not seat.wait(plan.timeout_s):
                raise self._link.why_late(plan, plan.timeout_s)
        except BaseException:
            self._leave(seat)
            raise
        if isinstance(seat.outcome, CortexError):
            raise seat.outcome
        return seat.outcome

    def _depart(self) -> None:
        with self._lock:
            kinds = self._pending.take()
        try:
            unknown = [(plan, self._look_up(plan, seats)) for plan, seats in kinds]
        except BaseException:
            # Ctrl-C in this thread: each of the others, who wait for their turn, publishes for itself.
            with self._lock:
                for plan, seats in kinds:
                    for seat in seats:
                        self._pending.add(plan, seat)
            raise
        by_envelope: dict[Any, list[_Group]] = {}
        for plan, everyone in unknown:
            for seats in _parts(plan, everyone):
                group = _Group(plan.order_checked([seat.value for seat in seats]), seats, self._riding.discard)
                for seat in seats:
                    seat.group = group
                by_envelope.setdefault(plan.envelope, []).append(group)
        for groups in by_envelope.values():
            self._push(groups)

    def _look_up(self, plan: Plan, seats: list[_ThreadSeat]) -> list[_ThreadSeat]:
        """Those who still wait once the cache was asked."""
        if plan.question is None:
            return seats
        return _unknown(seats, self._link.look_up(plan, [seat.value for seat in seats]))

    def _leave(self, seat: _ThreadSeat) -> None:
        """A caller gives up; with the last one goes the interest in the answer."""
        group = seat.group
        if group is None:
            return
        with self._lock:
            group.left += 1
            empty = group.left == len(group.seats)
        if empty:
            self._riding.discard(group)
            self._link.forget([group])

    def _push(self, groups: list[_Group]) -> None:
        self._riding.update(groups)
        try:
            self._link.publish(groups[0].order.plan, groups, [group.order.drafts[0] for group in groups])
        except BaseException as error:
            self._link.forget(groups)
            self._riding.difference_update(groups)
            if not isinstance(error, CortexError):
                # Ctrl-C in the thread that publishes: the others are not left waiting.
                for group in groups:
                    group.fail(CortexError(f"the thread that published this was interrupted: {type(error).__name__}"))
                raise
            for group in groups:
                group.fail(error)
