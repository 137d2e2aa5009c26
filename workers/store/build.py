"""The store of a worker, from its settings and queues.yaml."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import redis

from cortex_tasks.config import FleetConfig, ImageConfig, ModelConfig, Settings
from workers.store.counters import Counters
from workers.store.disk import Disk
from workers.store.l2 import L2
from workers.store.tiers import Store

__all__ = ["disk_budget", "open_store", "shares"]

#: A Redis that says nothing for so long is passed by.
_TIMEOUT_S: Final = 10.0
_FETCHED: Final = ("hub:", "s3:")


def disk_budget(fleet: FleetConfig, image: ImageConfig | None) -> int:
    """Bytes of the models directory: ``model_store.max_size``; ``disk.max_size`` where the image has as much storage.

    Never more than the image's storage.
    """
    own, large = fleet.storage_config.model_store.max_size, fleet.model_storage.disk.max_size
    if image is None:
        return own
    return min(large if image.storage >= large else own, image.storage)


def shares(config: ModelConfig) -> bool:
    """Whether a copy is kept in Redis: tier l2 says so, tier l1 where the source has to be fetched, disk never."""
    return config.tier == "l2" or (config.tier == "l1" and config.source.startswith(_FETCHED))


def open_store(
    fleet: FleetConfig,
    settings: Settings,
    image: ImageConfig | None,
    *,
    shared_memory: Path = Path("/dev/shm"),
) -> Store:
    """Makes and asks nothing yet."""
    counters = Counters()
    root = settings.models_dir or fleet.storage_config.model_store.path
    threshold = fleet.storage_config.model_store.cleanup_threshold
    scratch = shared_memory / f"cortex-models-{os.getuid()}"
    budgets = {root: disk_budget(fleet, image), scratch: fleet.memory_config.shared_memory}
    disks = [
        Disk(place, max_bytes=budget, threshold=threshold, on_evicted=lambda _: counters.evicted_from_disk())
        for place, budget in budgets.items()
        if budget and (place == root or shared_memory.is_dir())
    ]
    return Store(
        models_dir=settings.models_dir,
        forge_url=settings.forge,
        disks=disks,
        l2=_l2(fleet, settings),
        counters=counters,
    )


def _l2(fleet: FleetConfig, settings: Settings) -> L2 | None:
    if not fleet.weights_max_bytes:
        return None
    client = redis.Redis.from_url(
        settings.cache, socket_timeout=_TIMEOUT_S, socket_connect_timeout=settings.connect_timeout_s
    )
    return L2(client, max_bytes=fleet.weights_max_bytes, ttl_s=fleet.model_storage.l2_redis.ttl_s)
