"""The worker pool: gathers the jobs that wait into batches, and gives each its own result.

Celery's side of a job (events, results, acks, callbacks, chords) stays stock, and all of it happens on the hub's
thread: the pool hands a job to a runner thread, and when the runner has its outcome, the hub traces the task,
whose ``__call__`` finds the outcome in ``workers.tasks.slot`` (see ``answering``). The results of all the jobs that
finished together are stored in one round trip, then each is acknowledged.

Touches celery 5.7's ``BasePool.on_apply`` contract (``accept_callback.__self__`` is the Request),
``Request._payload``, ``Request._already_revoked``, ``Request._terminate_on_ack``, ``Request.stamps``, and ``revoked``,
``revoked_stamps`` and ``should_terminate`` of ``celery.worker.state``.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import count
from typing import Any, Final

from celery import signals
from celery.concurrency.base import BasePool, apply_target
from celery.worker import state as worker_state
from kombu.utils.functional import maybe_list
from redis.exceptions import RedisError

from cortex_tasks.errors import CortexError, InvalidInput
from workers.celery_hooks import leases
from workers.celery_hooks.answering import Answers
from workers.celery_hooks.ticket import Ticket
from workers.runtime import Job
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


def _is_revoked_by_stamp(request: Any) -> bool:
    """Whether ``revoke_by_stamped_headers`` names a job. ``Request.revoked`` finds it so, and also tells the world."""
    try:
        stamps = request.stamps.items()
    except (AttributeError, TypeError):
        return False  # a foreign message, whose stamps are no mapping
    for header, given in stamps:
        revoked = maybe_list(worker_state.revoked_stamps.get(header)) or ()
        if given is not None and any(value in revoked for value in maybe_list(given)):
            return True
    return False


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
        self._answers: Answers
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    # --------------------------------------------------------------------------- life of the pool

    def on_start(self) -> None:
        """Load and warm the pinned models: the worker consumes only after this returns."""
        signals.worker_process_init.send(sender=None)
        self._answers = Answers(self.app, self._tickets)
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
        # Celery's own test: an exit code of 0 counts.
        cold = worker_state.should_terminate is not None and worker_state.should_terminate is not False
        if patience_s and cold:
            # A cold shutdown, which Celery begins within the signal's handler: the hub's thread may be sending answers,
            # and cannot wait for itself. ``on_terminate`` follows at its next turn.
            return
        self._answers.draining = True
        runners = self.app.cortex.stop_runners()
        while any(runner.is_alive() for runner in runners):
            self._drain()
            for runner in runners:
                runner.join(0.01)
        deadline_s = time.monotonic() + patience_s
        while self._inbox or (self._answers.wait_for_redis and time.monotonic() < deadline_s):
            self._drain()
            if self._answers.wait_for_redis:
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
        task_id.encode()  # a lone surrogate would break the storing of everybody's answers
        if not isinstance(callbacks, dict | None):
            raise TypeError("a job's callbacks must be a mapping")
        self._tickets[ticket.number] = ticket
        leases.keep(request.message)
        try:
            ticket.job = job = to_job(task_id, name, given, named, self.app.cortex.fleet, headers)
            job.suspect = bool(request.delivery_info.get("redelivered"))
            job.ticket = ticket
            self.app.cortex.submit(job)
        except Exception as error:
            self.app.cortex.note_errors(1)
            ticket.outcome = _as_refusal(task_id, error)
            self._answers.complete([ticket])
            self._wake()
        return ticket

    # ------------------------------------------------- what runners tell, on the runners' threads

    def started(self, jobs: Sequence[Job]) -> None:
        # Nobody is woken: telling the world would take the interpreter from the pass that begins now. The next wake
        # tells it, at the latest the timer of ``register_with_event_loop``.
        self._inbox.append(("started", jobs))

    def finished(self, jobs: Sequence[Job]) -> None:
        self._tell("answered" if len(jobs) == 1 and self._answers.at_once(jobs[0]) else "finished", jobs)

    def dropped(self, jobs: Sequence[Job]) -> None:
        self._tell("dropped", jobs)

    def unwanted(self, job: Job) -> bool:
        if job.ticket.done or job.deadline_s < time.time() or job.id in worker_state.revoked:
            return True
        return bool(worker_state.revoked_stamps) and _is_revoked_by_stamp(job.ticket.request)

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

    def flush(self) -> None:
        """Celery calls it when the connection to the broker is lost; the hub does not turn until there is another."""
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
                self._answers.accept(started)
                started = []
                for ticket in tickets:
                    self._drop(ticket)
            elif what == "answered":
                self._answers.note_stored([(ticket, *ticket.stored) for ticket in tickets if ticket.stored is not None])
            else:
                finished += tickets
        try:
            for ticket in finished:
                ticket.outcome = self._answers.outcome(ticket.job)
            self._answers.complete(finished)
        finally:
            # Of those that are done ``Answers.store`` tells it.
            self._answers.accept([ticket for ticket in started if not ticket.done])
        if self._inbox:
            self._wake()

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
            self._answers.accept([ticket])
            self._settle_unrun(ticket)
            if not request._already_revoked:
                # That could not be told: it comes again when its lease ends.
                leases.let_go(request.message)
        elif request.revoked():
            self._settle_unrun(ticket)
        elif not self._answers.draining:
            self._give_back(ticket)

    def _settle_unrun(self, ticket: Ticket) -> None:
        ticket.done = True
        self._answers.forget(ticket)

    def _give_back(self, ticket: Ticket) -> None:
        """Next in line in its queue again, for another worker."""
        if ticket.done or ticket.request.acknowledged:
            self._answers.forget(ticket)
            return
        ticket.done = True
        self._answers.forget(ticket)
        try:
            ticket.request.reject(requeue=True)
        except (RedisError, OSError) as error:
            logger.warning("job %s could not be given back: %s", ticket.request.id, type(error).__name__)

    # --------------------------------------------------------------------------------- what is shown

    @property
    def settled(self) -> int:
        """Jobs that have left: answered, dropped or given back."""
        return self._answers.settled

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
        return self._answers.wait_for_redis

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
