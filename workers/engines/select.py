"""Which engine runs a model: the one asked for, if it is there, fits the machine and passes the gate."""

from __future__ import annotations

import importlib
import logging
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cortex_tasks.errors import ConfigError, ModelUnavailable
from workers.engines import gate
from workers.engines.base import Engine
from workers.engines.cache_store import CacheStore
from workers.engines.export import to_onnx
from workers.engines.int8 import QUANTISER_VERSION, exact_levels, quantised
from workers.engines.texts import TEXTS_VERSION, calibration_texts, held_out_texts, timing_texts
from workers.engines.torch import TorchEngine

__all__ = ["FP32_COSINE", "Chosen", "Request", "Subject", "choose", "numeric_class"]

logger = logging.getLogger(__name__)

#: Engines with a file of their own, each also the name of its extra.
_BUILT: Final = {"openvino": "OpenVinoEngine", "onnx": "OnnxEngine"}
#: What an fp32 engine must reach beside torch; a faulty export lies far below it.
FP32_COSINE: Final = 0.99999
_TIMED_ROUNDS: Final = 3


@dataclass(frozen=True, slots=True)
class Request:
    """What queues.yaml asks for, and where."""

    alias: str
    backend: str
    precision: str
    #: Of the snapshot's files and whatever else decides the vectors (options).
    digest: str
    threads: int
    store: CacheStore
    mean_cosine: float
    top10_overlap: float


@dataclass(frozen=True, slots=True)
class Subject:
    """The model as torch loaded it, in float32."""

    #: Takes a dictionary of features, returns it with the hidden states under ``output``.
    transformer: nn.Module
    output: str
    #: Token features of two rows of unequal length.
    example: Mapping[str, torch.Tensor]
    constants: Mapping[str, Any]
    #: (engine, texts) -> the model's vectors, shape ``(texts, dimensions)``.
    embed: Callable[[Engine, Sequence[str]], NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Chosen:
    engine: Engine
    #: How the engine compares with fp32, e.g. "cos 0.9981 top10 0.957", and, where it was chosen among several, with
    #: the others; "" for torch by itself.
    figures: str = ""
    #: Why it is not what was asked for; "" when it is.
    note: str = ""


class _Refused(Exception):
    """An engine does not pass; the message says why."""


def numeric_class(backend: str, precision: str, device: str, cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, str]:
    """The precision to run in, and a note when it is another than the one asked for."""
    if precision == "bf16" and device == "cpu" and "amx_bf16" not in _cpuinfo(cpuinfo):
        return "fp32", "bf16 is slower than fp32 on a CPU without AMX (amx_bf16), as this one; runs in fp32"
    if precision == "int8" and device != "cpu" and backend != "torch":
        return "fp32", f"int8 engines run on CPUs, not on {device}; runs in fp32"
    return precision, ""


def choose(request: Request, subject: Subject) -> Chosen:
    """The engine to run on this machine's CPU; fp32 of the same backend, with a note, when the gate refuses int8.

    Raises ModelUnavailable when the backend is not installed (names the extra), ConfigError when it never computes
    in the precision asked for.
    """
    builder = _Builder(request, subject, TorchEngine(subject.transformer, subject.output, "fp32", request.threads))
    if request.backend == "auto":
        return _fastest(builder)
    if request.precision not in ("fp32", "int8"):
        raise ConfigError(
            f"models.{request.alias}.precision: backend {request.backend} runs fp32, int8, not {request.precision!r}"
        )
    try:
        return builder.open(request.backend, request.precision)
    except _Refused as refused:
        if request.precision == "fp32":
            raise ModelUnavailable(f"model {request.alias!r}: {refused}; use backend torch") from refused
        note = f"{refused}; runs in fp32"
        logger.warning("model %s: %s", request.alias, note)
    try:
        chosen = builder.open(request.backend, "fp32")
    except _Refused as refused:
        raise ModelUnavailable(f"model {request.alias!r}: {refused}; use backend torch") from refused
    return Chosen(chosen.engine, chosen.figures, note)


def _fastest(builder: _Builder) -> Chosen:
    """The fastest of the installed engines that pass, measured once a machine. fp32 when no int8 engine passes.

    Whatever an engine's library or the disk raises is a reason to go on without it: torch is always there.
    """
    request = builder.request
    note = ""
    candidates: dict[str, Chosen] = {}
    for precision in dict.fromkeys((request.precision, "fp32")):
        reasons = []
        if precision == "fp32":
            candidates["torch"] = Chosen(builder.exact)
        for name in _BUILT:
            try:
                candidates[name] = builder.open(name, precision)
            except (_Refused, ModelUnavailable) as error:
                reasons.append(str(error))
            except Exception as error:
                reasons.append(f"{name} {precision}: {type(error).__name__}: {str(error).strip()[:200]}")
                logger.warning("model %s cannot run on %s", request.alias, reasons[-1])
        if candidates:
            break
        note = "; ".join([*reasons, "runs in fp32"])
        logger.warning("model %s: %s", request.alias, note)
    best, compared = next(iter(candidates)), ""
    if len(candidates) > 1:
        best, compared = builder.fastest({name: chosen.engine for name, chosen in candidates.items()})
    for name, chosen in candidates.items():
        if name != best:
            chosen.engine.close()
    return Chosen(candidates[best].engine, " ".join(filter(None, (candidates[best].figures, compared))), note)


@dataclass(slots=True)
class _Builder:
    """Builds, judges and times the engines of one model; keeps all three in the store."""

    request: Request
    subject: Subject
    exact: TorchEngine
    _held_out: NDArray[np.float32] | None = field(default=None)

    def open(self, name: str, precision: str) -> Chosen:
        """Raises _Refused when the gate does, ModelUnavailable when the library is absent."""
        kind = _engine_class(name)
        entry = self.request.store.get(
            {**self._key(), "engine": f"{name} {kind.version}", "precision": precision, **_versions(precision)},
            lambda directory: self._build(kind, precision, directory),
        )
        figures = gate.Figures.read(entry.facts)
        limits = {"mean_cosine": self.request.mean_cosine, "top10_overlap": self.request.top10_overlap}
        if precision == "fp32":
            limits = {"mean_cosine": FP32_COSINE, "top10_overlap": 0.0}
        if why := gate.refusal(figures, **limits):
            raise _Refused(f"{name} {precision} is refused: {why}")
        return Chosen(kind(entry.path, precision, self.request.threads), str(figures))

    def fastest(self, engines: Mapping[str, Engine]) -> tuple[str, str]:
        """The name of the fastest over a short sample, and how it compares with the others; remembered."""
        names = ", ".join(f"{name} {engine.precision} {engine.library}" for name, engine in engines.items())
        entry = self.request.store.get({**self._key(), "fastest of": names}, lambda _: self._time(engines))
        ranked = sorted(entry.facts["seconds"].items(), key=lambda item: item[1])
        rates = " / ".join(f"{name} {len(timing_texts()) / seconds:,.0f}" for name, seconds in ranked)
        return str(entry.facts["fastest"]), f"fastest of {rates} texts/s"

    def _key(self) -> dict[str, str]:
        request = self.request
        return {
            "digest": request.digest,
            "threads": str(request.threads),
            "cpu": _cpu_model(),
            "torch": torch.__version__,
        }

    def _build(self, kind: Any, precision: str, directory: Path) -> dict[str, float]:
        subject = self.subject
        transformer = subject.transformer
        if precision == "int8":
            watched = TorchEngine(transformer, subject.output, "fp32", self.request.threads, lean=False)
            transformer = quantised(
                transformer, lambda: subject.embed(watched, calibration_texts()), exact_levels(_cpu_model().split())
            )
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".partial-") as temporary:
            file = Path(temporary) / "model.onnx"
            to_onnx(transformer, subject.output, subject.example, subject.constants, file)
            kind.build(file, directory, self.request.threads)
        engine = kind(directory, precision, self.request.threads)
        if self._held_out is None:
            self._held_out = subject.embed(self.exact, held_out_texts())
        figures = gate.compare(self._held_out, subject.embed(engine, held_out_texts()))
        engine.close()
        logger.info("model %s: built %s %s, %s", self.request.alias, kind.name, precision, figures)
        return {"mean_cosine": figures.mean_cosine, "top10_overlap": figures.top10_overlap}

    def _time(self, engines: Mapping[str, Engine]) -> dict[str, Any]:
        """Interleaved, so that what else the machine does falls on all of them."""
        texts = timing_texts()
        times_s: dict[str, list[float]] = {name: [] for name in engines}
        for engine in engines.values():
            self.subject.embed(engine, texts)
        for _ in range(_TIMED_ROUNDS):
            for name, engine in engines.items():
                began_s = time.perf_counter()
                self.subject.embed(engine, texts)
                times_s[name].append(time.perf_counter() - began_s)
        medians = {name: statistics.median(rounds) for name, rounds in times_s.items()}
        return {"fastest": min(medians, key=lambda name: medians[name]), "seconds": medians}


def _engine_class(name: str) -> Any:
    """Raises ModelUnavailable that names the extra when the engine's library is absent."""
    try:
        return getattr(importlib.import_module(f"workers.engines.{name}"), _BUILT[name])
    except ImportError as error:
        raise ModelUnavailable(
            f"backend {name!r} is not installed ({error}); pip install 'datapunk-cortex[{name}]', or use backend torch"
        ) from error


def _versions(precision: str) -> dict[str, str]:
    return {"texts": TEXTS_VERSION, "quantiser": QUANTISER_VERSION} if precision == "int8" else {"texts": TEXTS_VERSION}


def _cpuinfo(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""


def _cpu_model() -> str:
    """The CPU's name and what it can do, as far as it matters to compiled code."""
    info = dict(
        line.split(":", 1) for line in _cpuinfo(Path("/proc/cpuinfo")).partition("\n\n")[0].splitlines() if ":" in line
    )
    values = {name.strip(): value.strip() for name, value in info.items()}
    return " ".join([platform.machine(), values.get("model name", ""), values.get("flags", "")])
