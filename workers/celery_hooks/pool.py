"""The worker pool: gathers the jobs that wait into batches, and gives each its own result.

Celery's side of a job (events, results, acks, callbacks, chords) stays stock, and all of it happens on the hub's
thread: the pool hands a job to a runner thread, and when the runner has its outcome, the hub traces the task,
whose ``__call__`` finds the outcome in ``workers.tasks.slot``. The results of all the jobs that finished together
are stored in one round trip, then each is acknowledged.

Touches celery 5.7's ``BasePool.on_apply`` contract (``accept_callback.__self__`` is the Request),
``Request._payload``, ``Request._already_revoked``, ``Request._terminate_on_ack`` and ``celery.worker.state.revoked``.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from itertools import count
from typing import Any, Final

from billiard.einfo import ExceptionInfo
from celery import signals
from celery.concurrency.base import BasePool, apply_target
from celery.worker import state as worker_state
from redis.exceptions import RedisError

from cortex_tasks.errors import CortexError, InferenceFailed, InvalidInput
from workers.celery_hooks import leases
from workers.celery_hooks.backend import BatchedRedisBackend
from workers.celery_hooks.ticket import Ticket
from workers.celery_hooks.tracing import Tracer
from workers.runtime import Job, answer
from workers.tasks import InferenceTask, to_job

__all__ = ["BatchingPool", "Ticket"]

logger = logging.getLogger(__name__)

#: Seconds between tries to store results while Redis is away.
_FLUSH_RETRY_S: Final = 0.5
#: How long a warm shutdown waits for a Redis that is away.
_STOP_PATIENCE_S: Final = 30.0
#: Jobs traced in one go before the hub may look at its sockets again.
_TRACE_CHUNK: Final = 256


def _as_refusal(job_id: str, error: Exception) -> CortexError:
    """What a job that could not be read fails with."""
    if isinstance(error, CortexError):
        return error
    logger.error("job %s could not be read", job_id, exc_info=error)
    return InvalidInput(f"the job cannot be read: {type(error).__name__}: {str(error)[:200]}")


class BatchingPool(BasePool):
    """``worker_pool = "workers.celery_hooks.pool:BatchingPool"``; the app carries its wiring as ``app.cortex``."""

    uses_semaphore = False
    signal_safe = False
    body_can_be_buffer = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._numbers = count(1)
        self._tickets: dict[int, Ticket] = {}
        self._inbox: deque[tuple[str, Sequence[Job]]] = deque()
        self._unstored: list[tuple[Ticket, Any]] = []
        self._tracer: Tracer
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.draining = False
        #: Jobs that have left: answered, dropped or given back.
        self.settled = 0

    # --------------------------------------------------------------------------- life of the pool

    def on_start(self) -> None:
        """Load and warm the pinned models: the worker consumes only after this returns."""
        signals.worker_process_init.send(sender=None)
        self._tracer = Tracer(self.app, always_stock=self.app.cortex.settings.tracer == "stock")
        settings = self.app.cortex.settings
        #: Whether a message can be acknowledged where its answer is stored.
        self._one_redis = settings.broker == settings.results
        self.app.cortex.start(self)

    def register_with_event_loop(self, loop: Any) -> None:
        """Called at each (re)connection.

        Runners wake the hub through a descriptor of ours rather than ``call_soon``: what a callback of kombu 5.7's
        hub calls soon itself (here: acknowledgements) would wait until the next poll ends. The timer tries again
        to store results after Redis was away.
        """
        loop.add_reader(self._wake_fd, self._on_wake)
        loop.call_repeatedly(_FLUSH_RETRY_S, self._drain)

    def on_stop(self, patience_s: float = _STOP_PATIENCE_S) -> None:
        """Warm shutdown: what has started is finished and acknowledged, the rest goes back to its queue.

        ``patience_s``: how long to wait for a Redis that is away; after that the leases run out and other workers
        answer the jobs again.
        """
        self.draining = True
        runners = self.app.cortex.stop_runners()
        while any(runner.is_alive() for runner in runners):
            self._drain()
            for runner in runners:
                runner.join(0.01)
        deadline_s = time.monotonic() + patience_s
        while self._inbox or (self._unstored and time.monotonic() < deadline_s):
            self._drain()
            if self._unstored:
                time.sleep(_FLUSH_RETRY_S)
        # The last one given back is the first in line.
        for ticket in reversed(list(self._tickets.values())):
            self._give_back(ticket)
        self.app.cortex.close()

    def on_terminate(self) -> None:
        """Cold shutdown: the same, without waiting for Redis."""
        self.on_stop(patience_s=0)

    def terminate_job(self, pid: int, signal: Any = None) -> None:
        """Drop one job if it has not started. ``pid`` is the job's own number (see ``on_apply``)."""
        ticket = self._tickets.get(pid)
        if ticket is not None and ticket.job is not None and not (ticket.job.started or ticket.done):
            self._drop(ticket)

    # ------------------------------------------------------------------------------ jobs come in

    def apply_async(self, target: Callable[..., Any], args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        """Stock, without the describing of arguments for a debugging log."""
        return self.on_apply(target, args or (), kwargs, **options)

    def on_apply(
        self,
        target: Callable[..., Any],
        args: Sequence[Any] = (),
        kwargs: Any = None,
        accept_callback: Any = None,
        callback: Any = None,
        error_callback: Any = None,
        **options: Any,
    ) -> Any:
        """Take one request from the consumer, on the hub's thread."""
        request = getattr(accept_callback, "__self__", None)
        if request is None or not isinstance(request.task, InferenceTask):
            return apply_target(target, args, kwargs, callback, accept_callback, **options)
        # The payload was decoded once, by the Request: trace gets it decoded.
        name, task_id, headers = args[:3]
        given, named, callbacks = payload = request._payload
        target_args = (name, task_id, headers, payload, None, None)
        ticket = Ticket(
            self, next(self._numbers), request, target, target_args, accept_callback, callback, error_callback
        )
        if not (isinstance(task_id, str) and isinstance(given, list | tuple) and isinstance(named, dict)):
            raise TypeError("a job's id must be a text, its arguments a list and a mapping")
        if not isinstance(callbacks, dict | None):
            raise TypeError("a job's callbacks must be a mapping")
        self._tickets[ticket.number] = ticket
        try:
            ticket.job = job = to_job(task_id, name, given, named, self.app.cortex.fleet, headers)
            job.suspect = bool(request.delivery_info.get("redelivered"))
            job.ticket = ticket
            self.app.cortex.submit(job)
        except Exception as error:
            self.app.cortex.note_errors(1)
            ticket.outcome = _as_refusal(task_id, error)
            self._complete([ticket])
            self._wake()
        return ticket

    # ------------------------------------------------- what runners tell, on the runners' threads

    def started(self, jobs: Sequence[Job]) -> None:
        # Nobody is woken: telling the world would take the interpreter from the pass that begins now. The next wake
        # tells it, at the latest the timer of ``register_with_event_loop``.
        self._inbox.append(("started", jobs))

    def finished(self, jobs: Sequence[Job]) -> None:
        self._tell("finished", jobs)

    def dropped(self, jobs: Sequence[Job]) -> None:
        self._tell("dropped", jobs)

    def unwanted(self, job: Job) -> bool:
        return job.ticket.done or job.deadline_s < time.time() or job.id in worker_state.revoked

    def may_run(self, job: Job, index: int) -> CortexError | None:
        config = self.app.cortex.fleet.models[job.model]
        message = job.ticket.request.message._raw
        refusal: CortexError | None = self.app.cortex.dead_letters.try_again(job, index, config, message)
        return refusal

    def survived(self, job: Job, index: int) -> None:
        self.app.cortex.dead_letters.survived(job, index)

    def _tell(self, what: str, jobs: Sequence[Job]) -> None:
        self._inbox.append((what, jobs))
        self._wake()

    def _wake(self) -> None:
        os.eventfd_write(self._wake_fd, 1)

    # -------------------------------------------------------------------- on the hub's thread again

    def _on_wake(self) -> None:
        with suppress(BlockingIOError):
            os.eventfd_read(self._wake_fd)
        self._drain()

    def _drain(self) -> None:
        """Act on all that the runners told so far."""
        started: list[Ticket] = []
        finished: list[Ticket] = []
        while self._inbox and len(finished) < _TRACE_CHUNK:
            what, jobs = self._inbox.popleft()
            tickets = [job.ticket for job in jobs if not job.ticket.done]
            if what == "started":
                started += tickets
            elif what == "dropped":
                # A start told after its job's end would make Celery keep the job for good.
                self._accept(started)
                started = []
                for ticket in tickets:
                    self._drop(ticket)
            else:
                finished += tickets
        try:
            for ticket in finished:
                ticket.outcome = self._outcome(ticket.job)
            self._complete(finished)
        finally:
            # Of those that are done ``_store`` tells it.
            self._accept([ticket for ticket in started if not ticket.done])
        if self._inbox:
            self._wake()

    def _outcome(self, job: Job | None) -> Any:
        assert job is not None
        self.app.cortex.note_errors(job.errors)
        if job.failure is not None:
            return job.failure
        try:
            return answer(job, self.app.cortex.registry.model(job.model).revision)
        except Exception as error:
            logger.exception("the answer of job %s could not be put together", job.id)
            return InferenceFailed(f"the worker failed inside: {type(error).__name__}: {error}")

    def _accept(self, tickets: Sequence[Ticket]) -> None:
        for ticket in tickets:
            if not ticket.accepted:
                ticket.accepted = True
                try:
                    # A number of the job's own, so that terminate_job addresses one job.
                    ticket.accept(ticket.number, time.monotonic())
                except Exception as error:
                    # Celery tells "started" over the broker; a job is not lost because that could not be sent.
                    logger.debug("the start of job %s could not be told: %s", ticket.request.id, error)

    def _complete(self, tickets: Sequence[Ticket]) -> None:
        """Trace each job, store all results in one round trip, then acknowledge each."""
        # The others are told to have started when their answers are on their way.
        self._accept([ticket for ticket in tickets if ticket.request._terminate_on_ack is not None])
        backend = self.app.backend
        batched = isinstance(backend, BatchedRedisBackend)
        with backend.collecting() if batched else nullcontext():
            for ticket in tickets:
                if ticket.done or ticket.request._already_revoked:
                    self._forget(ticket)
                    continue
                ticket.done = True
                self._unstored.append((ticket, self._trace(ticket)))
        self._store()

    def _trace(self, ticket: Ticket) -> Any:
        """As ``Tracer.trace``."""
        model_s = ticket.job.watch.model_s if ticket.job else 0.0
        request = ticket.request
        tag = leases.held_tag(request.message) if self._one_redis else ""
        return self._tracer.trace(request.task, ticket.target, ticket.target_args, ticket.outcome, model_s, tag)

    def _store(self) -> None:
        """Flush results and call back; while Redis is away, keep them and try again."""
        if not self._unstored:
            return
        backend = self.app.backend
        acknowledged: set[str] = set()
        if isinstance(backend, BatchedRedisBackend):
            try:
                acknowledged = backend.flush()
            except (RedisError, OSError) as error:
                logger.warning("%d results wait for Redis: %s", len(self._unstored), type(error).__name__)
                return
        stored, self._unstored = self._unstored, []
        for ticket, returned in stored:
            # A terminate that came while the answer waited for Redis comes too late: it is told already.
            ticket.request._terminate_on_ack = None
            self._accept([ticket])
            self._forget(ticket)
            if ticket.request.message.delivery_tag in acknowledged and not ticket.request.acknowledged:
                leases.acknowledged(ticket.request.message)
            self._call_back(ticket, returned)
        if self.draining:
            # The hub turns no more: it would have sent these.
            self._flush_acks()

    def _flush_acks(self) -> None:
        try:
            leases.flush_acks()
        except (RedisError, OSError) as error:
            logger.warning("acknowledgements wait for Redis: %s", type(error).__name__)

    def _call_back(self, ticket: Ticket, returned: Any) -> None:
        """Let Celery acknowledge the job and tell what became of it."""
        call = ticket.error_callback if isinstance(returned, ExceptionInfo) else ticket.callback
        try:
            call(self._tracer.told(ticket.request.task, ticket.target_args, returned))
        except (RedisError, OSError) as error:
            # It is delivered again when its lease ends, and gives the same answer.
            logger.warning("job %s was answered but not acknowledged: %s", ticket.request.id, type(error).__name__)
            leases.let_go(ticket.request.message)
        except Exception:
            # A user's own link or errback that cannot be sent: the job itself is answered.
            logger.exception("a callback of job %s failed", ticket.request.id)
            ticket.request.acknowledge()

    def _drop(self, ticket: Ticket) -> None:
        """A job that will not run: revoked or expired (Celery says so and acknowledges), or given back."""
        try:
            self._drop_now(ticket)
        except Exception as error:
            logger.warning("job %s could not be dropped: %s", ticket.request.id, type(error).__name__)
            leases.let_go(ticket.request.message)
            self._settle_unrun(ticket)

    def _drop_now(self, ticket: Ticket) -> None:
        request = ticket.request
        if request._terminate_on_ack is not None:
            self._accept([ticket])
            self._settle_unrun(ticket)
        elif request.revoked():
            self._settle_unrun(ticket)
        elif not self.draining:
            self._give_back(ticket)

    def _settle_unrun(self, ticket: Ticket) -> None:
        ticket.done = True
        self._forget(ticket)

    def _give_back(self, ticket: Ticket) -> None:
        """Next in line in its queue again, for another worker."""
        if ticket.done or ticket.request.acknowledged:
            self._forget(ticket)
            return
        ticket.done = True
        self._forget(ticket)
        try:
            ticket.request.reject(requeue=True)
        except (RedisError, OSError) as error:
            logger.warning("job %s could not be given back: %s", ticket.request.id, type(error).__name__)

    def _forget(self, ticket: Ticket) -> None:
        if self._tickets.pop(ticket.number, None) is not None:
            self.settled += 1

    # --------------------------------------------------------------------------------- what is shown

    def in_flight(self) -> dict[str, int]:
        """Jobs taken and not yet answered, by queue. Called by the health thread."""
        counts: dict[str, int] = {}
        for ticket in list(self._tickets.values()):
            if ticket.job is not None:
                queue = self.app.cortex.fleet.models[ticket.job.model].queue
                counts[queue] = counts.get(queue, 0) + 1
        return counts

    def has_interactive(self) -> bool:
        """Whether an interactive job was taken and not yet answered. Called by the warming thread."""
        return any(t.job is not None and t.job.lane == "interactive" for t in list(self._tickets.values()))

    def waits_for_redis(self) -> bool:
        """Whether answers wait for a Redis that is away. Called by the health thread."""
        return bool(self._unstored)

    def _get_info(self) -> dict[str, Any]:
        """Shown key by key on Flower's worker page."""
        info: dict[str, Any] = super()._get_info()
        info["jobs-in-flight"] = len(self._tickets)
        for model in self.app.cortex.registry.models.values():
            mean = model.items / model.batches if model.batches else 0.0
            info[f"model-{model.alias}"] = (
                f"{model.state}, {model.jobs} jobs, {model.items} items in {model.batches} batches (mean {mean:.1f})"
            )
        return info
