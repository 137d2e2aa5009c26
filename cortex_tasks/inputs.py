"""The checks that one input and one set of parameters must pass; the client and the worker make the same ones.

A text leaves as ``str``, a series as ``payloads.Series``, whatever form it came in.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sized
from datetime import date, datetime
from decimal import Decimal
from numbers import Real
from typing import Any, Final

from pydantic import ValidationError

from cortex_tasks.catalog import InputKind, nearest, task_spec
from cortex_tasks.config import Limits
from cortex_tasks.derived import refusal
from cortex_tasks.errors import InvalidInput, InvalidParameter
from cortex_tasks.payloads import EmbedParams, ForecastParams, Params, Series

__all__ = ["check_input", "check_many", "check_params", "is_single"]

_SERIES_FORMS: Final = "a Series, a mapping or DataFrame with 'ds' and 'y', or a list of (ds, y) pairs"


def check_input(task: str, value: Any, limits: Limits, truncate: bool = False) -> str | Series:
    """One input of a task, in its canonical form.

    ``truncate`` cuts a text that is too long instead of refusing it. Raises InvalidInput, UnknownTask.
    """
    if task_spec(task).input is InputKind.TEXT:
        return check_text(value, limits, truncate)
    return check_series(value, limits)


def check_text(value: object, limits: Limits, truncate: bool = False) -> str:
    """A text: not empty, not only white space, encodable as UTF-8, within ``limits.text_chars``."""
    if not isinstance(value, str):
        raise InvalidInput(f"a text must be a str, not {type(value).__name__}", {"type": type(value).__name__})
    if len(value) > limits.text_chars:
        if not truncate:
            raise InvalidInput(
                f"a text of {len(value):,} characters is over the model's limit of {limits.text_chars:,}; "
                "shorten it, or pass truncate=True to use its beginning",
                {"limit": limits.text_chars, "got": len(value)},
            )
        value = value[: limits.text_chars]
    if not value or value.isspace():
        raise InvalidInput("a text is empty or only white space", {"got": len(value)})
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InvalidInput(
                f"a text holds a lone surrogate at character {error.start}: it cannot be encoded as UTF-8",
                {"index": error.start},
            ) from None
    return value


def check_series(value: Any, limits: Limits) -> Series:
    """A series: at least two points, finite values, naive timestamps in strictly ascending order."""
    raw_ds, raw_y = _columns(value)
    if len(raw_ds) != len(raw_y):
        raise InvalidInput(
            f"a series has {len(raw_ds):,} timestamps but {len(raw_y):,} values",
            {"ds": len(raw_ds), "y": len(raw_y)},
        )
    if len(raw_ds) < 2:
        raise InvalidInput(f"a series needs at least 2 points, not {len(raw_ds)}", {"got": len(raw_ds)})
    if len(raw_ds) > limits.history_points:
        raise InvalidInput(
            f"a series of {len(raw_ds):,} points is over the model's limit of {limits.history_points:,}; "
            "send its end, or a coarser one",
            {"limit": limits.history_points, "got": len(raw_ds)},
        )
    stamps = [_timestamp(stamp, index) for index, stamp in enumerate(raw_ds)]
    _check_ascending(stamps)
    y = tuple(_number(number, index) for index, number in enumerate(raw_y))
    return Series.model_construct(ds=tuple(stamp.isoformat() for stamp in stamps), y=y)


def check_params(task: str, params: Mapping[str, Any], limits: Limits, model: str = "") -> Params:
    """A task's parameters. ``model``: the alias, for messages.

    Raises InvalidParameter that names each culprit and the nearest name, UnknownTask.
    """
    spec = task_spec(task)
    try:
        checked = spec.params.model_validate(dict(params))
    except ValidationError as error:
        problems = [_problem(entry, spec.params) for entry in error.errors(include_url=False)]
        raise InvalidParameter(f"{spec.name}: {'; '.join(problems[:3])}", {"task": spec.name}) from None
    if isinstance(checked, ForecastParams) and checked.horizon > limits.horizon_points:
        raise InvalidParameter(
            f"{spec.name}: horizon is {checked.horizon:,}, over the model's limit of {limits.horizon_points:,} points",
            {"task": spec.name, "limit": limits.horizon_points, "got": checked.horizon},
        )
    # Where the file does not tell how long the model's vectors are, its worker does.
    if isinstance(checked, EmbedParams) and (width := limits.dimensions or checked.dimensions):
        refused = refusal(checked, width, model)
        if refused is not None:
            raise refused
    return checked


def is_single(task: str, inputs: Any) -> bool:
    """Whether a call's ``inputs`` are one input rather than several."""
    if isinstance(inputs, str | bytes | Mapping | Series) or not isinstance(inputs, Iterable):
        return True
    if task_spec(task).input is InputKind.TEXT:
        return False
    return _is_frame(inputs) or _is_pairs(inputs)


def check_many(inputs: Any) -> None:
    """Raises InvalidInput on what is not to be gone through: one text, or nothing that can be."""
    kind = type(inputs)
    if isinstance(inputs, str | bytes) or not (hasattr(kind, "__iter__") or hasattr(kind, "__getitem__")):
        raise InvalidInput(
            f"map takes an iterable of inputs, not {kind.__name__}; put a single input in a list",
            {"type": kind.__name__},
        )


def _is_frame(value: Any) -> bool:
    """A DataFrame of pandas, Polars and the like, told by its shape: none of them is imported here."""
    return hasattr(value, "columns") and hasattr(value, "__getitem__")


def _is_pairs(value: Any) -> bool:
    """A list of (timestamp, value) pairs, as opposed to a list of series."""
    if not isinstance(value, list | tuple) or not value:
        return False
    first = value[0]
    return isinstance(first, list | tuple) and len(first) == 2 and _is_scalar(first[0])


def _is_scalar(value: Any) -> bool:
    return isinstance(value, str) or not isinstance(value, Iterable)


def _columns(value: Any) -> tuple[list[Any], list[Any]]:
    """Timestamps and values, not yet checked."""
    if isinstance(value, Series):
        return list(value.ds), list(value.y)
    if isinstance(value, Mapping) or _is_frame(value):
        known = value if isinstance(value, Mapping) else list(value.columns)
        for name in ("ds", "y"):
            if name not in known:
                raise InvalidInput(f"a series has no {name!r}{nearest(name, map(str, known))}", {"missing": name})
        return _column(value["ds"], "ds"), _column(value["y"], "y")
    if isinstance(value, list | tuple):
        if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in value):
            raise InvalidInput("a series given as a list must hold (ds, y) pairs")
        return [pair[0] for pair in value], [pair[1] for pair in value]
    name = type(value).__name__
    raise InvalidInput(f"a series must be {_SERIES_FORMS}, not {name}", {"type": name})


def _column(value: Any, name: str) -> list[Any]:
    if isinstance(value, str | bytes | Mapping) or not (isinstance(value, Iterable) and isinstance(value, Sized)):
        raise InvalidInput(f"a series' {name!r} must be a list, not {type(value).__name__}", {"column": name})
    try:
        return list(value)
    except Exception as error:
        # A column's own code, such as that of pandas, which checks its values as it gives them out.
        raise InvalidInput(f"a series' {name!r} cannot be read: {error}", {"column": name}) from error


def _timestamp(value: Any, index: int) -> datetime:
    # NaT of pandas passes for a datetime; like NaN it is unlike itself.
    if value is None or (isinstance(value, float | datetime) and value != value):
        raise InvalidInput(f"the timestamp at index {index} is missing", {"index": index})
    stamp = _to_datetime(value)
    if stamp is None:
        raise InvalidInput(
            f"the timestamp at index {index} is {_short(value)}: neither ISO 8601 text nor a date or datetime",
            {"index": index},
        )
    if stamp.tzinfo is not None:
        raise InvalidInput(
            f"the timestamp at index {index}, {_short(value)}, has a time zone; convert the series to UTC and drop it",
            {"index": index},
        )
    return stamp


def _to_datetime(value: Any) -> datetime | None:
    try:
        return _converted(value)
    except (ValueError, OverflowError):
        # Other text; an array; a timestamp of pandas or NumPy that no datetime can hold.
        return None


def _converted(value: Any) -> datetime | None:
    if isinstance(value, str):
        return datetime.fromisoformat(value)
    if isinstance(value, datetime):
        # A Timestamp of pandas counts nanoseconds; its own replace() makes them droppable without a warning.
        return value.replace(nanosecond=0).to_pydatetime() if hasattr(value, "to_pydatetime") else value  # type: ignore[call-arg]
    if isinstance(value, date):
        return datetime(value.year, value.month, value.day)
    if getattr(getattr(value, "dtype", None), "kind", "") == "M":
        exact = value.astype("datetime64[us]").item()
        return exact if isinstance(exact, datetime) else None
    return None


def _check_ascending(stamps: list[datetime]) -> None:
    for index in range(1, len(stamps)):
        if stamps[index] <= stamps[index - 1]:
            same = stamps[index] == stamps[index - 1]
            said = "the series has a duplicate timestamp" if same else "the series is unsorted"
            raise InvalidInput(
                f"{said} at index {index}: {stamps[index].isoformat()} follows {stamps[index - 1].isoformat()}",
                {"index": index},
            )


def _number(value: Any, index: int) -> float:
    if isinstance(value, bool) or not isinstance(value, Real | Decimal):
        raise InvalidInput(f"the value at index {index} is {_short(value)}, not a number", {"index": index})
    try:
        number = float(value)
    except (OverflowError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise InvalidInput(f"the value at index {index} is {_short(value)}, not a finite number", {"index": index})
    return number


def _problem(entry: Any, params: type[Params]) -> str:
    """One of pydantic's complaints, for people."""
    name = ".".join(str(part) for part in entry["loc"])
    if entry["type"] == "extra_forbidden":
        return f"unknown parameter {name!r}{nearest(name, params.model_fields)}"
    if entry["type"] == "missing":
        return f"parameter {name!r} is required"
    message = entry["msg"][:1].lower() + entry["msg"][1:]
    return f"parameter {name!r} is {_short(entry['input'])}: {message}"


def _short(value: Any) -> str:
    """A value for a message: never a whole document. Huge integers do not become text at all."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length():,} bits"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
