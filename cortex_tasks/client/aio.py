"""``AsyncCortex``: the client for one asyncio event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Final, Literal, Self, Unpack, overload

from cortex_tasks import payloads as p
from cortex_tasks.book import LoopTicket, Ticket
from cortex_tasks.cache import AsyncCache, Sampler, Shelf
from cortex_tasks.client import options as o
from cortex_tasks.client.coalesce import LoopCoalescer
from cortex_tasks.client.core import Core, Draft, Order, Plan, Sifted, batches, check_timeout, resolve, timed_out
from cortex_tasks.client.jobs import AsyncJob
from cortex_tasks.client.map import Window, astream
from cortex_tasks.client.progress import Progress
from cortex_tasks.client.switches import async_wire_of, core_of
from cortex_tasks.config import FleetConfig
from cortex_tasks.errors import BrokerUnavailable, CortexError
from cortex_tasks.inputs import check_many, is_single
from cortex_tasks.payloads import CachePolicy, Lane
from cortex_tasks.replies import AsyncReplies
from cortex_tasks.results import JobResult
from cortex_tasks.settings import Settings, mask_url
from cortex_tasks.wire import AsyncWire

__all__ = ["AsyncCortex"]

#: Turns of the event loop in which an abandoned stream, or one inside another, comes to its end.
_LEAVING_TURNS: Final = 10


class _Link:
    """What belongs to one event loop."""

    def __init__(self, wire: AsyncWire, core: Core, cache: AsyncCache | None) -> None:
        self.loop = asyncio.get_running_loop()
        self.wire = wire
        self.core, self.cache = core, cache
        core.shelf = cache.shelf if cache is not None else None
        self.replies = AsyncReplies(wire, core.reply_to)
        self.singles = LoopCoalescer(self)
        #: The streams under way, and the last words of those that were left early.
        self.streams: set[object] = set()
        self._leaving: set[asyncio.Task[None]] = set()
        self.closed = False

    async def publish(self, plan: Plan, tickets: Sequence[Ticket], drafts: Sequence[Draft]) -> None:
        """Queue these jobs, all or none, and await them. Raises QueueFull, BrokerUnavailable."""
        if not drafts:
            return
        await self.replies.watch(tickets)
        try:
            sent = 0
            for batch in batches(drafts):
                messages = [draft.message for draft in batch]
                pushed, depth = await self.wire.push(plan.envelope, messages, partial=False)
                if pushed < len(batch):
                    if sent:
                        await self.wire.revoke([draft.id for draft in drafts[:sent]])
                    raise plan.full(len(batch), depth, await self.wire.cards())
                sent += pushed
        except BaseException:
            self.replies.forget(tickets)
            raise

    async def look_up(self, plan: Plan, values: Sequence[Any]) -> Sequence[p.Result | None]:
        """What the cache knows of checked inputs: one entry each, or none at all. Raises nothing."""
        if self.cache is None or plan.question is None or not values or self.closed:
            return ()
        if plan.cache == "refresh":
            self.cache.forget(plan.question, values)
            return ()
        return await self.cache.look_up(plan.question, values)

    def nearby(self, plan: Plan, value: Any) -> p.Result | None:
        """The answer to one checked input, if this process has it in memory."""
        if self.cache is None or plan.question is None or plan.cache != "use":
            return None
        return self.cache.nearby(plan.question, value)

    async def order(self, plan: Plan, sifted: Sifted, *, one_job: bool = False) -> Order:
        """Jobs for what the cache does not know."""
        return plan.draft(sifted, await self.look_up(plan, sifted.values), one_job=one_job)

    def forget(self, tickets: Sequence[Ticket]) -> None:
        """Await these no longer."""
        self.replies.forget(tickets)

    async def send(self, order: Order) -> list[LoopTicket]:
        """Publish all the jobs of an order, or none."""
        tickets = [LoopTicket(draft.id) for draft in order.drafts]
        await self.publish(order.plan, tickets, order.drafts)
        return tickets

    async def wait(self, plan: Plan, tickets: Sequence[LoopTicket], timeout_s: float) -> None:
        """Until all are over. Raises what ``why_late`` says."""
        until = time.monotonic() + timeout_s
        for ticket in tickets:
            if not await ticket.wait(until - time.monotonic()):
                raise await self.why_late(plan, timeout_s)

    async def why_late(self, plan: Plan, waited_s: float) -> CortexError:
        """Why no answer came in time: Redis, the queue, its workers."""
        if (down := self.replies.down) is not None:
            # One for each: their tracebacks are not to grow into one another.
            return BrokerUnavailable(down.message, down.details)
        return timed_out(plan, waited_s, await self.wire.depth(plan.envelope.queue), await self.wire.cards())

    async def leave(self, stream: object, unfinished: Sequence[str]) -> None:
        """A stream has ended: tell the workers to drop its jobs. Once the client is closed, nobody is told."""
        self.streams.discard(stream)
        if unfinished and not self.closed:
            # A task, for ``close`` to wait for.
            task = asyncio.create_task(self._revoke(unfinished), name="cortex-map-leave")
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)
            await task

    async def _revoke(self, job_ids: Sequence[str]) -> None:
        with suppress(BrokerUnavailable):
            await self.wire.revoke(job_ids)

    async def close(self) -> None:
        """From whatever event loop: the link's own may be over, at work in another thread, or at rest."""
        own = self.loop
        if own is asyncio.get_running_loop():
            await self._close()
        elif own.is_closed():
            self._drop()
        elif own.is_running():
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._close(), own))
        else:
            await asyncio.to_thread(own.run_until_complete, self._close())

    def _drop(self) -> None:
        """Nothing that belongs to the loop can be awaited any more."""
        self.closed = True
        self.singles.drop()
        self.replies.drop()
        self.wire.drop()
        if self.cache is not None:
            self.cache.drop()

    async def _close(self) -> None:
        # A stream that was left by ``break`` comes to its end a few turns of the loop later.
        for _ in range(_LEAVING_TURNS if self.streams else 0):
            await asyncio.sleep(0)
        await asyncio.gather(*self._leaving)
        self.closed = True
        await self.singles.close()
        await self.replies.close()
        await self.wire.close()
        if self.cache is not None:
            await self.cache.close()


class AsyncCortex:
    """``Cortex`` as coroutines, over ``redis.asyncio``: no thread a call, one event loop.

    The arguments and the errors are those of ``Cortex``. Use ``async with``, or ``await cortex.aclose()``.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        fleet: FleetConfig | None = None,
        settings: Settings | None = None,
        timeout_s: float = 30.0,
    ) -> None:
        check_timeout(timeout_s)
        chosen, fleet = resolve(url, settings, fleet)

        def cache() -> AsyncCache:
            near = fleet.cache.near
            return AsyncCache(chosen, Shelf(near.size, near.ttl_s, sampler=Sampler.of(fleet.cache_warming)))

        self._set_up(
            lambda: async_wire_of(chosen, fleet),
            lambda: core_of(chosen, fleet, timeout_s),
            mask_url(chosen.broker),
            cache,
        )

    @classmethod
    def _over(
        cls, wire: Callable[[], AsyncWire], fleet: FleetConfig, timeout_s: float, clock: Callable[[], float]
    ) -> Self:
        """A client over another wire than Redis. ``clock``: epoch seconds."""
        check_timeout(timeout_s)
        client = cls.__new__(cls)
        client._set_up(wire, lambda: Core(fleet, timeout_s, clock), "memory", lambda: None)
        return client

    def _set_up(
        self, wire: Callable[[], AsyncWire], core: Callable[[], Core], name: str, cache: Callable[[], AsyncCache | None]
    ) -> None:
        self._wire, self._core, self._name, self._cache = wire, core, name, cache
        self._current: _Link | None = None

    def __repr__(self) -> str:
        return f"<AsyncCortex {self._name}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Give the connections back; the next call opens new ones; see ``Cortex.close``."""
        link, self._current = self._current, None
        if link is not None:
            await link.close()

    # ------------------------------------------------------------------------------------------------- verbs

    @overload
    async def embed(self, inputs: str, **options: Unpack[o.EmbedOptions]) -> p.Embedding: ...
    @overload
    async def embed(self, inputs: o.Texts, **options: Unpack[o.EmbedOptions]) -> JobResult[p.Embedding]: ...
    async def embed(self, inputs: Any, **options: Any) -> Any:
        """Sentence embeddings: ``Embedding.vector``, float32; ``.codes`` as encoded."""
        return await self._ask("embed", inputs, options)

    @overload
    async def annotate(self, inputs: str, **options: Unpack[o.AnnotateOptions]) -> p.Document: ...
    @overload
    async def annotate(self, inputs: o.Texts, **options: Unpack[o.AnnotateOptions]) -> JobResult[p.Document]: ...
    async def annotate(self, inputs: Any, **options: Any) -> Any:
        """Tokens, sentences and entities, with character offsets."""
        return await self._ask("annotate", inputs, options)

    @overload
    async def classify(self, inputs: str, **options: Unpack[o.ClassifyOptions]) -> p.Classification: ...
    @overload
    async def classify(self, inputs: o.Texts, **options: Unpack[o.ClassifyOptions]) -> JobResult[p.Classification]: ...
    async def classify(self, inputs: Any, **options: Any) -> Any:
        """Labels with scores, best first."""
        return await self._ask("classify", inputs, options)

    @overload
    async def zero_shot(
        self, inputs: str, labels: Sequence[str], **options: Unpack[o.ZeroShotOptions]
    ) -> p.Classification: ...
    @overload
    async def zero_shot(
        self, inputs: o.Texts, labels: Sequence[str], **options: Unpack[o.ZeroShotOptions]
    ) -> JobResult[p.Classification]: ...
    async def zero_shot(self, inputs: Any, labels: Sequence[str], **options: Any) -> Any:
        """Classification against the given labels, best first."""
        return await self._ask("zero_shot", inputs, {**options, "labels": labels})

    @overload
    async def fill_mask(self, inputs: str, **options: Unpack[o.FillMaskOptions]) -> p.FilledMask: ...
    @overload
    async def fill_mask(self, inputs: o.Texts, **options: Unpack[o.FillMaskOptions]) -> JobResult[p.FilledMask]: ...
    async def fill_mask(self, inputs: Any, **options: Any) -> Any:
        """Candidates for each ``[MASK]`` of a text, best first."""
        return await self._ask("fill_mask", inputs, options)

    @overload
    async def features(self, inputs: str, **options: Unpack[o.FeaturesOptions]) -> p.Features: ...
    @overload
    async def features(self, inputs: o.Texts, **options: Unpack[o.FeaturesOptions]) -> JobResult[p.Features]: ...
    async def features(self, inputs: Any, **options: Any) -> Any:
        """Hidden states of the last layer: ``Features.matrix``, float32, (tokens, hidden) unpooled."""
        return await self._ask("features", inputs, options)

    @overload
    async def forecast(self, inputs: o.SeriesLike | o.Pairs, **options: Unpack[o.ForecastOptions]) -> p.Forecast: ...
    @overload
    async def forecast(
        self, inputs: Iterable[o.SeriesLike | o.Pairs], **options: Unpack[o.ForecastOptions]
    ) -> JobResult[p.Forecast]: ...
    async def forecast(self, inputs: Any, **options: Any) -> Any:
        """Future values of a series with an uncertainty interval."""
        return await self._ask("forecast", inputs, options)

    @overload
    async def decompose(
        self, inputs: o.SeriesLike | o.Pairs, **options: Unpack[o.SeriesOptions]
    ) -> p.Decomposition: ...
    @overload
    async def decompose(
        self, inputs: Iterable[o.SeriesLike | o.Pairs], **options: Unpack[o.SeriesOptions]
    ) -> JobResult[p.Decomposition]: ...
    async def decompose(self, inputs: Any, **options: Any) -> Any:
        """Trend, seasonalities and residual of a series."""
        return await self._ask("decompose", inputs, options)

    @overload
    async def detect_anomalies(
        self, inputs: o.SeriesLike | o.Pairs, **options: Unpack[o.AnomalyOptions]
    ) -> p.Anomalies: ...
    @overload
    async def detect_anomalies(
        self, inputs: Iterable[o.SeriesLike | o.Pairs], **options: Unpack[o.AnomalyOptions]
    ) -> JobResult[p.Anomalies]: ...
    async def detect_anomalies(self, inputs: Any, **options: Any) -> Any:
        """The points of a series outside its fitted interval."""
        return await self._ask("detect_anomalies", inputs, options)

    # ------------------------------------------------------------------------------------------ jobs, streams

    async def submit(
        self,
        task: str,
        inputs: Any,
        model: str | None = None,
        *,
        lane: Lane = "interactive",
        deadline_s: float | None = None,
        cache: CachePolicy = "use",
        **params: Any,
    ) -> AsyncJob[Any]:
        """Queue one job and return at once; see ``Cortex.submit``."""
        link = self._link()
        plan = link.core.plan(task, model=model, lane=lane, deadline_s=deadline_s, cache=cache, **params)
        sifted = plan.sift_one(inputs) if is_single(task, inputs) else plan.sift(inputs)
        order = await link.order(plan, sifted, one_job=True)
        order.check_one_job()
        tickets = await link.send(order)
        return AsyncJob(self, order, tickets[0] if tickets else None)

    def map(
        self,
        task: str,
        inputs: Iterable[Any] | AsyncIterable[Any],
        model: str | None = None,
        *,
        chunk: int | None = None,
        window: int | None = None,
        lane: Lane = "bulk",
        progress: bool | None = None,
        errors: Literal["return", "raise"] = "return",
        deadline_s: float | None = None,
        cache: CachePolicy = "use",
        timeout_s: float | None = None,
        **params: Any,
    ) -> AsyncIterator[Any | CortexError]:
        """Results in order, for any iterable, also an asynchronous one; see ``Cortex.map``.

        What an asynchronous source gives is published as it comes: jobs grow up to ``chunk`` inputs under load.
        """
        plan = self._link().core.plan(
            task, model=model, lane=lane, deadline_s=deadline_s, cache=cache, timeout_s=timeout_s, **params
        )
        if not isinstance(inputs, AsyncIterable):
            check_many(inputs)
        flow: Window[LoopTicket] = Window(plan, LoopTicket, chunk=chunk, window=window, errors=errors)
        return astream(self, flow, inputs, Progress.of(plan.spec.name, inputs, progress))

    # ---------------------------------------------------------------------------------------------- machinery

    def _link(self) -> _Link:
        if self._current is None:
            self._current = _Link(self._wire(), self._core(), self._cache())
        elif self._current.loop is not asyncio.get_running_loop():
            raise RuntimeError("an AsyncCortex belongs to one event loop: make one for each, or aclose() it first")
        return self._current

    async def _ask(self, task: str, inputs: Any, options: dict[str, Any]) -> Any:
        link = self._link()
        plan = link.core.plan(task, **options)
        single = is_single(task, inputs)
        if single and link.core.coalesces:
            value = plan.check(inputs)
            known = link.nearby(plan, value)
            return known if known is not None else await link.singles.ask(plan, value)
        order = await link.order(plan, plan.sift_one(inputs) if single else plan.sift(inputs))
        tickets = await link.send(order)
        with link.replies.giving_up(tickets):
            await link.wait(plan, tickets, plan.timeout_s)
        result = order.result([ticket.outcome for ticket in tickets if ticket.outcome is not None])
        return result.values()[0] if single else result
