"""Numbers on their way to a device: packed into one buffer while the device still reads the one before.

``Queue`` is all that is asked of a device; ``Immediate`` is the CPU, where everything has happened when a call returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from workers.engines.packing import Row, Shape, fill

__all__ = ["Immediate", "Mark", "Queue", "Staging"]

#: Buffers that take turns: one is filled while the other is copied and read.
_SLOTS: Final = 2


class Mark(Protocol):
    """A point in the work of a device."""

    def wait(self) -> None:
        """Return when the device has got there."""


class Queue(Protocol):
    """A device that works through what it is given, in order, and copies beside that."""

    device: torch.device

    def active(self) -> AbstractContextManager[object]:
        """Work given while it is open goes to this device."""

    def host_buffer(self, count: int) -> torch.Tensor:
        """Int64, shape ``(count,)``, in memory that the device can read by itself."""

    def upload(self, host: torch.Tensor, device: torch.Tensor, after: Mark) -> Mark:
        """Copy beside the work, once ``after`` is reached; work given from now on finds the copy done.

        Returns the mark behind which ``host`` may be written again.
        """

    def mark(self) -> Mark:
        """Behind all work given so far."""

    def download(self, tensor: torch.Tensor) -> NDArray[np.float32]:
        """A copy in the host's memory, once all work given so far is done. The caller must not keep it."""


class _Reached:
    def wait(self) -> None:
        """It has been."""


class Immediate:
    """The CPU as a queue."""

    device = torch.device("cpu")

    def active(self) -> AbstractContextManager[object]:
        return nullcontext()

    def host_buffer(self, count: int) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.int64)

    def upload(self, host: torch.Tensor, device: torch.Tensor, after: Mark) -> Mark:
        device.copy_(host)
        return _Reached()

    def mark(self) -> Mark:
        return _Reached()

    def download(self, tensor: torch.Tensor) -> NDArray[np.float32]:
        array: NDArray[np.float32] = tensor.numpy()
        return array


@dataclass(slots=True)
class _Slot:
    host: torch.Tensor
    device: torch.Tensor
    #: The host's buffer was copied.
    copied: Mark
    #: The device's buffer was read by everything that needed it.
    read: Mark


class Staging:
    """Buffers for portions of up to ``size`` numbers. Used by one thread at a time."""

    def __init__(self, queue: Queue, size: int) -> None:
        self._queue = queue
        self._turn = 0
        with queue.active():
            self._slots = [
                _Slot(
                    queue.host_buffer(size),
                    torch.zeros(size, dtype=torch.int64, device=queue.device),
                    queue.mark(),
                    queue.mark(),
                )
                for _ in range(_SLOTS)
            ]

    def put(self, rows: Sequence[Row], shape: Shape) -> torch.Tensor:
        """The rows of a portion on the device, as ``packing.fill`` writes them. Say ``taken`` when they were used."""
        self._turn = (self._turn + 1) % len(self._slots)
        slot = self._slots[self._turn]
        slot.copied.wait()
        host, device = slot.host[: shape.size], slot.device[: shape.size]
        fill(rows, shape, host.numpy())
        slot.copied = self._queue.upload(host, device, slot.read)
        return device

    def taken(self) -> None:
        """All work that reads what was put last has been given to the device."""
        self._slots[self._turn].read = self._queue.mark()
