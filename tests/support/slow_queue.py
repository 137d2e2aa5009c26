"""A device that is always late: copies happen only when somebody waits for them, or when work needs them.

What is written into a buffer before the device has read it is lost here every time, as it would be on a GPU now and
then.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["SlowQueue"]


@dataclass
class _Mark:
    queue: SlowQueue
    after: int

    def wait(self) -> None:
        self.queue.catch_up(self.after)


@dataclass
class SlowQueue:
    """Keeps what it was given, in order, until somebody waits. ``do``: give it work."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    given: list[Callable[[], object]] = field(default_factory=list)
    done: int = 0
    downloads: int = 0
    #: The most work that waited at once.
    behind: int = 0

    def do(self, work: Callable[[], object]) -> None:
        self.given.append(work)
        self.behind = max(self.behind, len(self.given) - self.done)

    def catch_up(self, upto: int) -> None:
        while self.done < upto:
            self.done += 1
            self.given[self.done - 1]()

    def active(self) -> AbstractContextManager[object]:
        return nullcontext()

    def host_buffer(self, count: int) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.int64)

    def upload(self, host: torch.Tensor, device: torch.Tensor, after: _Mark) -> _Mark:
        self.do(lambda: device.copy_(host))
        return self.mark()

    def mark(self) -> _Mark:
        return _Mark(self, len(self.given))

    def download(self, tensor: torch.Tensor) -> NDArray[np.float32]:
        self.downloads += 1
        self.catch_up(len(self.given))
        array: NDArray[np.float32] = tensor.numpy()
        return array
