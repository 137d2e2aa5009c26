"""What Celery's tracer does for a job whose answer is known, less what such a job never needs.

Stock ``trace_task`` (celery 5.7) prepares for code that runs inside a task: it stacks task and request, builds a
Context, sends signals, sends callbacks and the next link of a chain, and stores through several layers. A plain job
has its answer already, nobody listens, and nothing follows it: what remains is to store its SUCCESS and to say so.
All else, every failure among it, goes through the stock tracer; with ``CORTEX_TRACER=stock`` everything does.

Touches ``Request._payload``'s embedded callbacks, the triple that ``fast_trace_task`` returns, the receivers of
Celery's task signals, ``celery.app.trace.task_has_custom``, ``info`` and ``LOG_SUCCESS``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from billiard.einfo import ExceptionInfo
from celery import Celery, signals
from celery.app import trace
from celery.utils.saferepr import saferepr

from cortex_tasks.codec import Answer
from workers.celery_hooks.backend import BatchedRedisBackend
from workers.tasks import slot

__all__ = ["Tracer"]

logger = logging.getLogger(__name__)

#: What a listener may hear while a task is traced.
_SIGNALS: Final = (signals.task_prerun, signals.task_postrun, signals.task_success)
#: A task's own code that the stock tracer calls.
_CUSTOM: Final = ("before_start", "on_success", "after_return")
#: Of a message's body: what is to follow the job, or waits for it.
_FOLLOWS: Final = ("callbacks", "errbacks", "chain", "chord")
#: Of a message's headers: what makes Celery's meta or its bookkeeping another one.
_SPECIAL: Final = ("group", "parent_id", "ignore_result", "stamps")


class Plain(NamedTuple):
    """A plain job's answer is stored, and nobody was told yet."""

    answer: Answer
    #: The job's time in the model.
    runtime_s: float


class Tracer:
    """Makes a job's outcome its result. Used on the hub's thread, while the backend collects."""

    def __init__(self, app: Celery, *, always_stock: bool = False) -> None:
        conf = app.conf
        unusual = conf.result_extended or conf.worker_deduplicate_successful_tasks
        self._stock = always_stock or unusual or not isinstance(app.backend, BatchedRedisBackend)
        self._backend = app.backend
        self._says_so = trace.logger.isEnabledFor(logging.INFO)
        self._plain_tasks: dict[str, bool] = {}

    def trace(
        self,
        task: Any,
        target: Callable[..., Any],
        arguments: Sequence[Any],
        outcome: Any,
        model_s: float,
        tag: str = "",
    ) -> Any:
        """What ``told`` makes into what Celery's callbacks take: the triple ``(failed, shown or error, runtime in
        seconds)``, or the ExceptionInfo of what was raised.

        ``target``: Celery's tracer, ``arguments``: its own, the third of them the message's headers and the fourth its
        decoded body; ``model_s``: the job's time in the model, which its runtime includes; ``tag``: of its message,
        if a plain answer may acknowledge it.
        """
        try:
            if self.takes_plain(task, outcome, arguments[3][2], arguments[2]):
                try:
                    return self._plain(task, arguments[1], outcome, arguments[2], model_s, tag)
                except Exception as error:
                    # Celery's tracer makes it the job's failure.
                    logger.debug("the answer of job %s could not be stored plainly: %s", arguments[1], error)
            slot.put(outcome)
            try:
                failed, value, runtime_s = target(*arguments)
            finally:
                slot.take()
        except Exception:
            return ExceptionInfo()
        return failed, value, (runtime_s or 0.0) + model_s

    def trace_now(
        self, task: Any, arguments: Sequence[Any], outcome: Any, model_s: float, tag: str = ""
    ) -> tuple[Plain, bool] | None:
        """As ``trace`` of a plain job, whose answer is stored at once, on whatever thread; and whether its message was
        acknowledged along with it. None: it is to be traced. Raises what the backend's ``store_success`` raises."""
        headers = arguments[2]
        if not self.takes_plain(task, outcome, arguments[3][2], headers):
            return None
        tag = tag if task.acks_late else ""
        acknowledged = self._backend.store_success(arguments[1], outcome, headers.get("reply_to"), tag)
        return None if acknowledged is None else (Plain(outcome, model_s), acknowledged)

    def takes_plain(
        self, task: Any, outcome: Any, embedded: Mapping[str, Any] | None, headers: Mapping[str, Any]
    ) -> bool:
        """Whether a job is plain. ``embedded``: the third part of its body; ``headers``: the message's."""
        return (
            not self._stock
            and isinstance(outcome, Answer)
            and not any(map(headers.get, _SPECIAL))
            and not (embedded and any(map(embedded.get, _FOLLOWS)))
            and self._is_plain(task)
            and not any(signal.receivers for signal in _SIGNALS)
        )

    def _is_plain(self, task: Any) -> bool:
        known = self._plain_tasks.get(task.name)
        if known is None:
            custom = any(trace.task_has_custom(task, name) for name in _CUSTOM)
            known = self._plain_tasks[task.name] = not (custom or task.ignore_result or task.track_started)
        return known

    def _plain(
        self, task: Any, job_id: str, outcome: Answer, headers: Mapping[str, Any], runtime_s: float, tag: str
    ) -> Plain:
        self._backend.collect_success(job_id, outcome, headers.get("reply_to"), tag if task.acks_late else "")
        return Plain(outcome, runtime_s)

    def told(self, task: Any, arguments: Sequence[Any], returned: Any) -> Any:
        """What Celery's callbacks take of what ``trace`` returned. A plain answer is described and logged here: once it
        is on its way to whoever waits for it."""
        if not isinstance(returned, Plain):
            return returned
        outcome, runtime_s = returned
        shown = repr(outcome)
        if len(shown) > task.resultrepr_maxsize:
            shown = saferepr(outcome, task.resultrepr_maxsize)
        if self._says_so:
            headers = arguments[2]
            context = {"id": arguments[1], "name": headers.get("shadow") or task.name, "return_value": shown}
            called = {"args": headers.get("argsrepr"), "kwargs": headers.get("kwargsrepr")}
            trace.info(trace.LOG_SUCCESS, {**context, "runtime": runtime_s, **called})
        return 0, shown, runtime_s
