"""A model that answers like ``echo``, until its container is told (by a file /tmp/eat) to take all memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cortex_tasks.payloads import Params
from workers.adapters import Item
from workers.adapters.echo import EchoAdapter

EAT = Path("/tmp/eat")


class GluttonAdapter(EchoAdapter):
    """Stands in for a forward pass that outgrows its container."""

    def forward(self, task: str, items: Sequence[Item], params: Params) -> Sequence[Any]:
        taken: list[bytearray] = []
        while EAT.exists():
            # Pages are given only when they are written.
            taken.append(bytearray(b"x" * 64 * 2**20))
        return super().forward(task, items, params)
