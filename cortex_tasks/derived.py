"""The forms of an embedding, made from the one vector that is computed and stored.

Client and worker use these functions, so that an answer is the same bytes whether it was computed or known. In order:
the first ``dimensions`` numbers are kept, then they are scaled to length 1, then encoded:

* ``float32``: little-endian;
* ``int8``: each number divided by the vector's ``scale`` and rounded to the nearest of -127..127. ``scale`` is a
  float32, the largest magnitude over 127, so that ``codes * scale`` is within half a ``scale`` of each number;
* ``binary``: one bit a number, 1 where it is above 0, eight a byte with the first one on top (numpy's ``packbits``, as
  sentence-transformers' "ubinary").
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from cortex_tasks.errors import InvalidParameter
from cortex_tasks.payloads import EmbedParams, Encoding, Params

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Form", "form_of", "made", "refusal"]

#: As torch's ``normalize``: a vector of zeros stays what it is.
_SMALLEST: Final = 1e-12
_INT8_MAX: Final = 127


class Form(NamedTuple):
    """What is made of a stored vector."""

    normalize: bool
    #: The stored vector is as it left the model; else a whole one has its length already.
    raw: bool
    dimensions: int | None
    encoding: Encoding

    def scales(self, width: int) -> bool:
        """Whether a stored vector of ``width`` numbers is scaled: not for the sake of signs, which could be lost."""
        asked = self.normalize and self.encoding != "binary"
        return asked and (self.raw or (self.dimensions or width) < width)


def refusal(asked: Form | EmbedParams, width: int, model: str) -> InvalidParameter | None:
    """Why a form cannot be made of a model's vectors of ``width`` numbers; None when it can."""
    wanted = asked.dimensions or width
    if wanted > width:
        return InvalidParameter(
            f"embed: dimensions is {wanted:,}, over the {width:,} of model {model!r}",
            {"task": "embed", "model": model, "limit": width, "got": wanted},
        )
    if asked.encoding == "binary" and wanted % 8:
        return InvalidParameter(
            f"embed: {wanted:,} bits fill no whole bytes; ask model {model!r} for dimensions that are a multiple of 8",
            {"task": "embed", "model": model, "got": wanted},
        )
    return None


def form_of(params: Params, stored: Params) -> Form | None:
    """What turns the answer stored for ``stored`` into the one to ``params``; None when it is the same."""
    if not (isinstance(params, EmbedParams) and isinstance(stored, EmbedParams)):
        return None
    raw = params.normalize and not stored.normalize
    if not raw and params.dimensions is None and params.encoding == "float32":
        return None
    return Form(params.normalize, raw, params.dimensions, params.encoding)


def made(form: Form, values: Sequence[Mapping[str, Any]], model: str) -> list[dict[str, Any] | InvalidParameter]:
    """Stored wire values (``data``: float32 little-endian) in a form; the error of a form that one cannot have.

    A value's result does not depend on its neighbours. Raises KeyError, TypeError or ValueError when one of them is no
    embedding.
    """
    if len(values) == 1:
        return _made_alike(form, values, model)
    found: list[dict[str, Any] | InvalidParameter] = []
    for first, last in _runs([value["data"] for value in values]):
        found += _made_alike(form, values[first:last], model)
    return found


def _made_alike(form: Form, values: Sequence[Mapping[str, Any]], model: str) -> list[dict[str, Any] | InvalidParameter]:
    """Values whose vectors have one length."""
    error = refusal(form, len(values[0]["data"]) // 4, model)
    if error is not None:
        return [error] * len(values)
    if len(values) == 1 and form.encoding == "float32":
        return [_made_alone(form, values[0])]
    return [*_made(form, values)]


def _made(form: Form, values: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Values whose vectors have one length, which suffices."""
    import numpy as np

    rows = np.frombuffer(b"".join([value["data"] for value in values]), dtype="<f4").reshape(len(values), -1)
    width = rows.shape[1]
    kept = rows[:, : form.dimensions]
    if form.scales(width):
        kept = kept / np.array([_length(row) for row in kept], dtype=np.float32)[:, None]
    if form.encoding == "float32":
        parts = _cut(kept.astype("<f4", copy=False).tobytes(), len(values))
        return [{**value, "data": data} for value, data in zip(values, parts, strict=True)]
    if form.encoding == "binary":
        parts = _cut(np.packbits(kept > 0, axis=1).tobytes(), len(values))
        return [{**value, "data": data, "encoding": "binary"} for value, data in zip(values, parts, strict=True)]
    codes, scales = _quantized(kept)
    return [
        {**value, "data": data, "encoding": "int8", "scale": scale}
        for value, data, scale in zip(values, _cut(codes.tobytes(), len(values)), scales.tolist(), strict=True)
    ]


def _made_alone(form: Form, value: Mapping[str, Any]) -> dict[str, Any]:
    """One float32 value, to the same bits: numpy's calls for several take longer, on an idle machine 40 µs."""
    import numpy as np

    row = np.frombuffer(value["data"], dtype="<f4")
    kept = row[: form.dimensions]
    if form.scales(len(row)):
        kept = kept / np.float32(_length(kept))
    return {**value, "data": kept.tobytes()}


def _length(row: NDArray[np.float32]) -> float:
    return max(math.sqrt(row.dot(row)), _SMALLEST)


def _quantized(rows: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Codes, int8, of the rows' shape, and a float32 scale a row."""
    import numpy as np

    scales = (np.abs(rows).max(axis=1, initial=0) / np.float32(_INT8_MAX)).astype("f4")
    # Of a vector of zeros (or of numbers next to nothing) all codes are 0.
    steps = np.where(scales > 0, scales, np.float32(1))[:, None]
    return np.clip(np.rint(rows / steps), -_INT8_MAX, _INT8_MAX).astype("i1"), scales


def _cut(packed: bytes, count: int) -> list[bytes]:
    """``count`` pieces of one length."""
    width = len(packed) // count
    return [packed[start : start + width] for start in range(0, len(packed), width)] if width else [b""] * count


def _runs(vectors: Sequence[bytes]) -> list[tuple[int, int]]:
    """Where neighbours of one length begin and end; mostly all have one length. An empty one stands alone."""
    if vectors and len(set(map(len, vectors))) == 1 and vectors[0]:
        return [(0, len(vectors))]
    runs: list[tuple[int, int]] = []
    first = 0
    for index in range(1, len(vectors) + 1):
        if index == len(vectors) or len(vectors[index]) != len(vectors[first]) or not vectors[first]:
            runs.append((first, index))
            first = index
    return runs
