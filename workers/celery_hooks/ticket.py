"""What the pool knows of one job on Celery's side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workers.runtime import Job

if TYPE_CHECKING:
    from workers.celery_hooks.pool import BatchingPool

__all__ = ["Ticket"]


@dataclass(slots=True, eq=False, weakref_slot=True)
class Ticket:
    """Celery's side of one job: what to call, and what was called. The pool's result handle as well."""

    pool: BatchingPool
    #: The job's own number: what Celery takes for a pid.
    number: int
    request: Any
    #: Celery's tracer and its arguments.
    target: Callable[..., Any]
    target_args: Sequence[Any]
    accept: Callable[..., Any]
    callback: Callable[..., Any]
    error_callback: Callable[..., Any]
    job: Job | None = None
    outcome: Any = None
    #: What the tracer returned of an answer that is stored already, and whether the message was acknowledged along.
    stored: tuple[Any, bool] | None = None
    accepted: bool = False
    done: bool = False

    def terminate(self, signal: Any = None) -> None:
        """Celery's ``revoke(terminate=True)``: a job that has not started is dropped, a started one finishes."""
        self.pool.terminate_job(self.number, signal)
