"""THE table of tasks: name, parameters, input, result, whether it may be cached and batched.

A new task is its payloads in ``payloads`` and one row here.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from cortex_tasks import payloads as p
from cortex_tasks.errors import UnknownTask

__all__ = ["TASKS", "InputKind", "TaskSpec", "nearest", "task_spec"]


class InputKind(StrEnum):
    """What one input of a task is."""

    TEXT = "text"
    SERIES = "series"


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """One row of the catalogue."""

    name: str
    params: type[p.Params]
    input: InputKind
    result: type[p.Result]
    #: Equal input + equal parameters + equal revision give an equal answer, so it may be stored.
    cacheable: bool = True
    #: Items of different jobs may share one forward pass.
    batchable: bool = True

    @property
    def celery_name(self) -> str:
        """The Celery task's name, for example ``cortex.embed``."""
        return f"cortex.{self.name}"


_ROWS = (
    TaskSpec("embed", p.EmbedParams, InputKind.TEXT, p.Embedding),
    TaskSpec("annotate", p.AnnotateParams, InputKind.TEXT, p.Document),
    TaskSpec("classify", p.ClassifyParams, InputKind.TEXT, p.Classification),
    TaskSpec("zero_shot", p.ZeroShotParams, InputKind.TEXT, p.Classification),
    TaskSpec("fill_mask", p.FillMaskParams, InputKind.TEXT, p.FilledMask),
    TaskSpec("features", p.FeaturesParams, InputKind.TEXT, p.Features),
    TaskSpec("forecast", p.ForecastParams, InputKind.SERIES, p.Forecast),
    TaskSpec("decompose", p.DecomposeParams, InputKind.SERIES, p.Decomposition),
    TaskSpec("detect_anomalies", p.AnomalyParams, InputKind.SERIES, p.Anomalies),
)

TASKS: Mapping[str, TaskSpec] = MappingProxyType({row.name: row for row in _ROWS})


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for an error message: ``"; did you mean 'embed'?"``, or the list of what there is."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=2, cutoff=0.6)
    if close:
        return "; did you mean " + " or ".join(repr(c) for c in close) + "?"
    return "; there are: " + ", ".join(names) if names else "; there are none"


def task_spec(name: str) -> TaskSpec:
    """The row of a task, by its short or its Celery name. Raises UnknownTask with the nearest names."""
    if not isinstance(name, str):
        raise UnknownTask(f"a task is named by a str, not {type(name).__name__}{nearest('', TASKS)}")
    short = name.removeprefix("cortex.")
    spec = TASKS.get(short)
    if spec is None:
        raise UnknownTask(f"unknown task {name!r}{nearest(short, TASKS)}", {"task": name})
    return spec
