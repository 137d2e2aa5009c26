"""What this process may use: CPUs and memory by the machine, its control groups and the image's limit; the device."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import os
from pathlib import Path
from typing import Final

from cortex_tasks.config import ImageConfig
from workers.cgroup import CgroupLimits, read_limits

__all__ = [
    "available_cpus",
    "available_memory",
    "bound_kernels",
    "calm_openmp",
    "device",
    "keep_memory",
    "limit_threads",
    "spare_garbage",
    "threads_for",
]

#: Of OpenMP (torch, and what else is built with it), MKL, OpenBLAS, and the pool that tokenizers use.
_THREAD_VARIABLES: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")

#: Iterations that an OpenMP thread spins at a barrier before it sleeps: microseconds instead of milliseconds.
_SPIN_COUNT: Final = "3000"
#: Kernels that oneDNN, and torch's layer above it, keep: one for each shape of a product.
_KERNELS: Final = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128", "LRU_CACHE_CAPACITY": "16"}
#: Options of glibc's mallopt.
_TRIM_THRESHOLD: Final = -1
_MMAP_THRESHOLD: Final = -3
_KEPT_BYTES: Final = 256 * 2**20
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


def bound_kernels() -> None:
    """Let oneDNN keep few of the kernels that it makes. Call before torch is imported; what the environment says wins.

    It makes four for each number of tokens that a batch of BERT's has, of 0.8 MB each, and keeps the last 1,024: within
    minutes of bulk a worker of MiniLM took 1.5 GB. Large batches hardly meet a kernel of their size either way; lone
    short texts do, and need few (docs/performance-engines.md).
    """
    if "DNNL_PRIMITIVE_CACHE_CAPACITY" not in os.environ:  # its older name
        for name, most in _KERNELS.items():
            os.environ.setdefault(name, most)


def keep_memory() -> bool:
    """Let glibc keep what a forward pass gives back, up to 256 MB, for the next one; whether it does.

    By default it returns each large tensor to the kernel, which clears the pages before the next pass has them again:
    5 to 8 % of the CPU time of torch on a CPU (docs/performance-engines.md). What the environment says wins.
    """
    if any(name.startswith("MALLOC_") for name in os.environ) or "GLIBC_TUNABLES" in os.environ:
        return False
    with contextlib.suppress(AttributeError, OSError):  # another C library than glibc
        mallopt = ctypes.CDLL(None).mallopt
        return all(mallopt(option, _KEPT_BYTES) for option in (_MMAP_THRESHOLD, _TRIM_THRESHOLD))
    return False


def spare_garbage() -> None:
    """Tell the garbage collector to leave alone what exists by now: modules and models, which stay.

    It would walk over all of it again and again while jobs come and go, for a third of the worker's own time an item
    (docs/performance.md). What is counted by references alone is freed as ever.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG_OBJECTS)


def available_cpus(limits: CgroupLimits | None = None) -> float:
    """CPUs this process can really use. ``limits``: of its control groups; by default they are read."""
    affinity = float(len(os.sched_getaffinity(0)))
    return min(affinity, (limits or read_limits()).cpus or affinity)


def available_memory(limits: CgroupLimits | None = None) -> int:
    """Bytes this process can really use, with its children: the machine's memory or its control groups' limit."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(machine, (limits or read_limits()).memory_bytes or machine)


def limit_threads(threads: int) -> None:
    """Tell compute libraries that are loaded from now on how many threads they may start: by default they count the
    machine's CPUs, whatever the quota. What the environment says wins."""
    for name in _THREAD_VARIABLES:
        os.environ.setdefault(name, str(threads))


def threads_for(image: ImageConfig | None, limits: CgroupLimits | None = None) -> int:
    """Compute threads for the models of a worker: the image's CPU limit, as far as machine and cgroup have them."""
    cpus = available_cpus(limits)
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
