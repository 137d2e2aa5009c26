"""``map``: any number of inputs as a stream of jobs, a bounded number of them in flight, answers in order.

``Window`` decides, without IO, what to read, publish and hand out next; ``stream`` and ``astream`` drive it.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, TypeVar

from cortex_tasks.book import LoopTicket, ThreadTicket, Ticket, closed
from cortex_tasks.catalog import InputKind
from cortex_tasks.client.core import Draft, Order, Plan, Sifted
from cortex_tasks.client.cuts import JOB_CHARS
from cortex_tasks.client.inlet import Inlet
from cortex_tasks.client.progress import Progress
from cortex_tasks.client.stretch import stretched
from cortex_tasks.errors import ClientClosed, InvalidParameter
from cortex_tasks.payloads import Result

if TYPE_CHECKING:
    from cortex_tasks.client.aio import AsyncCortex
    from cortex_tasks.client.aio import _Link as AsyncLink
    from cortex_tasks.client.sync import Cortex
    from cortex_tasks.client.sync import _Link as Link

__all__ = ["Window", "astream", "stream"]

#: Inputs of one job.
_CHUNK: Final = {InputKind.TEXT: 64, InputKind.SERIES: 4}
#: Jobs in flight at most.
_WINDOW: Final = 64
#: A slow source is not waited for longer than this before what it gave is published.
_LINGER_S: Final = 0.05
#: Within so long the first chunk is mostly there. What else is answered, which takes a look at every chunk, is counted
#: only for longer waits.
_BRIEF_S: Final = 0.25

K = TypeVar("K", bound=Ticket)


@dataclass(slots=True)
class Chunk(Generic[K]):
    """A job of the stream, with the inputs that were refused on the spot."""

    order: Order
    #: None when every input was refused: nothing travels.
    ticket: K | None
    sent: bool
    #: Handed to the wire. Whether it arrived is not known if that was interrupted.
    tried: bool = False

    @property
    def done(self) -> bool:
        return self.ticket is None or self.ticket.outcome is not None

    @property
    def draft(self) -> Draft:
        return self.order.drafts[0]


class Window(Generic[K]):
    """The chunks that were read and not yet handed out, in order."""

    def __init__(
        self,
        plan: Plan,
        ticket: Callable[[str], K],
        *,
        chunk: int | None,
        window: int | None,
        errors: Literal["return", "raise"],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if errors not in ("return", "raise"):
            raise InvalidParameter(f"errors must be 'return' or 'raise', not {errors!r}")
        self.plan, self.clock = plan, clock
        self.chunk = _count("chunk", chunk, min(_CHUNK[plan.spec.input], plan.limits.inputs_per_job))
        if self.chunk > plan.limits.inputs_per_job:
            raise InvalidParameter(
                f"chunk is {self.chunk:,}, over the model's limit of {plan.limits.inputs_per_job:,} inputs a job"
            )
        #: A chunk of long texts ends early, unless its size was asked for.
        self.chars = JOB_CHARS if chunk is None else math.inf
        self.jobs = _count("window", window, _WINDOW)
        #: Jobs are read and published so many at a time, once there is room for them.
        self.step = max(1, self.jobs // 4)
        self.exhausted = False
        #: The source's own, raised once what came before it is handed out.
        self.source_error: BaseException | None = None
        self.retry_at = 0.0
        self.chunks: deque[Chunk[K]] = deque()
        #: What published last.
        self.carrier: Any = None
        #: What was read and is to be looked up; see ``place``.
        self.fresh: list[Sifted] = []
        self._unsent: list[Chunk[K]] = []
        self._ticket, self._raise = ticket, errors == "raise"

    def wants(self) -> bool:
        """Whether to read on."""
        return not self.exhausted and len(self.chunks) + len(self.fresh) + self.step <= self.jobs

    def add(self, inputs: Sequence[Any]) -> None:
        """The next inputs of the source: at most ``chunk``; none at all means that it has ended."""
        if not inputs:
            self.exhausted = True
            return
        sifted = self.plan.sift(inputs)
        if self.plan.question is not None:
            self.fresh.append(sifted)
        else:
            self._line_up(self.plan.draft(sifted, one_job=True))

    def place(self, found: Sequence[Result | None]) -> None:
        """Make chunks of ``fresh``. ``found``: what the cache knows of its inputs, one entry each, or none at all."""
        fresh, self.fresh = self.fresh, []
        for sifted, known in stretched(fresh, found, self.chunk, self.chars):
            self._line_up(self.plan.draft(sifted, known, one_job=True))

    def _line_up(self, order: Order) -> None:
        ticket = self._ticket(order.drafts[0].id) if order.drafts else None
        chunk = Chunk(order, ticket, sent=ticket is None)
        self.chunks.append(chunk)
        if ticket is not None:
            self._unsent.append(chunk)

    def read(self, source: Iterator[Any]) -> None:
        """Read up to ``step`` chunks, fewer from a slow source."""
        until = self.clock() + _LINGER_S
        for _ in range(self.step):
            self.add(self.take(source, until))
            if self.exhausted or self.clock() > until:
                return

    def take(self, source: Iterator[Any], until: float = math.inf) -> list[Any]:
        """The inputs of the next chunk; those that came before the source's own error, if it raises one."""
        inputs: list[Any] = []
        chars = 0
        try:
            for value in source:
                inputs.append(value)
                chars += len(value) if isinstance(value, str) else 0
                if len(inputs) == self.chunk or chars > self.chars or self.clock() > until:
                    break
        except Exception as error:
            self.source_error, self.exhausted = error, True
        return inputs

    def unsent(self) -> list[Chunk[K]]:
        """What to publish now, in order; all of it counts as tried."""
        if not self._unsent or self.clock() < self.retry_at:
            return []
        for chunk in self._unsent:
            chunk.tried = True
        return self._unsent

    def pushed(self, count: int) -> None:
        """The first so many of the unsent were published."""
        for number, chunk in enumerate(self._unsent):
            chunk.sent = chunk.tried = number < count
        self._unsent = self._unsent[count:]

    def full(self, retry_after_s: float) -> None:
        """The queue was full: publish nothing for so long."""
        self.retry_at = self.clock() + retry_after_s

    def pause_s(self) -> float:
        """How long to wait for room before another look: briefly, since the client may be closed meanwhile."""
        return min(_BRIEF_S, max(0.0, self.retry_at - self.clock()))

    def answers(self) -> list[Any]:
        """Hand out the first chunk, which is done. Raises its first error where that was asked for, ClientClosed."""
        chunk = self.chunks.popleft()
        # An answer made room in the queue.
        self.retry_at = 0.0
        outcomes = [chunk.ticket.outcome] if chunk.ticket is not None and chunk.ticket.outcome is not None else []
        if any(isinstance(outcome, ClientClosed) for outcome in outcomes):
            raise closed()
        result = chunk.order.entries(outcomes)
        return list(result.values() if self._raise else result)

    def answered(self) -> int:
        """How many of the chunks in flight are done; stands still while nothing is answered."""
        return sum(chunk.done for chunk in self.chunks)

    def unfinished(self) -> list[str]:
        """The jobs to cancel when the stream is left early."""
        return [chunk.draft.id for chunk in self.chunks if chunk.tried and not chunk.done]


def _count(name: str, value: int | None, default: int) -> int:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidParameter(f"{name} must be a whole number above 0, not {value!r}")
    return value


def stream(client: Cortex, flow: Window[ThreadTicket], inputs: Iterable[Any], progress: Progress) -> Iterator[Any]:
    """Drive a window with threads."""
    source = iter(inputs)
    try:
        while True:
            _fill(client, flow, source)
            if not flow.chunks:
                if flow.source_error is not None:
                    raise flow.source_error
                return
            first = flow.chunks[0]
            if not first.sent:
                time.sleep(flow.pause_s())
                _carrier(client, flow)
                continue
            if first.ticket is not None:
                _await_first(client, flow, first.ticket)
            found = flow.answers()
            progress.add(len(found))
            yield from found
    finally:
        progress.close()
        if unfinished := flow.unfinished():
            client._revoke(flow.carrier, unfinished)


def _fill(client: Cortex, flow: Window[ThreadTicket], source: Iterator[Any]) -> None:
    """Keep the workers busy first; go on reading only while there is nothing to hand out."""
    while flow.wants():
        flow.read(source)
        if flow.fresh:
            flow.place(_carrier(client, flow).look_up(flow.plan, _values(flow.fresh)))
        _publish(client, flow)
        if flow.chunks and flow.chunks[0].done:
            return
    _publish(client, flow)


def _carrier(client: Cortex, flow: Window[ThreadTicket]) -> Link:
    """What publishes for the stream: not what was opened anew since the client was closed. Raises ClientClosed."""
    if flow.carrier is not None and flow.carrier.closed:
        raise closed()
    link = flow.carrier = client._link()
    return link


def _values(fresh: Sequence[Sifted]) -> list[Any]:
    return [value for sifted in fresh for value in sifted.values]


def _publish(client: Cortex, flow: Window[ThreadTicket]) -> None:
    chunks = flow.unsent()
    if not chunks:
        return
    link = _carrier(client, flow)
    link.replies.watch([chunk.ticket for chunk in chunks if chunk.ticket is not None])
    pushed, depth = link.wire.push(flow.plan.envelope, [chunk.draft.message for chunk in chunks], partial=True)
    flow.pushed(pushed)
    if pushed < len(chunks):
        flow.full(flow.plan.full(len(chunks) - pushed, depth, link.wire.cards()).retry_after_s)


def _await_first(client: Cortex, flow: Window[ThreadTicket], ticket: ThreadTicket) -> None:
    """Wait for the first chunk for as long as any chunk is answered meanwhile."""
    if ticket.outcome is not None or (flow.plan.timeout_s > _BRIEF_S and ticket.wait(_BRIEF_S)):
        return
    answered = flow.answered()
    while not ticket.wait(flow.plan.timeout_s):
        if flow.answered() == answered:
            raise client._link().why_late(flow.plan, flow.plan.timeout_s)
        answered = flow.answered()


async def astream(
    client: AsyncCortex, flow: Window[LoopTicket], inputs: Iterable[Any] | AsyncIterable[Any], progress: Progress
) -> AsyncIterator[Any]:
    """Drive a window with coroutines."""
    link = client._link()
    link.streams.add(flow)
    inlet = Inlet(inputs, flow.chunk * flow.step)
    try:
        while flow.chunks or not flow.exhausted:
            await _something(link, flow, inlet)
            inlet.fill(flow)
            if flow.fresh:
                flow.place(await link.look_up(flow.plan, _values(flow.fresh)))
            await _apublish(link, flow)
            while flow.chunks and flow.chunks[0].done:
                found = flow.answers()
                progress.add(len(found))
                for item in found:
                    yield item
        if flow.source_error is not None:
            raise flow.source_error
    finally:
        progress.close()
        try:
            # First of all: the client may be closing by now.
            await link.leave(flow, flow.unfinished())
        finally:
            await inlet.close()


async def _something(link: AsyncLink, flow: Window[LoopTicket], inlet: Inlet) -> None:
    """Wait until the first chunk is answered or the source has something that the window wants."""
    first = flow.chunks[0] if flow.chunks else None
    if (first is not None and first.done) or (flow.wants() and inlet.ready.is_set()):
        return
    if first is None or first.ticket is None:
        await inlet.ready.wait()
        return
    if not first.sent:
        await asyncio.sleep(flow.pause_s())
        if link.closed:
            raise closed()
        return
    if flow.plan.timeout_s > _BRIEF_S and await _moved(flow, first.ticket, inlet, _BRIEF_S):
        return
    answered = flow.answered()
    if not await _moved(flow, first.ticket, inlet, flow.plan.timeout_s) and flow.answered() == answered:
        raise await link.why_late(flow.plan, flow.plan.timeout_s)


async def _moved(flow: Window[LoopTicket], ticket: LoopTicket, inlet: Inlet, timeout_s: float) -> bool:
    if flow.wants():
        return await _either(ticket, inlet.ready, timeout_s)
    return await ticket.wait(timeout_s)


async def _either(ticket: LoopTicket, ready: asyncio.Event, timeout_s: float) -> bool:
    """Whether the job is over or the event set, waiting up to ``timeout_s``."""
    waits = {asyncio.ensure_future(ticket.wait(math.inf)), asyncio.ensure_future(ready.wait())}
    try:
        done, _ = await asyncio.wait(
            waits, timeout=None if timeout_s == math.inf else timeout_s, return_when=asyncio.FIRST_COMPLETED
        )
        return bool(done)
    finally:
        for wait in waits:
            wait.cancel()


async def _apublish(link: AsyncLink, flow: Window[LoopTicket]) -> None:
    chunks = flow.unsent()
    if not chunks:
        return
    await link.replies.watch([chunk.ticket for chunk in chunks if chunk.ticket is not None])
    pushed, depth = await link.wire.push(flow.plan.envelope, [chunk.draft.message for chunk in chunks], partial=True)
    flow.pushed(pushed)
    if pushed < len(chunks):
        flow.full(flow.plan.full(len(chunks) - pushed, depth, await link.wire.cards()).retry_after_s)
