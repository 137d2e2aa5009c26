"""Deterministic make-believe answers for every task, computed from the input alone.

The echo model answers with them, in a real fleet (tests, benchmarks, diagnosis) and in ``cortex_tasks.testing``:
whoever knows the input can tell whether an answer is its own. Nothing here is inference.
"""

from __future__ import annotations

import hashlib
import re
import struct
from datetime import datetime, timedelta
from typing import Any

from cortex_tasks import payloads as p
from cortex_tasks.errors import CortexError, InferenceFailed, InvalidInput

__all__ = ["DIMENSIONS", "REVISION", "echo", "echo_vector"]

#: Length of an echo embedding.
DIMENSIONS = 8
REVISION = "echo-1"
#: A text that holds this fails alone, as a model's own error would.
FAIL = "[[echo:fail]]"


def echo_vector(text: str) -> tuple[float, ...]:
    """The embedding of a text: DIMENSIONS floats in -1..1 from its BLAKE2b hash."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=4 * DIMENSIONS).digest()
    return tuple(value / 2**31 - 1.0 for value in struct.unpack(f"<{DIMENSIONS}I", digest))


def _packed(text: str) -> bytes:
    return struct.pack(f"<{DIMENSIONS}f", *echo_vector(text))


def _document(text: str, params: p.AnnotateParams) -> dict[str, Any]:
    matches = list(re.finditer(r"\S+", text))
    tokens: list[dict[str, Any]] = [{"text": m[0], "start": m.start(), "end": m.end()} for m in matches]
    value: dict[str, Any] = {}
    if "tokens" in params.include:
        value["tokens"] = tokens
    if "sentences" in params.include:
        value["sentences"] = [{"text": text, "start": 0, "end": len(text)}]
    if "entities" in params.include:
        value["entities"] = [{**token, "label": "ECHO"} for token in tokens if token["text"][0].isupper()]
    return value


def _labels(text: str, labels: tuple[str, ...], top_k: int | None) -> dict[str, Any]:
    scores = [abs(echo_vector(f"{label}\0{text}")[0]) + 1e-6 for label in labels]
    ranked = sorted(zip(labels, scores, strict=True), key=lambda pair: -pair[1])[:top_k]
    total = sum(scores)
    return {"labels": [{"label": label, "score": score / total} for label, score in ranked]}


def _fill(text: str, params: p.FillMaskParams) -> dict[str, Any]:
    if "[MASK]" not in text:
        raise InvalidInput("fill_mask needs a [MASK] in the text", {"task": "fill_mask"})
    fills = [
        {"token": f"echo{i}", "score": 1 / 2 ** (i + 1), "sequence": text.replace("[MASK]", f"echo{i}", 1)}
        for i in range(params.top_k)
    ]
    return {"masks": [fills] * text.count("[MASK]")}


def _future(series: p.Series, horizon: int) -> list[str]:
    last, before = datetime.fromisoformat(series.ds[-1]), datetime.fromisoformat(series.ds[-2])
    step: timedelta = last - before
    return [(last + step * (i + 1)).isoformat() for i in range(horizon)]


def _forecast(series: p.Series, params: p.ForecastParams) -> dict[str, Any]:
    ds = _future(series, params.horizon)
    flat = [series.y[-1]] * params.horizon
    if params.include_history:
        ds, flat = [*series.ds, *ds], [*series.y, *flat]
    return {"ds": ds, "yhat": flat, "yhat_lower": flat, "yhat_upper": flat, "trend": flat}


def _decompose(series: p.Series) -> dict[str, Any]:
    y = list(series.y)
    return {"ds": list(series.ds), "y": y, "trend": y, "seasonalities": {}, "residual": [0.0] * len(y)}


def echo(task: str, value: Any, params: p.Params) -> dict[str, Any] | CortexError:
    """The wire value of one input, or its error. Total: it never raises for a validated input."""
    if isinstance(value, str) and FAIL in value:
        return InferenceFailed(f"echo was asked to fail on {value[:40]!r}")
    try:
        match params:
            case p.EmbedParams():
                return {"data": _packed(value)}
            case p.AnnotateParams():
                return _document(value, params)
            case p.ClassifyParams():
                return _labels(value, ("NEGATIVE", "POSITIVE"), params.top_k)
            case p.ZeroShotParams():
                return _labels(value, params.labels, None)
            case p.FillMaskParams():
                return _fill(value, params)
            case p.FeaturesParams():
                return {
                    "data": _packed(value),
                    "shape": [DIMENSIONS] if params.pooling != "none" else [1, DIMENSIONS],
                }
            case p.ForecastParams():
                return _forecast(value, params)
            case p.DecomposeParams():
                return _decompose(value)
            case p.AnomalyParams():
                return {"points": [], "checked": len(value.y)}
            case _:
                return InferenceFailed(f"echo knows no task {task!r}")
    except CortexError as error:
        return error
