"""Buffers take turns: one is written only when it was copied, and copied only when it was read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tests.support.slow_queue import SlowQueue
from workers.engines.packing import Shape
from workers.engines.staging import Immediate, Staging

pytestmark = pytest.mark.models

SHAPE = Shape(16, 16)


@dataclass
class Text:
    ids: list[int]
    type_ids: list[int]


def _ids(number: int) -> list[int]:
    return [number] * 5


@pytest.mark.parametrize("queue", [SlowQueue(), Immediate()])
def test_what_was_put_is_what_the_device_reads(queue: Any) -> None:
    staging, read = Staging(queue, SHAPE.size), []
    for number in range(1, 8):
        device = staging.put([Text(_ids(number), [0] * 5)], SHAPE)
        look = lambda device=device: read.append(device[:5].tolist())  # noqa: E731
        queue.do(look) if isinstance(queue, SlowQueue) else look()
        staging.taken()
    queue.mark().wait()
    assert read == [_ids(number) for number in range(1, 8)]


def test_the_host_runs_ahead_of_the_device_by_the_buffers_it_has() -> None:
    queue = SlowQueue()
    staging = Staging(queue, SHAPE.size)
    for number in range(10):
        staging.put([Text(_ids(number), [0] * 5)], SHAPE)
        staging.taken()
        assert len(queue.given) - queue.done <= 2
    assert queue.behind == 2


def test_a_buffer_is_copied_only_after_it_was_read() -> None:
    asked: list[Any] = []

    class Watched(SlowQueue):
        def upload(self, host: torch.Tensor, device: torch.Tensor, after: Any) -> Any:
            asked.append(after.after)
            return super().upload(host, device, after)

    queue = Watched()
    staging = Staging(queue, SHAPE.size)
    for number in range(4):
        staging.put([Text(_ids(number), [0] * 5)], SHAPE)
        queue.do(lambda: None)
        staging.taken()
    # Two pieces of work a round; the third copy waits for what was given by the end of the first round.
    assert asked == [0, 0, 2, 4]
