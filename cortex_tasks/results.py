"""Wire answer -> typed results.

``parse`` reads what ``AsyncResult.get()`` of any Celery client returns, ``error_from_meta`` how a job failed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, Generic, TypeVar, overload

from pydantic import BaseModel, ValidationError

from cortex_tasks import errors
from cortex_tasks.catalog import task_spec
from cortex_tasks.errors import CortexError, DeadlineExceeded, InferenceFailed, JobCancelled, ModelError
from cortex_tasks.payloads import Result, Timings

__all__ = ["FINAL_STATES", "JobResult", "error_from_meta", "parse"]

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

#: States of Celery in which a job is over.
FINAL_STATES: Final = frozenset({"SUCCESS", "FAILURE", "REVOKED"})
_NO_TIMINGS: Final = Timings()


@dataclass(frozen=True, slots=True, repr=False)
class JobResult(Sequence["T | CortexError"], Generic[T]):
    """The answers to several inputs, in the inputs' order: each a typed result or an error of its own."""

    task: str
    items: tuple[T | CortexError, ...]
    #: The alias and the revision that answered; "" when no input reached a worker.
    model: str = ""
    revision: str = ""
    #: Of the job; of the slowest one where the inputs travelled as several jobs.
    timings: Timings = _NO_TIMINGS

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> T | CortexError: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[T | CortexError, ...]: ...

    def __getitem__(self, index: int | slice) -> T | CortexError | tuple[T | CortexError, ...]:
        return self.items[index]

    def __iter__(self) -> Iterator[T | CortexError]:
        return iter(self.items)

    @property
    def ok(self) -> bool:
        """Whether every input was answered."""
        return not any(isinstance(item, CortexError) for item in self.items)

    @property
    def errors(self) -> dict[int, CortexError]:
        """Index of an input -> its error."""
        return {index: item for index, item in enumerate(self.items) if isinstance(item, CortexError)}

    def values(self) -> tuple[T, ...]:
        """Every result. Raises the first error, if there is one."""
        values: list[T] = []
        for item in self.items:
            if isinstance(item, CortexError):
                # As often as it is asked for: its traceback does not grow.
                raise item.with_traceback(None)
            values.append(item)
        return tuple(values)

    def __repr__(self) -> str:
        failed = len(self.errors)
        return f"<JobResult {self.task} {self.model}: {len(self)} items{f', {failed} failed' if failed else ''}>"


def parse(answer: Mapping[str, Any]) -> JobResult[Any]:
    """What ``AsyncResult.get()`` of a Cortex task returned -> typed results. Raises ValueError on anything else."""
    if not isinstance(answer, Mapping) or "cortex" not in answer:
        raise ValueError(f"not an answer of Cortex: {type(answer).__name__}")
    try:
        cls = task_spec(answer["task"]).result
        timings = _read(Timings, answer.get("timings") or {}, {})
        fixed = {"model": answer["model"], "revision": answer["revision"], "timings": timings}
        items = tuple([_item(cls, item, fixed) for item in answer["items"]])
    except (KeyError, TypeError, AttributeError, ValidationError) as error:
        raise ValueError(f"a malformed answer: {error!r}") from error
    return JobResult(answer["task"], items, answer["model"], answer["revision"], timings)


@cache
def _reader(cls: type[M]) -> tuple[frozenset[str], Callable[[Any], M]]:
    """The fields that this version knows of, and pydantic's own reader of them: ``model_validate`` takes half as long
    again."""
    return frozenset(cls.model_fields), cls.__pydantic_validator__.validate_python


def _read(cls: type[M], given: Mapping[str, Any], fixed: Mapping[str, Any]) -> M:
    """``given`` and ``fixed`` as a model; what a newer worker says beyond it is left out. Raises ValidationError."""
    fields, read = _reader(cls)
    if not given.keys() <= fields:
        given = {name: value for name, value in given.items() if name in fields}
    found: M = read({**given, **fixed})
    return found


def _item(cls: type[Result], item: Mapping[str, Any], fixed: Mapping[str, Any]) -> Result | CortexError:
    if "value" not in item:
        return errors.error_from_wire(item.get("error") or {})
    try:
        return _read(cls, item["value"], fixed)
    except ValidationError as error:
        fields = ", ".join(sorted({str(entry["loc"][0]) for entry in error.errors() if entry["loc"]}))
        return ModelError(f"the worker's {cls.kind} does not fit this version of cortex_tasks ({fields}); upgrade it")


def error_from_meta(meta: Mapping[str, Any]) -> CortexError:
    """The error of a job that is over without an answer (Celery's states FAILURE and REVOKED)."""
    stored = meta.get("result")
    wire = stored if isinstance(stored, Mapping) else {}
    name, module = str(wire.get("exc_type", "error")), wire.get("exc_module")
    parts = _parts(wire.get("exc_message", stored))
    message = str(parts[0]) if parts else ""
    if meta.get("status") == "REVOKED":
        if message == "expired":
            return DeadlineExceeded("the job's deadline passed before it was computed; it was dropped")
        return JobCancelled("the job was cancelled before it was computed")
    own = getattr(errors, name, None) if module == errors.__name__ and name in errors.__all__ else None
    if isinstance(own, type) and issubclass(own, CortexError):
        details = parts[1] if len(parts) > 1 and isinstance(parts[1], Mapping) else None
        return own(message, details)
    return InferenceFailed(f"the worker failed: {name}: {message}", {"type": name})


def _parts(message: Any) -> list[Any]:
    """An exception's arguments, however Celery stored them."""
    if isinstance(message, list | tuple):
        return list(message)
    if isinstance(message, str) and message.startswith("["):
        try:
            return list(json.loads(message))
        except ValueError:
            pass
    return [message]
