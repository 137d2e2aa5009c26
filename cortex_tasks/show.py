"""Answers in words and pictures for a terminal, and as JSON records for programs."""

from __future__ import annotations

import math
import sys
from array import array
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import singledispatch
from typing import Any

from cortex_tasks import payloads as p
from cortex_tasks.errors import CortexError
from cortex_tasks.terminal import Band, Style, bar, plot, sparkline, table, terminal_width

__all__ = ["as_record", "floats", "highlighted", "show", "timings_line"]

_COMMON = {"model", "revision", "timings", "data"}
_ENTITY_COLOURS = ("cyan", "green", "yellow", "magenta", "blue")


def floats(data: bytes) -> list[float]:
    """Packed float32 (little-endian) -> floats with the nine digits that tell each float32 from the next."""
    values = array("f")
    values.frombytes(data)
    if sys.byteorder == "big":
        values.byteswap()
    return [float(f"{value:.9g}") for value in values]


def as_record(entry_id: Any, answer: p.Result | CortexError) -> dict[str, Any]:
    """``{"id", "value" | "error", "model", "revision", "timings"}``; vectors are lists of numbers, and so are the codes
    of encoded ones."""
    if isinstance(answer, CortexError):
        return {"id": entry_id, "error": answer.to_wire()}
    plain = isinstance(answer, p.Embedding) and answer.encoding == "float32"
    value = answer.model_dump(mode="json", exclude=_COMMON | {"encoding", "scale"} if plain else _COMMON)
    if isinstance(answer, p.Embedding) and not plain:
        value["codes"] = answer.codes.tolist()
    elif isinstance(answer, p.Embedding | p.Features):
        value["vector" if isinstance(answer, p.Embedding) else "values"] = floats(answer.data)
    return {
        "id": entry_id,
        "value": value,
        "model": answer.model,
        "revision": answer.revision,
        "timings": answer.timings.model_dump(),
    }


def timings_line(timings: p.Timings) -> str:
    """``queue 1.2 · prepare 0.3 · forward 8.0 · finish 0.1 ms``, and the batch it ran in."""
    stages = " · ".join(
        f"{name} {getattr(timings, f'{name}_ms'):,.1f}" for name in ("queue", "prepare", "forward", "finish")
    )
    cached = f", from the {timings.cached} cache" if timings.cached else ""
    batch = f", batch of {timings.batch_items}" if timings.batch_items > 1 else ""
    return f"{stages} ms{batch}{cached}"


def show(given: Any, answer: p.Result, style: Style) -> list[str]:
    """The lines of one answer. ``given``: the input it answers."""
    tail = style(f"{answer.model}@{answer.revision[:8]}  {timings_line(answer.timings)}", "dim")
    return [*_body(answer, given, style), tail]


@singledispatch
def _body(answer: p.Result, given: Any, style: Style) -> list[str]:
    return [repr(answer)]


@_body.register
def _(answer: p.Embedding, given: Any, style: Style) -> list[str]:
    values = floats(answer.data) if answer.encoding == "float32" else answer.vector.tolist()
    norm = math.sqrt(math.fsum(value * value for value in values))
    encoded = "" if answer.encoding == "float32" else f", {answer.encoding} in {len(answer.data):,} bytes"
    return [f"{_abbreviated(values)}  {len(values)} dimensions, length {norm:.3f}{encoded}"]


@_body.register
def _(answer: p.Features, given: Any, style: Style) -> list[str]:
    return [f"{_abbreviated(floats(answer.data))}  shape {' x '.join(map(str, answer.shape))}"]


def _abbreviated(values: Sequence[float]) -> str:
    shown = " ".join(f"{value:+.4f}" for value in values[:5])
    return f"[{shown}{' …' if len(values) > 5 else ''}]"


@_body.register
def _(answer: p.Document, given: Any, style: Style) -> list[str]:
    lines = [highlighted(str(given), answer.entities, style)]
    if answer.entities:
        lines += table(("entity", "label", "at"), [(e.text, e.label, f"{e.start}-{e.end}") for e in answer.entities])
    return [*lines, f"{len(answer.tokens)} tokens, {len(answer.sentences)} sentences, {len(answer.entities)} entities"]


def highlighted(text: str, entities: Sequence[p.Entity], style: Style) -> str:
    """The text with each entity marked: in colour, or in brackets."""
    labels = sorted({entity.label for entity in entities})
    marked, end = [], 0
    for entity in sorted(entities, key=lambda e: e.start):
        if entity.start < end:
            continue
        colour = _ENTITY_COLOURS[labels.index(entity.label) % len(_ENTITY_COLOURS)]
        inside = text[entity.start : entity.end]
        if style.coloured:
            shown = f"{style(inside, colour, 'bold')} {style(entity.label, colour, 'dim')}"
        else:
            shown = f"[{inside} {entity.label}]"
        marked += [text[end : entity.start], shown]
        end = entity.end
    return "".join([*marked, text[end:]])


@_body.register
def _(answer: p.Classification, given: Any, style: Style) -> list[str]:
    width = max(len(entry.label) for entry in answer.labels)
    return [f"{entry.label:<{width}}  {bar(entry.score)}  {entry.score:.3f}" for entry in answer.labels[:10]]


@_body.register
def _(answer: p.FilledMask, given: Any, style: Style) -> list[str]:
    return [f"{fill.score:.3f}  {fill.sequence}" for mask in answer.masks for fill in mask]


@_body.register
def _(answer: p.Forecast, given: Any, style: Style) -> list[str]:
    ds, y = series_of(given)
    # The end of the history that leaves the forecast a third of the picture.
    keep = max(2, min(len(y), 2 * len(answer.yhat)))
    fitted = sum(stamp <= ds[-1] for stamp in answer.ds) if ds else 0
    band = Band(answer.yhat[fitted:], answer.yhat_lower[fitted:], answer.yhat_upper[fitted:])
    labels = (ds[-keep][:10] if ds else "", ds[-1][:10] if ds else "", answer.ds[-1][:10])
    return plot(y[-keep:], band, labels, width=terminal_width() - 2, style=style)


@_body.register
def _(answer: p.Decomposition, given: Any, style: Style) -> list[str]:
    parts = {"y": answer.y, "trend": answer.trend, **answer.seasonalities, "residual": answer.residual}
    width = max(map(len, parts))
    lines = []
    for name, values in parts.items():
        picture = _week(answer.ds, values) if name == "weekly" else sparkline(values, 48)
        lines.append(f"{name:<{width}}  {picture:<48}  {min(values):,.2f} … {max(values):,.2f}")
    return lines


def _week(ds: Sequence[str], values: Sequence[float]) -> str:
    """The mean of each weekday: hundreds of weeks in one line would show nothing."""
    days: list[list[float]] = [[] for _ in range(7)]
    for stamp, value in zip(ds, values, strict=True):
        days[datetime.fromisoformat(stamp).weekday()].append(value)
    bars = sparkline([math.fsum(day) / len(day) if day else 0.0 for day in days])
    return "  ".join(
        f"{name} {bar}" for name, bar in zip(("Mo", "Tu", "We", "Th", "Fr", "Sa", "Su"), bars, strict=True)
    )


@_body.register
def _(answer: p.Anomalies, given: Any, style: Style) -> list[str]:
    rows = [
        (
            a.ds.removesuffix("T00:00:00"),
            f"{a.y:,.2f}",
            f"{a.yhat:,.2f}",
            f"{a.yhat_lower:,.2f} … {a.yhat_upper:,.2f}",
            f"{a.score:.2f}",
        )
        for a in answer.points
    ]
    found = f"{len(answer.points)} anomalies in {answer.checked:,} points"
    return [*(table(("when", "value", "expected", "interval", "score"), rows, style) if rows else []), found]


def series_of(given: Any) -> tuple[list[str], list[float]]:
    """Timestamps and values of a series in one of its JSON forms."""
    if isinstance(given, p.Series):
        return list(given.ds), list(given.y)
    if isinstance(given, Mapping):
        return [str(stamp) for stamp in given["ds"]], [float(value) for value in given["y"]]
    return [str(stamp) for stamp, _ in given], [float(value) for _, value in given]
