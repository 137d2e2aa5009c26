"""ONNX Runtime on the CPU. Needs the extra ``onnx``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import onnxruntime
import torch

__all__ = ["OnnxEngine"]

_FILE: Final = "model.onnx"
_ERRORS_ONLY: Final = 3


class OnnxEngine:
    """A session over a graph that was optimised once."""

    name = "onnx"
    version: Final[str] = onnxruntime.__version__

    def __init__(self, directory: Path, precision: str, threads: int) -> None:
        options = _options(threads)
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self.precision = precision
        self.library = f"onnxruntime {self.version}"
        self._size_bytes = (directory / _FILE).stat().st_size
        self._session: Any = _session(directory / _FILE, options)
        self._names = [port.name for port in self._session.get_inputs()]

    @staticmethod
    def build(onnx: Path, directory: Path, threads: int) -> None:
        """Optimise an ONNX file for this machine into the directory."""
        options = _options(threads)
        options.optimized_model_filepath = str(directory / _FILE)
        _session(onnx, options)

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    def encode(self, features: Mapping[str, Any]) -> torch.Tensor:
        inputs = {name: features[name].numpy() for name in self._names}
        return torch.from_numpy(self._session.run(None, inputs)[0])

    def close(self) -> None:
        self._session = None
        self._size_bytes = 0


def _options(threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _ERRORS_ONLY
    # A thread that waits by spinning takes the core from the next stage.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _session(file: Path, options: Any) -> Any:
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
