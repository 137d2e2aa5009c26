"""OpenVINO on the CPU. Needs the extra ``openvino``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import openvino
import torch

__all__ = ["OpenVinoEngine"]

_FILE: Final = "model.blob"


class OpenVinoEngine:
    """A compiled model, kept as OpenVINO exports it."""

    name = "openvino"
    version: Final[str] = openvino.__version__.partition("-")[0]

    def __init__(self, directory: Path, precision: str, threads: int) -> None:
        blob = np.fromfile(directory / _FILE, dtype=np.uint8)
        self.precision = precision
        self.library = f"openvino {self.version}"
        self._size_bytes = blob.nbytes
        compiled = openvino.Core().import_model(blob.tobytes(), "CPU", _properties(threads))
        self._names = [port.any_name for port in compiled.inputs]
        self._request: Any = compiled.create_infer_request()

    @staticmethod
    def build(onnx: Path, directory: Path, threads: int) -> None:
        """Compile an ONNX file for this machine into the directory."""
        compiled = openvino.Core().compile_model(str(onnx), "CPU", _properties(threads))
        exported = compiled.export_model()
        (directory / _FILE).write_bytes(exported if isinstance(exported, bytes) else exported.getvalue())

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    def encode(self, features: Mapping[str, Any]) -> torch.Tensor:
        inputs = {name: features[name].numpy() for name in self._names}
        return torch.from_numpy(self._request.infer(inputs, share_inputs=True)[0])

    def close(self) -> None:
        self._request = None
        self._size_bytes = 0


def _properties(threads: int) -> dict[str, Any]:
    # float32 is exact here: without the hint a CPU with bfloat16 would take that.
    return {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
