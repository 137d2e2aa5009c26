"""What each verb takes beside its inputs, for type checkers and editors; ``payloads`` holds the checks.

Each is optional. Shared by all verbs:

* ``model``: an alias of queues.yaml; by default the first that serves the task.
* ``lane``: ``"interactive"`` or ``"bulk"``; interactive jobs are served first.
* ``deadline_s``: seconds after which the job is dropped uncomputed (DeadlineExceeded).
* ``cache``: ``"use"``, ``"refresh"`` (compute and store) or ``"off"``.
* ``timeout_s``: seconds to wait for the answer (ResultTimeout); the client's own by default, ``math.inf`` for ever.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from typing import Any, Literal, Protocol, TypeAlias, TypedDict

from cortex_tasks.payloads import CachePolicy, Encoding, Lane, Series


class Options(TypedDict, total=False):
    """Shared by all verbs."""

    model: str | None
    lane: Lane
    deadline_s: float | None
    cache: CachePolicy
    timeout_s: float | None


class TextOptions(Options, total=False):
    #: Cut a text that is over the model's character limit instead of refusing it (default False).
    truncate: bool


class EmbedOptions(TextOptions, total=False):
    #: Scale each vector to length 1, after it was cut (default True).
    normalize: bool
    #: Keep the first so many numbers (default all).
    dimensions: int | None
    #: How the numbers are packed (default "float32").
    encoding: Encoding


class AnnotateOptions(TextOptions, total=False):
    #: What to return (default all three).
    include: tuple[Literal["tokens", "sentences", "entities"], ...]


class ClassifyOptions(TextOptions, total=False):
    #: Keep the k best labels (default all).
    top_k: int | None
    #: Independent sigmoids or a softmax (default: as the model says).
    multi_label: bool | None


class ZeroShotOptions(TextOptions, total=False):
    #: Whether several labels may be true at once (default False).
    multi_label: bool
    #: The hypothesis, ``{}`` stands for a label (default "This example is {}.").
    hypothesis_template: str


class FillMaskOptions(TextOptions, total=False):
    #: Candidates for each mask (default 5).
    top_k: int


class FeaturesOptions(TextOptions, total=False):
    #: One row a token, their mean, or the first row (default "none").
    pooling: Literal["none", "mean", "cls"]


class SeriesOptions(Options, total=False):
    growth: Literal["linear", "flat"]
    seasonality_mode: Literal["additive", "multiplicative"]
    yearly_seasonality: bool | Literal["auto"]
    weekly_seasonality: bool | Literal["auto"]
    daily_seasonality: bool | Literal["auto"]
    changepoint_prior_scale: float


class ForecastOptions(SeriesOptions, total=False):
    #: Number of future points (default 30).
    horizon: int
    #: A pandas offset alias (default: inferred from the history).
    frequency: str | None
    #: Probability mass of the interval (default 0.8).
    interval_width: float
    #: Also return the fitted values of the history (default False).
    include_history: bool


class AnomalyOptions(SeriesOptions, total=False):
    #: Probability mass of the interval outside which a point is an anomaly (default 0.99).
    interval_width: float


class Texts(Protocol):
    """Several texts: a list, a tuple, a column. Not ``str``, whose ``in`` takes nothing but a ``str``."""

    def __contains__(self, value: object, /) -> bool: ...

    def __iter__(self) -> Iterator[str]: ...


class Frame(Protocol):
    """A DataFrame with the columns ``ds`` and ``y``."""

    @property
    def columns(self) -> Any: ...

    def __getitem__(self, key: Any, /) -> Any: ...


#: One series that is not a list: ``Series``, ``{"ds": [...], "y": [...]}`` or a DataFrame.
SeriesLike: TypeAlias = Series | Mapping[str, Any] | Frame
#: One series as a list of (timestamp, value) pairs.
Pairs: TypeAlias = Sequence[tuple[str | date, float]]
