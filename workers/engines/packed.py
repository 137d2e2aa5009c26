"""Vectors of many texts at once, without padding: packing, copying and computing overlap. Any device's queue.

While the device computes one portion of a batch the host packs the next; vectors are pooled and scaled on the device,
and come back in one copy a batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from workers.engines import gate
from workers.engines.packed_bert import PackedBert, finished
from workers.engines.packing import Row, Shape, portions
from workers.engines.staging import Queue, Staging

__all__ = ["PackedEngine", "Passed", "Passes", "Way", "first_that_passes"]

logger = logging.getLogger(__name__)

#: (numbers of a portion on the device, its shape) -> pooled states, float32, ``(items, hidden)``; overwritten by the
#: next call.
Passes = Callable[[torch.Tensor, Shape], torch.Tensor]


class PackedEngine:
    """One model on one device. Used by one thread at a time."""

    name = "cuda"

    def __init__(self, bert: PackedBert, precision: str, queue: Queue, passes: Passes, table: Sequence[Shape]) -> None:
        """``table``: the shapes that ``passes`` computes."""
        self.precision = precision
        self.library = f"torch {torch.__version__} packed"
        self._bert: PackedBert | None = bert
        self._hidden = bert.hidden
        self._passes: Passes | None = passes
        self._queue = queue
        self._table = table
        self._staging = Staging(queue, max(shape.size for shape in table))

    @property
    def size_bytes(self) -> int:
        """Memory on the device that the weights take; 0 once closed."""
        return self._bert.size_bytes if self._bert else 0

    def embed(self, rows: Sequence[Row], *, dimensions: int | None, normalized: bool) -> NDArray[np.float32]:
        """One vector a row, in order: shape ``(rows, dimensions)``, its own memory."""
        assert self._passes is not None, "the engine is closed"
        lengths = [len(row.ids) for row in rows]
        order = sorted(range(len(rows)), key=lengths.__getitem__)
        with self._queue.active(), torch.inference_mode():
            pooled = torch.empty(len(rows), self._hidden, dtype=torch.float32, device=self._queue.device)
            for shape, start, stop in portions([lengths[index] for index in order], self._table):
                numbers = self._staging.put([rows[index] for index in order[start:stop]], shape)
                pooled[start:stop].copy_(self._passes(numbers, shape)[: stop - start])
                self._staging.taken()
            found = self._queue.download(finished(pooled, dimensions, normalized))
        vectors = np.empty_like(found)
        vectors[order] = found
        return vectors

    def close(self) -> None:
        """Give the memory back. May be repeated."""
        self._bert = self._passes = None


class Way(NamedTuple):
    """One way to run a model on a device."""

    #: For the log: "flash attention, recorded".
    name: str
    open: Callable[[], PackedEngine]


@dataclass(frozen=True, slots=True)
class Passed:
    """``engine``: None when no way passed; ``note`` says why then."""

    engine: PackedEngine | None
    figures: str
    note: str


def first_that_passes(
    alias: str,
    ways: Sequence[Way],
    exact: NDArray[np.float32],
    embed: Callable[[PackedEngine], NDArray[np.float32]],
    *,
    mean_cosine: float,
    top10_overlap: float,
) -> Passed:
    """The first way that opens, runs, and answers as the plain engine does.

    ``exact``: the plain engine's vectors of some texts; ``embed`` computes them on another. Whatever a device, its
    driver or its libraries raise is a reason to go on to the next way: the plain engine is always there.
    """
    problems = []
    for way in ways:
        engine: PackedEngine | None = None
        try:
            engine = way.open()
            figures = gate.compare(exact, embed(engine))
        except Exception as error:
            if engine is not None:
                engine.close()  # what it holds may be just what the next way needs
            problems.append(f"{way.name}: {type(error).__name__}: {str(error).strip()[:200]}")
            logger.warning("model %s cannot run by %s", alias, problems[-1])
            continue
        if why := gate.refusal(figures, mean_cosine=mean_cosine, top10_overlap=top10_overlap):
            engine.close()
            problems.append(f"{way.name} is refused: {why}")
            logger.warning("model %s: %s", alias, problems[-1])
            continue
        logger.info("model %s runs by %s, %s", alias, way.name, figures)
        return Passed(engine, str(figures), "")
    return Passed(None, "", "; ".join(problems))
