"""Models that misbehave on purpose."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from cortex_tasks.payloads import Params
from workers.adapters import Item, LoadContext
from workers.adapters.base import WireValue
from workers.adapters.echo import EchoAdapter

#: A text that holds this kills the process that forwards it.
KILL = "[[poison:kill]]"


class PoisonAdapter(EchoAdapter):
    """Echo, but a forward pass that meets KILL ends the process at once, as a segmentation fault would."""

    def forward(self, task: str, items: Sequence[Item], params: Params) -> Sequence[WireValue]:
        if any(KILL in item.data for item in items):
            os._exit(139)
        return super().forward(task, items, params)


class GatedAdapter(EchoAdapter):
    """Echo whose forward passes wait while the file named by CORTEX_TEST_GATE exists; touches ``<gate>.entered``."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._gate = Path(gate) if (gate := os.environ.get("CORTEX_TEST_GATE")) else None

    def forward(self, task: str, items: Sequence[Item], params: Params) -> Sequence[WireValue]:
        if self._gate is not None and not any("warm" in item.data for item in items):
            self._gate.with_suffix(".entered").touch()
            while self._gate.exists():
                time.sleep(0.005)
        return super().forward(task, items, params)


class FlakyLoadAdapter(EchoAdapter):
    """Echo whose first load in a process fails as a full disk would."""

    _loads = 0

    @classmethod
    def load(cls, context: LoadContext) -> Self:
        FlakyLoadAdapter._loads += 1
        if FlakyLoadAdapter._loads == 1:
            raise OSError(28, "No space left on device")
        return super().load(context)


class GatedLoadAdapter(EchoAdapter):
    """Echo that loads only once the file named by its option ``gate`` is gone; touches ``<gate>.entered``."""

    @classmethod
    def load(cls, context: LoadContext) -> Self:
        gate = Path(context.options["gate"])
        gate.with_suffix(".entered").touch()
        while gate.exists():
            time.sleep(0.005)
        return cls()
