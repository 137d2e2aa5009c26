"""The whole contract for a model, on one page.

An adapter turns inputs of a task into values. It is one class in one file of this package, one line in the
table of ``workers.adapters``, and one optional dependency of the project. It knows nothing of queues, Celery
or Redis: whoever calls it has validated the task, the parameters and each input, and takes care of batching,
caching, isolation of bad items and timing.

The road of a batch: ``prepare`` (inputs -> items with a cost, or an error for an item) -> the caller chooses
which items run together -> ``forward`` (the expensive call) -> ``finish`` (raw outputs -> wire values).
An item's value must not depend on its neighbours or its place in the batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

from cortex_tasks.errors import CortexError
from cortex_tasks.payloads import Params
from workers.engines.crew import Crew

#: A value as it travels: the fields of the task's result class (``cortex_tasks.payloads``) less model, revision
#: and timings. JSON types, and bytes for packed float32 little-endian arrays.
WireValue = dict[str, Any]


@dataclass(frozen=True, slots=True)
class LoadContext:
    """What an adapter is given to load itself."""

    alias: str
    #: Directory that holds the snapshot; None for adapters without weights.
    snapshot: Path | None
    #: Digest of the snapshot's files; "" for adapters without weights.
    digest: str
    tasks: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    #: CPU threads this model may use.
    threads: int = 1
    #: "cpu", "cuda", "cuda:0", ...
    device: str = "cpu"
    precision: str = "fp32"
    #: "torch", "openvino", "onnx", "auto" or "native"; an adapter may know one of them only.
    backend: str = "torch"
    #: Where built engines are kept, how many bytes of them, and for how long unused; None: the user's own cache.
    cache_dir: Path | None = None
    cache_bytes: int = 5 * 10**9
    cache_ttl_s: float = 86_400.0
    #: What an int8 engine must reach beside fp32 on held-out texts (0..1).
    gate_cosine: float = 0.995
    gate_top10: float = 0.95


@dataclass(frozen=True, slots=True)
class Item:
    """One prepared input. ``data`` is the adapter's own; ``cost_tokens`` is its length in tokens (or points)."""

    data: Any
    cost_tokens: int = 1


class Memo(Protocol):
    """Keeps what is costly to make again, between jobs and for the whole fleet; any entry may be lost."""

    def recall(self, key: str) -> bytes | None: ...

    def keep(self, key: str, value: bytes) -> None: ...


class Adapter(ABC):
    """A loaded model. One thread at a time calls ``forward``, or each thread of its crew; others may call ``prepare``
    and ``finish`` meanwhile."""

    #: Bump when a change here changes answers: it is part of the model's revision.
    version: ClassVar[str] = "1"
    #: ``load`` copes without a snapshot: an absent source is not an error, the adapter falls back.
    weights_optional: ClassVar[bool] = False
    #: What an operator should know about this model, e.g. that it is a fallback; shown as the model's reason.
    note: str = ""
    #: The engine and the numeric class that really run, part of the revision; "": as queues.yaml says.
    engine: str = ""
    precision: str = ""
    #: How the engine compares with fp32, e.g. "cos 0.9981 top10 0.957", and with the engines it was chosen among; ""
    #: when nothing was compared.
    figures: str = ""
    #: Where an adapter may keep what it made of an input; its caller sets it once the model is warm.
    memo: Memo | None = None
    #: Threads on which ``forward`` may run at the same time, each by itself; None: one pass at a time, on all cores.
    crew: Crew | None = None
    #: Monotonic seconds of the last step of a pass that has several; the watchdog counts from there.
    progressed_s: float = 0.0

    @classmethod
    @abstractmethod
    def load(cls, context: LoadContext) -> Self:
        """Load and return a ready model. Raises ModelUnavailable (says the remedy)."""

    @property
    @abstractmethod
    def size_bytes(self) -> int:
        """Memory the loaded model takes, in bytes."""

    @property
    def token_bytes(self) -> int:
        """Working memory of a forward pass per padded token, in bytes, so that a batch keeps within
        ``inference_buffer``; 0 when it is not known."""
        return 0

    @property
    def library(self) -> str:
        """Name and version of what computes the answers, for the revision, e.g. ``"torch 2.13.0"``."""
        return ""

    @abstractmethod
    def example(self, task: str) -> tuple[Sequence[Any], Params]:
        """Inputs and parameters to warm the model with."""

    @abstractmethod
    def prepare(self, task: str, inputs: Sequence[Any], params: Params) -> list[Item | CortexError]:
        """Tokenise or convert; one entry an input, in order. A bad input yields its error, nothing raises."""

    @abstractmethod
    def forward(self, task: str, items: Sequence[Item], params: Params) -> Sequence[Any]:
        """One raw output an item, in order. May raise: the caller bisects to find the culprit.

        An entry may be a CortexError: that item's own failure. The caller keeps such entries from ``finish``.
        """

    def finish(self, task: str, items: Sequence[Item], raw: Sequence[Any], params: Params) -> list[WireValue]:
        """Raw outputs -> wire values, in order. The default passes dictionaries through."""
        return list(raw)

    def close(self) -> None:
        """Give back what the model holds (memory, children). Called once."""
