"""The budgets of queues.yaml, and how much of each a worker uses: what its card shows of them."""

from __future__ import annotations

import logging
from typing import Final

from cortex_tasks.presence import BudgetCard
from workers.registry import Registry

__all__ = ["Shares"]

logger = logging.getLogger(__name__)

#: A directory is looked through this often.
_LOOK_S: Final = 30.0


class Shares:
    """Not thread-safe."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._looked_s = float("-inf")
        self._disks: dict[str, BudgetCard] = {}

    def cards(self, now_s: float) -> dict[str, BudgetCard]:
        """By the budgets' names in queues.yaml. ``now_s``: monotonic seconds."""
        registry = self._registry
        limits = registry.limits
        models = list(registry.models.values())
        if now_s - self._looked_s >= _LOOK_S:
            self._looked_s = now_s
            self._disks = self._look()
        children = sum(model.process_bytes for model in models)
        memory = registry.memory.used_bytes + registry.fits.used_bytes
        return {
            "model_cache": BudgetCard(used_bytes=memory, limit_bytes=registry.memory_limit_bytes),
            "inference_buffer": BudgetCard(
                used_bytes=max((model.batch_bytes for model in models), default=0), limit_bytes=limits.inference_buffer
            ),
            "process_pool": BudgetCard(used_bytes=children, limit_bytes=limits.process_pool),
            **self._disks,
        }

    def _look(self) -> dict[str, BudgetCard]:
        found = {}
        # The models directory comes first, shared memory where it cannot be written.
        for name, disk in zip(("model_store", "shared_memory"), self._registry.store.disks, strict=False):
            try:
                used = disk.used_bytes if disk.root.is_dir() else 0
            except OSError as error:
                logger.debug("%s cannot be looked through: %s", disk.root, error)
                continue
            found[name] = BudgetCard(used_bytes=used, limit_bytes=disk.max_bytes)
        return found
