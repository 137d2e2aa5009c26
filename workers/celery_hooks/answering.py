"""How the answers of a pool's jobs leave: traced, stored, and told to Celery.

All on the hub's thread, with one exception: the only job of an idle worker is answered by the thread that computed it
(``at_once``), and Celery hears of it afterwards. What may happen to the job meanwhile (a revoke, a terminate, a lost
connection) finds it started, and comes as much too late as when its answer was on its way.

Touches celery 5.7's ``Request._already_revoked`` and ``Request._terminate_on_ack``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from billiard.einfo import ExceptionInfo
from celery import Celery
from redis.exceptions import RedisError

from cortex_tasks.errors import InferenceFailed
from workers.celery_hooks import leases
from workers.celery_hooks.backend import BatchedRedisBackend
from workers.celery_hooks.ticket import Ticket
from workers.celery_hooks.tracing import Tracer
from workers.runtime import Job, answer

__all__ = ["Answers"]

logger = logging.getLogger(__name__)


class Answers:
    """The answers of one pool. ``tickets``: the pool's, by number; those that leave are taken out."""

    def __init__(self, app: Celery, tickets: dict[int, Ticket]) -> None:
        settings = app.cortex.settings
        self._app, self._tickets = app, tickets
        self._tracer = Tracer(app, always_stock=settings.tracer == "stock")
        #: Whether a message can be acknowledged where its answer is stored.
        self._one_redis = settings.broker == settings.results
        #: Traced, and to be stored.
        self._unstored: list[tuple[Ticket, Any]] = []
        #: The hub turns no more.
        self.draining = False
        #: Jobs that have left: answered, dropped or given back.
        self.settled = 0

    @property
    def wait_for_redis(self) -> bool:
        return bool(self._unstored)

    def at_once(self, job: Job) -> bool:
        """Store an answer on the thread that computed it; False: it is left to the hub, and so are all failures.

        On an idle worker: waking the hub first takes as long as storing (docs/performance.md).
        """
        ticket: Ticket = job.ticket
        request = ticket.request
        late = ticket.done or request._already_revoked or request._terminate_on_ack is not None
        # With others here the hub sends all that ended together, and this thread has better things to do.
        if len(self._tickets) > 1 or late or self.draining or self._unstored or job.errors:
            return False
        try:
            outcome = answer(job, self._app.cortex.registry.model(job.model).revision)
            ticket.stored = self._tracer.trace_now(
                request.task, ticket.target_args, outcome, job.watch.model_s, self._tag(ticket)
            )
        except Exception as error:
            logger.debug("the answer of job %s could not be stored at once: %s", job.id, error)
            return False
        return ticket.stored is not None

    def outcome(self, job: Job | None) -> Any:
        assert job is not None
        self._app.cortex.note_errors(job.errors)
        if job.failure is not None:
            return job.failure
        try:
            return answer(job, self._app.cortex.registry.model(job.model).revision)
        except Exception as error:
            logger.exception("the answer of job %s could not be put together", job.id)
            return InferenceFailed(f"the worker failed inside: {type(error).__name__}: {error}")

    def complete(self, tickets: Sequence[Ticket]) -> None:
        """Trace each job, store all results in one round trip, then acknowledge each."""
        # The others are told to have started when their answers are on their way.
        self.accept([ticket for ticket in tickets if ticket.request._terminate_on_ack is not None])
        backend = self._app.backend
        batched = isinstance(backend, BatchedRedisBackend)
        with backend.collecting() if batched else nullcontext():
            for ticket in tickets:
                if ticket.done or ticket.request._already_revoked:
                    self.forget(ticket)
                    continue
                ticket.done = True
                self._unstored.append((ticket, self._trace(ticket)))
        self.store()

    def _trace(self, ticket: Ticket) -> Any:
        """As ``Tracer.trace``."""
        model_s = ticket.job.watch.model_s if ticket.job else 0.0
        task, tag = ticket.request.task, self._tag(ticket)
        return self._tracer.trace(task, ticket.target, ticket.target_args, ticket.outcome, model_s, tag)

    def _tag(self, ticket: Ticket) -> str:
        """Of the message that may be acknowledged where its job's answer is stored."""
        return leases.held_tag(ticket.request.message) if self._one_redis else ""

    def store(self) -> None:
        """Flush results and call back; while Redis is away, keep them and try again."""
        if not self._unstored:
            return
        backend = self._app.backend
        acknowledged: set[str] = set()
        if isinstance(backend, BatchedRedisBackend):
            try:
                acknowledged = backend.flush()
            except (RedisError, OSError) as error:
                logger.warning("%d results wait for Redis: %s", len(self._unstored), type(error).__name__)
                return
        stored, self._unstored = self._unstored, []
        self.note_stored(
            [(ticket, returned, ticket.request.message.delivery_tag in acknowledged) for ticket, returned in stored]
        )

    def note_stored(self, stored: Sequence[tuple[Ticket, Any, bool]]) -> None:
        """Jobs whose answers are on their way: what the tracer returned, and whether the message was acknowledged."""
        for ticket, returned, acknowledged in stored:
            ticket.done = True
            # A terminate that came while the answer was on its way to Redis comes too late: it is told already.
            ticket.request._terminate_on_ack = None
            self.accept([ticket])
            self.forget(ticket)
            if acknowledged and not ticket.request.acknowledged:
                leases.acknowledged(ticket.request.message)
            self._call_back(ticket, returned)
        if self.draining:
            # The hub turns no more: it would have sent these.
            self._flush_acks()

    def accept(self, tickets: Sequence[Ticket]) -> None:
        for ticket in tickets:
            if not ticket.accepted:
                ticket.accepted = True
                try:
                    # A number of the job's own, so that terminate_job addresses one job.
                    ticket.accept(ticket.number, time.monotonic())
                except Exception as error:
                    # Celery tells "started" over the broker; a job is not lost because that could not be sent.
                    logger.debug("the start of job %s could not be told: %s", ticket.request.id, error)

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

    def forget(self, ticket: Ticket) -> None:
        if self._tickets.pop(ticket.number, None) is not None:
            self.settled += 1
