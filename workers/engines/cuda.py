"""What is CUDA's own: two streams, pinned memory, recorded passes. All else of a GPU engine runs on any device.

It needs a device to run at all; whatever fails here while a model loads sends the model to the plain torch engine.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from workers.engines.packed import PackedEngine, Passes, Way
from workers.engines.packed_bert import Attention, PackedBert, Pooling, by_flash, by_padding
from workers.engines.packing import Shape, shapes
from workers.engines.staging import Mark

__all__ = ["CudaQueue", "cuda_ways", "on_gpu", "recorded", "sixteen_bit"]

#: Compute capability from which there are bf16 products and FlashAttention.
_AMPERE: Final = (8, 0)
_TYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: A process records one pass at a time.
_RECORDING: Final = threading.Lock()


def on_gpu(device: str) -> bool:
    return device.partition(":")[0] == "cuda"


def sixteen_bit(precision: str, device: str) -> tuple[str, str]:
    """The precision to run in on a GPU, and a note when it is another than the one asked for."""
    if precision == "bf16" and torch.cuda.get_device_capability(device) < _AMPERE:
        return "fp16", "bf16 needs a GPU of compute capability 8.0, which this one has not; runs in fp16"
    return precision, ""


class CudaQueue:
    """The current stream computes, another copies to the device beside it."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        with self.active():
            self._copies = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def active(self) -> AbstractContextManager[object]:
        return torch.cuda.device(self.device)

    def host_buffer(self, count: int) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.int64, pin_memory=True)

    def upload(self, host: torch.Tensor, device: torch.Tensor, after: Mark) -> Mark:
        assert isinstance(after, _Event), "a mark of another queue"
        self._copies.wait_event(after.event)
        with torch.cuda.stream(self._copies):
            device.copy_(host, non_blocking=True)
            copied = _Event()
        torch.cuda.current_stream().wait_event(copied.event)
        return copied

    def mark(self) -> Mark:
        return _Event()

    def download(self, tensor: torch.Tensor) -> NDArray[np.float32]:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        _Event().wait()
        array: NDArray[np.float32] = host.numpy()
        return array


class _Event:
    """Behind the work that the current stream was given so far."""

    def __init__(self) -> None:
        # Whoever waits sleeps: a spinning thread would hold a core that the tokenizer could use.
        self.event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self.event.record()

    def wait(self) -> None:
        self.event.synchronize()


def recorded(passes: Passes, table: Sequence[Shape], queue: CudaQueue) -> Passes:
    """The same passes, each shape's recorded once and replayed. Memory is shared: one pass runs at a time."""
    with _RECORDING, queue.active(), torch.inference_mode():
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        # The largest first: the others find their memory in what it took.
        ready = {shape: _record(passes, shape, queue, pool, stream) for shape in sorted(table, reverse=True)}

    def replay(numbers: torch.Tensor, shape: Shape) -> torch.Tensor:
        graph, inputs, output = ready[shape]
        inputs.copy_(numbers)
        graph.replay()
        return output

    return replay


def _record(
    passes: Passes, shape: Shape, queue: CudaQueue, pool: Any, stream: torch.cuda.Stream
) -> tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]:
    inputs = torch.zeros(shape.size, dtype=torch.int64, device=queue.device)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # Libraries set themselves up in a first pass, which cannot be recorded.
        passes(inputs, shape)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads may use the device meanwhile, for models of their own.
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        output = passes(inputs, shape)
    return graph, inputs, output


def cuda_ways(model: Any, pooling: Pooling, precision: str, device: str, window: int) -> list[Way]:
    """How a model that ``PackedBert`` suits may run on a GPU, the fastest first.

    ``window``: tokens of the longest text.
    """

    def way(attention: Attention, record: bool) -> Callable[[], PackedEngine]:
        return lambda: _opened(model, pooling, precision, device, window, attention, record)

    ways = [
        Way("padded attention, recorded", way(by_padding, True)),
        Way("padded attention", way(by_padding, False)),
    ]
    if precision != "fp32" and torch.cuda.get_device_capability(device) >= _AMPERE:
        ways.insert(0, Way("flash attention, recorded", way(by_flash, True)))
    return ways


def _opened(
    model: Any, pooling: Pooling, precision: str, device: str, window: int, attention: Attention, record: bool
) -> PackedEngine:
    bert = PackedBert(model, _TYPES[precision], pooling)
    table = shapes(min(window, bert.window))
    queue = CudaQueue(device)

    def passes(numbers: torch.Tensor, shape: Shape) -> torch.Tensor:
        return bert(numbers, shape, attention)

    return PackedEngine(bert, precision, queue, recorded(passes, table, queue) if record else passes, table)
