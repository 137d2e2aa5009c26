"""Single inputs asked for at the same moment travel as one message, and come back as their own results.

Kafka's producers linger to fill a message; this never waits. Coroutines: what is asked in one turn of the event loop
goes together. Threads: what is asked while another thread publishes goes with the next one's. A lone call goes at
once and alone. A bad input, a refused message, a time-out are each caller's own error.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from typing import Any, Protocol

from cortex_tasks.book import Ticket, closed
from cortex_tasks.client.core import Draft, Plan
from cortex_tasks.client.seats import Group, LoopSeat, Pending, ThreadSeat, board, fail, grouped, together, unknown
from cortex_tasks.errors import CortexError
from cortex_tasks.loop_line import abandoned
from cortex_tasks.quiet import Quiet

__all__ = ["LoopCoalescer", "ThreadCoalescer"]


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


class LoopCoalescer:
    """For the coroutines of one event loop."""

    def __init__(self, link: LoopLink) -> None:
        self._link = link
        self._pending = Pending()
        self._scheduled = False
        #: Held here until they are settled; with the task that publishes them.
        self._riding: dict[Group, asyncio.TimerHandle | None] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        #: Who is being published, some of whom do not ride yet.
        self._departing: list[list[LoopSeat]] = []

    async def ask(self, plan: Plan, value: Any) -> Any:
        """The result of one checked input. Raises its error."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        seat = LoopSeat(value, future)
        self._pending.add(plan, seat)
        if not self._scheduled:
            self._scheduled = True
            # It begins at the loop's next turn: whoever asks before that rides along.
            self._start(self._depart())
        try:
            return await future
        except asyncio.CancelledError:
            self._leave(seat)
            raise

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _depart(self) -> None:
        self._scheduled = False
        kinds = self._pending.take()
        departing = [seat for _, seats in kinds for seat in seats]
        self._departing.append(departing)
        try:
            await self._publish(kinds)
        finally:
            self._departing.remove(departing)

    async def _publish(self, parts: list[tuple[Plan, list[LoopSeat]]]) -> None:
        made: list[Group] = []
        for plan, seats in parts:
            try:
                groups = grouped(plan, await self._look_up(plan, seats), self._settled)
            except Exception as error:
                # Nobody else would tell these callers, whose clocks do not run yet.
                fail(seats, error)
                continue
            board(groups)
            made += groups
        for groups in together(made):
            await self._push(groups)

    async def _look_up(self, plan: Plan, seats: list[LoopSeat]) -> list[LoopSeat]:
        """Those who still wait once the cache was asked."""
        if plan.question is not None:
            seats = unknown(seats, await self._link.look_up(plan, [seat.value for seat in seats]))
        return [seat for seat in seats if not seat.future.done()]

    async def _push(self, groups: list[Group]) -> None:
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        self._riding.update(dict.fromkeys(groups))
        try:
            await self._link.publish(groups[0].order.plan, groups, [group.order.drafts[0] for group in groups])
        except Exception as error:
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

    def _leave(self, seat: LoopSeat) -> None:
        """A caller was cancelled; with the last one goes the interest in the answer."""
        group = seat.group
        if group is not None:
            group.left += 1
            if group.left == len(group.seats):
                self._settled(group)
                self._link.forget([group])

    def _settled(self, group: Group) -> None:
        timer = self._riding.pop(group, None)
        if timer is not None:
            timer.cancel()

    def _late(self, group: Group) -> None:
        """The time-out of a group: say why, which takes a look at Redis."""
        self._link.forget([group])
        self._start(self._explain(group))

    async def _explain(self, group: Group) -> None:
        plan = group.order.plan
        error: Exception
        try:
            error = await self._link.why_late(plan, plan.timeout_s)
        except Exception as unavailable:
            error = unavailable
        self._riding.pop(group, None)
        group.fail(error)

    async def close(self) -> None:
        """Nobody is left waiting: who still does is told."""
        left = [seat for seats in self._departing for seat in seats]
        left += [seat for _, seats in self._pending.take() for seat in seats]
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        fail(left, closed())
        riding, self._riding = self._riding, {}
        for group, timer in riding.items():
            if timer is not None:
                timer.cancel()
            group.fail(closed())

    def drop(self) -> None:
        """``close``, where the event loop was closed before: nobody is there to wait."""
        for task in self._tasks:
            abandoned(task)


class ThreadCoalescer:
    """For the threads of one process."""

    def __init__(self, link: ThreadLink) -> None:
        self._link = link
        self._pending = Pending()
        self._lock = threading.Lock()
        # Re-entrant: publishing to a fleet in this process runs its handler, which may ask for something itself.
        self._publishing = threading.RLock()
        self._riding: set[Group] = set()

    def ask(self, plan: Plan, value: Any) -> Any:
        """The result of one checked input. Raises its error."""
        seat = ThreadSeat(value)
        with self._lock:
            self._pending.add(plan, seat)
        with Quiet(), self._publishing:
            # Whoever publishes takes everyone who came meanwhile; those then find themselves taken.
            if seat.group is None and seat.outcome is None:
                self._depart(seat)
        try:
            if not seat.wait(plan.timeout_s):
                raise self._link.why_late(plan, plan.timeout_s)
        except BaseException:
            self._leave(seat)
            raise
        if isinstance(seat.outcome, CortexError):
            raise seat.outcome
        return seat.outcome

    def _depart(self, own: ThreadSeat) -> None:
        """Publish everyone who waits. ``own``: of the thread that does."""
        with self._lock:
            kinds = self._pending.take()
        made: list[Group] = []
        try:
            for plan, seats in kinds:
                made += grouped(plan, self._look_up(plan, seats), self._riding.discard)
        except BaseException:
            # Ctrl-C in this thread: each of the others, who wait for their turn, publishes for itself.
            with self._lock:
                for plan, seats in kinds:
                    for seat in seats:
                        if seat is not own:
                            self._pending.add(plan, seat)
            raise
        board(made)
        waiting = together(made)
        try:
            while waiting:
                self._push(waiting.pop(0))
        except BaseException as error:
            for group in (group for groups in waiting for group in groups):
                group.fail(error)
            raise

    def _look_up(self, plan: Plan, seats: list[ThreadSeat]) -> list[ThreadSeat]:
        """Those who still wait once the cache was asked."""
        if plan.question is None:
            return seats
        return unknown(seats, self._link.look_up(plan, [seat.value for seat in seats]))

    def _leave(self, seat: ThreadSeat) -> None:
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

    def _push(self, groups: list[Group]) -> None:
        self._riding.update(groups)
        try:
            self._link.publish(groups[0].order.plan, groups, [group.order.drafts[0] for group in groups])
        except BaseException as error:
            self._link.forget(groups)
            self._riding.difference_update(groups)
            if not isinstance(error, CortexError):
                # Ctrl-C in the thread that publishes: the others are not left waiting.
                for group in groups:
                    group.fail(error)
                raise
            for group in groups:
                group.fail(error)
