"""Make-believe snapshots: a few files with content of a seed."""

from __future__ import annotations

import random
from pathlib import Path

from workers.store.disk import Disk, Held
from workers.store.manifest import FileEntry, manifest

__all__ = ["put", "snapshot"]


def snapshot(directory: Path, seed: int = 0, size_bytes: int = 10_000) -> tuple[FileEntry, ...]:
    """Fill ``directory`` with weights, a configuration and a file in a folder; returns what it holds."""
    weights = random.Random(seed).randbytes(size_bytes)
    for name, content in {
        "model.safetensors": weights,
        "config.json": b'{"seed": %d}' % seed,
        "1_Pooling/config.json": b"{}",
    }.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    return manifest(directory)


def put(disk: Disk, seed: int = 0, size_bytes: int = 10_000) -> Held:
    """A snapshot published under the key ``key-<seed>``, held."""
    with disk.fetching(f"key-{seed}", 1.0) as partial:
        return disk.publish(partial, snapshot(partial, seed, size_bytes), f"hub:org/model-{seed}", f"key-{seed}")
