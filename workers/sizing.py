"""How much memory each part of a worker may take where there is less than queues.yaml counts on. Pure.

queues.yaml gives the parts their sizes, and the container's limit may be smaller than their sum: then the parts that
can live with less share what is there, so that the kernel need not end the process.
"""

from __future__ import annotations

from typing import Final

from cortex_tasks.config import FleetConfig, ImageConfig, MemoryConfig

__all__ = ["LIBRARIES_BYTES", "allowed_memory", "describe", "fitted"]

#: What a worker with torch takes before its first model (docs/models.md measures 373 MB), and some air.
LIBRARIES_BYTES: Final = 600 * 10**6
#: Of the limit; the rest is for messages, results and the kernel's own books.
_USABLE: Final = 0.9
#: No part gets less, and then the worker will hardly do: it says so.
_LEAST_BYTES: Final = 32 * 10**6


def allowed_memory(available_bytes: int, image: ImageConfig | None) -> int:
    """Bytes a worker may take: what there is, or its image's limit where that is less."""
    return available_bytes if image is None else min(available_bytes, image.memory)


def fitted(fleet: FleetConfig, memory_bytes: int, *, children: int) -> FleetConfig:
    """The fleet with memory sizes that fit into so many bytes; the same fleet where they do.

    ``children``: of the worker's models. Child processes keep their size, up to half of what is left beside the
    libraries: they hold whole models, and one that outgrows its share is replaced.
    """
    given = fleet.memory_config
    models_bytes = min(given.model_cache, fleet.model_storage.l1_memory.size)
    room = max(0, int(memory_bytes * _USABLE) - LIBRARIES_BYTES)
    pool_bytes = min(given.process_pool, room // 2) if children else 0
    wanted = models_bytes + given.inference_buffer + given.shared_memory
    if wanted + (given.process_pool if children else 0) <= room:
        return fleet
    share = min(1.0, (room - pool_bytes) / max(wanted, 1))
    memory = MemoryConfig(
        model_cache=_part(models_bytes, share),
        inference_buffer=_part(given.inference_buffer, share),
        shared_memory=int(given.shared_memory * share),
        # Without children it is not used; a model that comes later may bring some.
        process_pool=_part(given.process_pool, pool_bytes / given.process_pool) if pool_bytes else given.process_pool,
    )
    return fleet.model_copy(update={"memory_config": memory})


def _part(size_bytes: int, share: float) -> int:
    return min(size_bytes, max(_LEAST_BYTES, int(size_bytes * share)))


def describe(memory: MemoryConfig) -> str:
    """The parts, for a log."""
    parts = {
        "models": memory.model_cache,
        "a batch": memory.inference_buffer,
        "child processes": memory.process_pool,
        "/dev/shm": memory.shared_memory,
    }
    return ", ".join(f"{name} {size / 1e6:,.0f} MB" for name, size in parts.items())
