"""Frozen messages: what goes into a job and what comes out of it.

Parameters (``*Params``) are validated at the client and again at the worker. Results are built by the client
from the wire form; numbers of vectors stay packed bytes (little-endian, row-major) until someone reads
``.vector``, ``.codes`` or ``.matrix``, so that this module never imports numpy or pandas by itself.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

Lane = Literal["interactive", "bulk"]
CachePolicy = Literal["use", "refresh", "off"]
Encoding = Literal["float32", "int8", "binary"]


R = TypeVar("R", bound="Result")


class Frozen(BaseModel):
    """Immutable, strict about unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


# ---------------------------------------------------------------------------------------------- parameters


class Params(Frozen):
    """Base of all task parameters."""

    def canonical(self) -> str:
        """One string for equal parameters however they were written: every field, sorted, compact JSON."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))


class TextParams(Params):
    """Parameters every text task shares."""

    #: Cut a text that is over the model's character limit instead of refusing it.
    truncate: bool = False


class EmbedParams(TextParams):
    """``embed``: sentence embeddings."""

    #: Scale each vector to length 1, after it was cut to ``dimensions``.
    normalize: bool = True
    #: Keep the first so many numbers (models trained for it, as Matryoshka, lose little); None keeps all.
    dimensions: Annotated[int, Field(strict=True, ge=1, le=65_536)] | None = None
    #: How the numbers are packed; ``derived`` says what each means.
    encoding: Encoding = "float32"


class AnnotateParams(TextParams):
    """``annotate``: tokens, sentences and entities."""

    include: tuple[Literal["tokens", "sentences", "entities"], ...] = ("tokens", "sentences", "entities")


class ClassifyParams(TextParams):
    """``classify``: text classification."""

    #: Keep the k best labels; None keeps all.
    top_k: Annotated[int, Field(ge=1, le=1000)] | None = None
    #: True: independent sigmoid per label; False: softmax; None: as the model's configuration says.
    multi_label: bool | None = None


class ZeroShotParams(TextParams):
    """``zero_shot``: classification against labels given with the call."""

    labels: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=200)], ...], Field(min_length=1, max_length=100)
    ]
    multi_label: bool = False
    #: The hypothesis; ``{}`` is replaced by each label.
    hypothesis_template: Annotated[str, Field(pattern=r"\{\}", max_length=500)] = "This example is {}."


class FillMaskParams(TextParams):
    """``fill_mask``: candidates for each mask token of a text."""

    top_k: Annotated[int, Field(ge=1, le=100)] = 5


class FeaturesParams(TextParams):
    """``features``: hidden states of the last layer."""

    #: ``none``: one row a token, special tokens included; ``mean``: attention-masked mean; ``cls``: first row.
    pooling: Literal["none", "mean", "cls"] = "none"


class SeriesParams(Params):
    """Parameters every Prophet task shares; names and defaults are Prophet's own."""

    growth: Literal["linear", "flat"] = "linear"
    seasonality_mode: Literal["additive", "multiplicative"] = "additive"
    yearly_seasonality: bool | Literal["auto"] = "auto"
    weekly_seasonality: bool | Literal["auto"] = "auto"
    daily_seasonality: bool | Literal["auto"] = "auto"
    changepoint_prior_scale: Annotated[float, Field(gt=0, le=100)] = 0.05


class ForecastParams(SeriesParams):
    """``forecast``: future values with an uncertainty interval."""

    #: Number of future points; the model's own limit may be lower.
    horizon: Annotated[int, Field(ge=1)] = 30
    #: A pandas offset alias ("D", "h", "MS"); None infers it from the history.
    frequency: Annotated[str, Field(min_length=1, max_length=20)] | None = None
    interval_width: Annotated[float, Field(gt=0, lt=1)] = 0.8
    #: Also return the fitted values of the history.
    include_history: bool = False


class DecomposeParams(SeriesParams):
    """``decompose``: trend, seasonalities and residual of the history."""


class AnomalyParams(SeriesParams):
    """``detect_anomalies``: history points outside the fitted interval."""

    interval_width: Annotated[float, Field(gt=0, lt=1)] = 0.99


# --------------------------------------------------------------------------------------------------- inputs


class Series(Frozen):
    """A time series: timestamps (ISO 8601, naive, strictly ascending) and values."""

    ds: tuple[str, ...]
    y: tuple[float, ...]


# -------------------------------------------------------------------------------------------------- results


class Timings(Frozen):
    """Where the time of a job went, in milliseconds.

    ``queue_ms`` runs from submission until the worker took the job up; the other three are the stages of its batches,
    each shared by all items of a batch: ``prepare_ms`` before the model, ``forward_ms`` in it, ``finish_ms`` from its
    output to values. They may overlap, as one batch is finished while the next is in the model; a model in child
    processes tells all of them as ``forward_ms``. ``cached`` says which tier answered without a forward pass.
    """

    queue_ms: float = 0.0
    prepare_ms: float = 0.0
    forward_ms: float = 0.0
    finish_ms: float = 0.0
    cached: Literal["near", "l2"] | None = None
    #: Number of items in the largest forward pass that served this job.
    batch_items: int = 0

    @property
    def total_ms(self) -> float:
        return self.queue_ms + self.prepare_ms + self.forward_ms + self.finish_ms


class Result(Frozen):
    """What every answer carries beside its own fields."""

    #: Fields that travel in the wire form of this class besides the three below; see ``catalog``.
    kind: ClassVar[str] = "result"

    model: str
    revision: str
    timings: Timings


def unchecked(cls: type[R], fields: dict[str, Any]) -> R:
    """A result of fields that are all there and of their types, as for each of thousands of known answers: pydantic's
    own ways to make one take three times as long. The dictionary becomes the result's own."""
    item = cls.__new__(cls)
    put = object.__setattr__
    put(item, "__dict__", fields)
    put(item, "__pydantic_fields_set__", set(fields))
    put(item, "__pydantic_extra__", None)
    put(item, "__pydantic_private__", None)
    return item


class Embedding(Result):
    """A sentence embedding. ``data``: the vector's codes, packed as ``encoding`` says (float32 is little-endian)."""

    kind: ClassVar[str] = "embedding"
    data: Annotated[bytes, Field(repr=False)]
    #: The text was longer than the model's token window; the vector is of its beginning (as the library does).
    truncated: bool = False
    encoding: Encoding = "float32"
    #: Of int8: what a code of 1 stands for.
    scale: float = 1.0

    @property
    def dimensions(self) -> int:
        return {"float32": len(self.data) // 4, "int8": len(self.data), "binary": len(self.data) * 8}[self.encoding]

    @property
    def codes(self) -> NDArray[Any]:
        """The numbers as they are encoded, read-only: float32 or int8 of shape ``(dimensions,)``, or packed bits, uint8
        of shape ``(dimensions / 8,)``. They share memory with ``data``."""
        import numpy as np

        return np.frombuffer(self.data, dtype={"float32": "<f4", "int8": "i1", "binary": "u1"}[self.encoding])

    @property
    def vector(self) -> NDArray[np.float32]:
        """The vector, float32, shape ``(dimensions,)``. Of float32 it shares memory with ``data`` and is read-only; of
        int8 it is ``codes * scale``; of binary 1.0 for each bit that is set, -1.0 for each other one."""
        import numpy as np

        if self.encoding == "float32":
            return np.frombuffer(self.data, dtype="<f4")
        if self.encoding == "int8":
            return self.codes.astype("<f4") * np.float32(self.scale)
        return np.unpackbits(self.codes).astype("<f4") * np.float32(2) - np.float32(1)


class Features(Result):
    """Hidden states. ``data``: float32 little-endian, row-major, of ``shape``."""

    kind: ClassVar[str] = "features"
    data: Annotated[bytes, Field(repr=False)]
    shape: tuple[int, ...]
    truncated: bool = False

    @property
    def matrix(self) -> NDArray[np.float32]:
        """Shape ``(tokens, hidden)`` unpooled, ``(hidden,)`` pooled; float32, read-only."""
        import numpy as np

        return np.frombuffer(self.data, dtype="<f4").reshape(self.shape)


class Token(Frozen):
    """One token; offsets are characters into the submitted text."""

    text: str
    start: int
    end: int
    lemma: str = ""
    pos: str = ""
    tag: str = ""
    dep: str = ""


class Span(Frozen):
    """A sentence; offsets are characters into the submitted text."""

    text: str
    start: int
    end: int


class Entity(Frozen):
    """A named entity; offsets are characters into the submitted text."""

    text: str
    label: str
    start: int
    end: int


class Document(Result):
    """An annotated text."""

    kind: ClassVar[str] = "document"
    tokens: tuple[Token, ...] = ()
    sentences: tuple[Span, ...] = ()
    entities: tuple[Entity, ...] = ()


class LabelScore(Frozen):
    """A label and its score in 0..1."""

    label: str
    score: float


class Classification(Result):
    """Labels, best first."""

    kind: ClassVar[str] = "classification"
    labels: tuple[LabelScore, ...]
    truncated: bool = False

    @property
    def label(self) -> str:
        """The best label."""
        return self.labels[0].label

    @property
    def score(self) -> float:
        """The best label's score."""
        return self.labels[0].score


class Fill(Frozen):
    """One candidate for a mask: the token, its probability, and the text with the token in place."""

    token: str
    score: float
    sequence: str


class FilledMask(Result):
    """Candidates, best first, for each mask of the text in order."""

    kind: ClassVar[str] = "filled_mask"
    masks: tuple[tuple[Fill, ...], ...]

    @property
    def candidates(self) -> tuple[Fill, ...]:
        """The candidates for the first mask."""
        return self.masks[0]


class Forecast(Result):
    """A forecast; all columns have one length, ``ds`` is ISO 8601."""

    kind: ClassVar[str] = "forecast"
    ds: tuple[str, ...]
    yhat: tuple[float, ...]
    yhat_lower: tuple[float, ...]
    yhat_upper: tuple[float, ...]
    trend: tuple[float, ...]

    def to_dataframe(self) -> pd.DataFrame:
        """Columns ``ds`` (datetime64), ``yhat``, ``yhat_lower``, ``yhat_upper``, ``trend``. Needs pandas."""
        return _dataframe(self, ("yhat", "yhat_lower", "yhat_upper", "trend"))


class Decomposition(Result):
    """Trend, seasonalities and residual of a history; ``y = trend + seasonalities + residual`` when additive."""

    kind: ClassVar[str] = "decomposition"
    ds: tuple[str, ...]
    y: tuple[float, ...]
    trend: tuple[float, ...]
    #: name ("weekly", "yearly", "daily") -> values
    seasonalities: dict[str, tuple[float, ...]]
    residual: tuple[float, ...]

    def to_dataframe(self) -> pd.DataFrame:
        """Columns ``ds``, ``y``, ``trend``, one a seasonality, ``residual``. Needs pandas."""
        frame = _dataframe(self, ("y", "trend"))
        for name, values in self.seasonalities.items():
            frame[name] = values
        frame["residual"] = self.residual
        return frame


def unshared(item: R) -> R:
    """An answer for one more caller: nothing of it that can be changed is another caller's as well."""
    if isinstance(item, Decomposition):
        return item.model_copy(update={"seasonalities": dict(item.seasonalities)})
    return item


class Anomaly(Frozen):
    """A point outside the interval. ``score``: distance to the nearer bound over half the interval's width."""

    ds: str
    y: float
    yhat: float
    yhat_lower: float
    yhat_upper: float
    score: float


class Anomalies(Result):
    """The history's points outside the fitted interval, in time order."""

    kind: ClassVar[str] = "anomalies"
    points: tuple[Anomaly, ...]
    #: Number of points looked at.
    checked: int


def _dataframe(result: Any, columns: tuple[str, ...]) -> pd.DataFrame:
    try:
        import pandas as pd
    except ImportError as error:
        raise ImportError("to_dataframe() needs pandas: pip install 'datapunk-cortex[pandas]'") from error
    frame = pd.DataFrame({"ds": pd.to_datetime(list(result.ds), format="ISO8601")})
    for name in columns:
        frame[name] = getattr(result, name)
    return frame
