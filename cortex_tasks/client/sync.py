"""``Cortex``: the client for threads."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, Unpack, overload
from weakref import WeakSet

from cortex_tasks import payloads as p
from cortex_tasks.book import ThreadTicket, Ticket
from cortex_tasks.cache import Cache, Sampler, Shelf
from cortex_tasks.client import options as o
from cortex_tasks.client.coalesce import ThreadCoalescer
from cortex_tasks.client.core import Core, Draft, Order, Plan, Sifted, batches, check_timeout, resolve, timed_out
from cortex_tasks.client.jobs import Job
from cortex_tasks.client.map import Window, stream
from cortex_tasks.client.progress import Progress
from cortex_tasks.client.switches import core_of, wire_of
from cortex_tasks.config import FleetConfig
from cortex_tasks.errors import BrokerUnavailable, CortexError
from cortex_tasks.inputs import check_many, is_single
from cortex_tasks.payloads import CachePolicy, Lane
from cortex_tasks.replies import Replies
from cortex_tasks.results import JobResult
from cortex_tasks.settings import Settings, mask_url
from cortex_tasks.wire import Wire

__all__ = ["Cortex"]

T = TypeVar("T")


class _Link:
    """What belongs to one process: after a fork the child makes its own."""

    def __init__(self, wire: Wire, core: Core, cache: Cache | None) -> None:
        self.wire = wire
        self.core, self.cache = core, cache
        core.shelf = cache.shelf if cache is not None else None
        self.replies = Replies(wire, core.reply_to)
        self.singles = ThreadCoalescer(self)
        self.closed = False

    def publish(self, plan: Plan, tickets: Sequence[Ticket], drafts: Sequence[Draft]) -> None:
        """Queue these jobs, all or none, and await them. Raises QueueFull, BrokerUnavailable."""
        if not drafts:
            return
        self.replies.watch(tickets)
        with self.replies.giving_up(tickets):
            sent = 0
            for batch in batches(drafts):
                messages = [draft.message for draft in batch]
                pushed, depth = self.wire.push(plan.envelope, messages, partial=False)
                if pushed < len(batch):
                    if sent:
                        self.wire.revoke([draft.id for draft in drafts[:sent]])
                    raise plan.full(len(batch), depth, self.wire.cards())
                sent += pushed

    def look_up(self, plan: Plan, values: Sequence[Any]) -> Sequence[p.Result | None]:
        """What the cache knows of checked inputs: one entry each, or none at all. Raises nothing."""
        if self.cache is None or plan.question is None or not values or self.closed:
            return ()
        if plan.cache == "refresh":
            self.cache.forget(plan.question, values)
            return ()
        return self.cache.look_up(plan.question, values)

    def nearby(self, plan: Plan, value: Any) -> p.Result | None:
        """The answer to one checked input, if this process has it in memory."""
        if self.cache is None or plan.question is None or plan.cache != "use":
            return None
        return self.cache.nearby(plan.question, value)

    def order(self, plan: Plan, sifted: Sifted, *, one_job: bool = False) -> Order:
        """Jobs for what the cache does not know."""
        return plan.draft(sifted, self.look_up(plan, sifted.values), one_job=one_job)

    def forget(self, tickets: Sequence[Ticket]) -> None:
        """Await these no longer."""
        self.replies.forget(tickets)

    def send(self, order: Order) -> list[ThreadTicket]:
        """Publish all the jobs of an order, or none."""
        tickets = [ThreadTicket(draft.id) for draft in order.drafts]
        self.publish(order.plan, tickets, order.drafts)
        return tickets

    def wait(self, plan: Plan, tickets: Sequence[ThreadTicket], timeout_s: float) -> None:
        """Until all are over. Raises what ``why_late`` says."""
        until = time.monotonic() + timeout_s
        for ticket in tickets:
            if not ticket.wait(until - time.monotonic()):
                raise self.why_late(plan, timeout_s)

    def why_late(self, plan: Plan, waited_s: float) -> CortexError:
        """Why no answer came in time: Redis, the queue, its workers."""
        if (down := self.replies.down) is not None:
            # One for each: their tracebacks are not to grow into one another.
            return BrokerUnavailable(down.message, down.details)
        return timed_out(plan, waited_s, self.wire.depth(plan.envelope.queue), self.wire.cards())

    def close(self) -> None:
        self.closed = True
        self.replies.close()
        self.wire.close()
        if self.cache is not None:
            self.cache.close()


class Cortex:
    """Hands inference jobs to the fleet. Safe to share between threads, and usable on both sides of a fork.

    ``url``: the fleet's Redis; by default CORTEX_BROKER_URL and CORTEX_RESULT_URL (see ``Settings``), else
    redis://127.0.0.1:6379/0. ``fleet``: by default queues.yaml. ``timeout_s``: how long calls wait for answers.

    Each verb takes one input and returns its result, or several and returns a ``JobResult`` with one entry an
    input. ``client.options`` says what each takes beside its inputs. Raises RequestError for what can never work,
    DeliveryError when the queue could not carry a job or its answer, ModelError when the worker could not answer.
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

        def cache() -> Cache:
            near = fleet.cache.near
            return Cache(chosen, Shelf(near.size, near.ttl_s, sampler=Sampler.of(fleet.cache_warming)))

        self._set_up(
            lambda: wire_of(chosen, fleet), lambda: core_of(chosen, fleet, timeout_s), mask_url(chosen.broker), cache
        )

    @classmethod
    def _over(cls, wire: Callable[[], Wire], fleet: FleetConfig, timeout_s: float, clock: Callable[[], float]) -> Self:
        """A client over another wire than Redis. ``clock``: epoch seconds."""
        check_timeout(timeout_s)
        client = cls.__new__(cls)
        client._set_up(wire, lambda: Core(fleet, timeout_s, clock), "memory", lambda: None)
        return client

    def _set_up(
        self, wire: Callable[[], Wire], core: Callable[[], Core], name: str, cache: Callable[[], Cache | None]
    ) -> None:
        self._wire, self._core, self._name, self._cache = wire, core, name, cache
        self._after_fork()
        _clients.add(self)

    def _after_fork(self) -> None:
        self._lock = threading.Lock()
        self._current: _Link | None = None

    def __repr__(self) -> str:
        return f"<Cortex {self._name}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the connections back; the next call opens new ones.

        Jobs that are on their way are not cancelled; calls that wait for them raise ClientClosed.
        """
        with self._lock:
            link, self._current = self._current, None
        if link is not None:
            link.close()

    # ------------------------------------------------------------------------------------------------- verbs

    @overload
    def embed(self, inputs: str, **options: Unpack[o.EmbedOptions]) -> p.Embedding: ...
    @overload
    def embed(self, inputs: o.Texts, **options: Unpack[o.EmbedOptions]) -> JobResult[p.Embedding]: ...
    def embed(self, inputs: Any, **options: Any) -> Any:
        """Sentence embeddings: ``Embedding.vector``, float32; ``.codes`` as encoded."""
        return self._ask("embed", inputs, options)

    @overload
    def annotate(self, inputs: str, **options: Unpack[o.AnnotateOptions]) -> p.Document: ...
    @overload
    def annotate(self, inputs: o.Texts, **options: Unpack[o.AnnotateOptions]) -> JobResult[p.Document]: ...
    def annotate(self, inputs: Any, **options: Any) -> Any:
        """Tokens, sentences and entities, with character offsets."""
        return self._ask("annotate", inputs, options)

    @overload
    def classify(self, inputs: str, **options: Unpack[o.ClassifyOptions]) -> p.Classification: ...
    @overload
    def classify(self, inputs: o.Texts, **options: Unpack[o.ClassifyOptions]) -> JobResult[p.Classification]: ...
    def classify(self, inputs: Any, **options: Any) -> Any:
        """Labels with scores, best first."""
        return self._ask("classify", inputs, options)

    @overload
    def zero_shot(
        self, inputs: str, labels: Sequence[str], **options: Unpack[o.ZeroShotOptions]
    ) -> p.Classification: ...
    @overload
    def zero_shot(
        self, inputs: o.Texts, labels: Sequence[str], **options: Unpack[o.ZeroShotOptions]
    ) -> JobResult[p.Classification]: ...
    def zero_shot(self, inputs: Any, labels: Sequence[str], **options: Any) -> Any:
        """Classification against the given labels, best first."""
        return self._ask("zero_shot", inputs, {**options, "labels": labels})

    @overload
    def fill_mask(self, inputs: str, **options: Unpack[o.FillMaskOptions]) -> p.FilledMask: ...
    @overload
    def fill_mask(self, inputs: o.Texts, **options: Unpack[o.FillMaskOptions]) -> JobResult[p.FilledMask]: ...
    def fill_mask(self, inputs: Any, **options: Any) -> Any:
        """Candidates for each ``[MASK]`` of a text, best first."""
        return self._ask("fill_mask", inputs, options)

    @overload
    def features(self, inputs: str, **options: Unpack[o.FeaturesOptions]) -> p.Features: ...
    @overload
    def features(self, inputs: o.Texts, **options: Unpack[o.FeaturesOptions]) -> JobResult[p.Features]: ...
    def features(self, inputs: Any, **options: Any) -> Any:
        """Hidden states of the last layer: ``Features.matrix``, float32, (tokens, hidden) unpooled."""
        return self._ask("features", inputs, options)

    @overload
    def forecast(self, inputs: o.SeriesLike | o.Pairs, **options: Unpack[o.ForecastOptions]) -> p.Forecast: ...
    @overload
    def forecast(
        self, inputs: Iterable[o.SeriesLike | o.Pairs], **options: Unpack[o.ForecastOptions]
    ) -> JobResult[p.Forecast]: ...
    def forecast(self, inputs: Any, **options: Any) -> Any:
        """Future values of a series with an uncertainty interval."""
        return self._ask("forecast", inputs, options)

    @overload
    def decompose(self, inputs: o.SeriesLike | o.Pairs, **options: Unpack[o.SeriesOptions]) -> p.Decomposition: ...
    @overload
    def decompose(
        self, inputs: Iterable[o.SeriesLike | o.Pairs], **options: Unpack[o.SeriesOptions]
    ) -> JobResult[p.Decomposition]: ...
    def decompose(self, inputs: Any, **options: Any) -> Any:
        """Trend, seasonalities and residual of a series."""
        return self._ask("decompose", inputs, options)

    @overload
    def detect_anomalies(self, inputs: o.SeriesLike | o.Pairs, **options: Unpack[o.AnomalyOptions]) -> p.Anomalies: ...
    @overload
    def detect_anomalies(
        self, inputs: Iterable[o.SeriesLike | o.Pairs], **options: Unpack[o.AnomalyOptions]
    ) -> JobResult[p.Anomalies]: ...
    def detect_anomalies(self, inputs: Any, **options: Any) -> Any:
        """The points of a series outside its fitted interval."""
        return self._ask("detect_anomalies", inputs, options)

    # ------------------------------------------------------------------------------------------ jobs, streams

    def submit(
        self,
        task: str,
        inputs: Any,
        model: str | None = None,
        *,
        lane: Lane = "interactive",
        deadline_s: float | None = None,
        cache: CachePolicy = "use",
        **params: Any,
    ) -> Job[Any]:
        """Queue one job and return at once. ``inputs``: one input, or at most ``limits.inputs_per_job``.

        Raises RequestError for what can never work, QueueFull, BrokerUnavailable.
        """
        link = self._link()
        plan = link.core.plan(task, model=model, lane=lane, deadline_s=deadline_s, cache=cache, **params)
        sifted = plan.sift_one(inputs) if is_single(task, inputs) else plan.sift(inputs)
        order = link.order(plan, sifted, one_job=True)
        order.check_one_job()
        tickets = link.send(order)
        return Job(self, order, tickets[0] if tickets else None)

    def map(
        self,
        task: str,
        inputs: Iterable[Any],
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
    ) -> Iterator[Any | CortexError]:
        """Results in order, for inputs that need not fit in memory: they are read as their turn comes.

        ``chunk``: inputs of one job; ``window``: jobs in flight at most. ``progress``: a line on stderr, by default
        where that is a terminal. ``errors="raise"`` raises the first error instead of yielding it. ``timeout_s``: how
        long to wait while no job at all is answered. A full queue is waited for. Leaving the iterator early (Ctrl-C,
        ``break``, an error) cancels what has not started.
        """
        plan = self._link().core.plan(
            task, model=model, lane=lane, deadline_s=deadline_s, cache=cache, timeout_s=timeout_s, **params
        )
        check_many(inputs)
        flow: Window[ThreadTicket] = Window(plan, ThreadTicket, chunk=chunk, window=window, errors=errors)
        return stream(self, flow, inputs, Progress.of(plan.spec.name, inputs, progress))

    # ---------------------------------------------------------------------------------------------- machinery

    def _link(self) -> _Link:
        with self._lock:
            if self._current is None:
                self._current = _Link(self._wire(), self._core(), self._cache())
            return self._current

    def _revoke(self, carrier: object, job_ids: Sequence[str]) -> None:
        """Tell the workers to drop jobs that ``carrier`` published, unless it is another process' link or was closed.

        Without the lock: the garbage collector may end a stream while this thread makes a link.
        """
        link = self._current
        if link is not None and link is carrier:
            with suppress(BrokerUnavailable):
                link.wire.revoke(job_ids)

    def _ask(self, task: str, inputs: Any, options: dict[str, Any]) -> Any:
        link = self._link()
        plan = link.core.plan(task, **options)
        single = is_single(task, inputs)
        if single and link.core.coalesces:
            value = plan.check(inputs)
            known = link.nearby(plan, value)
            return known if known is not None else link.singles.ask(plan, value)
        order = link.order(plan, plan.sift_one(inputs) if single else plan.sift(inputs))
        tickets = link.send(order)
        with link.replies.giving_up(tickets):
            link.wait(plan, tickets, plan.timeout_s)
        result = order.result([ticket.outcome for ticket in tickets if ticket.outcome is not None])
        return result.values()[0] if single else result


#: Who has to forget the parent's connections in a forked child.
_clients: WeakSet[Cortex] = WeakSet()


def _forked() -> None:
    for client in _clients:
        client._after_fork()


os.register_at_fork(after_in_child=_forked)
