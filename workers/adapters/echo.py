"""The echo model: every task, no weights, answers that only their own input can give."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Self

from cortex_tasks.catalog import TASKS
from cortex_tasks.echo import echo
from cortex_tasks.errors import CortexError
from cortex_tasks.payloads import Params, Series
from workers.adapters.base import Adapter, Item, LoadContext, WireValue


class EchoAdapter(Adapter):
    """Options: ``delay_ms`` (float, default 0), the time one forward pass takes whatever its batch."""

    def __init__(self, delay_ms: float = 0.0) -> None:
        self._delay_s = delay_ms / 1e3

    @classmethod
    def load(cls, context: LoadContext) -> Self:
        return cls(**context.options)

    @property
    def size_bytes(self) -> int:
        return 1

    def example(self, task: str) -> tuple[Sequence[Any], Params]:
        series = Series(ds=("2024-01-01", "2024-01-02"), y=(1.0, 2.0))
        inputs = [series] if TASKS[task].input == "series" else ["A warm [MASK]."]
        labels = {"labels": ("a", "b")} if task == "zero_shot" else {}
        return inputs, TASKS[task].params.model_validate(labels)

    def prepare(self, task: str, inputs: Sequence[Any], params: Params) -> list[Item | CortexError]:
        return [Item(value, len(value) // 4 + 1 if isinstance(value, str) else len(value.y)) for value in inputs]

    def forward(self, task: str, items: Sequence[Item], params: Params) -> Sequence[WireValue]:
        if self._delay_s:
            time.sleep(self._delay_s)
        values: list[WireValue] = []
        for item in items:
            value = echo(task, item.data, params)
            if isinstance(value, CortexError):
                raise value
            values.append(value)
        return values
