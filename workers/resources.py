"""What this process may use: CPUs by affinity, cgroup (v1 and v2) and the image's limit; the device."""

from __future__ import annotations

import gc
import math
import os
from pathlib import Path
from typing import Final

from cortex_tasks.config import ImageConfig

__all__ = ["available_cpus", "calm_collector", "calm_openmp", "cgroup_cpus", "device", "threads_for"]

#: Iterations that an OpenMP thread spins at a barrier before it sleeps: microseconds instead of milliseconds.
_SPIN_COUNT: Final = "3000"
#: Allocations between two collections of young objects. The interpreter's 700 make a few jobs; nearly all that a job
#: leaves behind goes by its reference counts.
_YOUNG_OBJECTS: Final = 10_000


def calm_openmp() -> None:
    """Let the compute threads sleep where they wait. Call before torch is imported; what the environment says wins.

    GNU OpenMP spins for milliseconds by default. A worker shares its cores with its own hub, with Redis and with
    other workers, and a spinning thread keeps them from running: measured on two busy cores, MiniLM answers two to
    four times as many texts without (docs/performance.md).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPIN_COUNT)


def calm_collector() -> None:
    """Let the garbage collector pass over what is there now: modules, models. Call when all of it is loaded.

    Torch and the models leave hundreds of thousands of objects; looking through them takes the hub a tenth of a second
    again and again, in the middle of somebody's job.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG_OBJECTS)


def cgroup_cpus(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """The CPU quota of this process's cgroup in CPUs, None when there is none or it cannot be read."""
    try:
        quota, _, period = (root / "cpu.max").read_text().strip().partition(" ")
        return None if quota == "max" else int(quota) / int(period or 100_000)
    except (OSError, ValueError):
        pass
    try:
        quota_us = int((root / "cpu/cpu.cfs_quota_us").read_text())
        period_us = int((root / "cpu/cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return None
    return quota_us / period_us if quota_us > 0 and period_us > 0 else None


def available_cpus() -> float:
    """CPUs this process can really use."""
    affinity = float(len(os.sched_getaffinity(0)))
    return min(affinity, cgroup_cpus() or affinity)


def threads_for(image: ImageConfig | None) -> int:
    """Compute threads for the models of a worker: the image's CPU limit, as far as the machine has them."""
    cpus = available_cpus()
    if image is not None:
        cpus = min(cpus, image.cpus)
    return max(1, math.floor(cpus))


def device() -> str:
    """``cuda`` where a CUDA device works (CORTEX_DEVICE overrides), else ``cpu``. Loads torch only if a GPU shows."""
    chosen = os.environ.get("CORTEX_DEVICE")
    if chosen:
        return chosen
    if not Path("/dev/nvidiactl").exists():
        return "cpu"
    try:
        import torch
    except ImportError:
        return "cpu"
    return "cuda" if torch.cuda.is_available() else "cpu"
