"""The interpreter's objects on huge pages, where Linux has them: a worker that was idle answers sooner.

While nothing is to be done the processor forgets where a worker's objects lie, and a forward pass drives them out of
its caches. With pages of 4 KB the next job then pays for a walk through the page tables (two of them on a virtual
machine) at every few objects it touches; with pages of 2 MB it hardly pays any (docs/performance.md). The kernel moves
what is there (``MADV_COLLAPSE``, Linux 6.1); addresses stay, and so does what the process may hold, but for holes that
are filled. What cannot be moved stays where it is.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

__all__ = ["Advise", "gather", "page_bytes", "stretches"]

logger = logging.getLogger(__name__)

_KERNEL: Final = Path("/sys/kernel/mm/transparent_hugepage")
_MADV_COLLAPSE: Final = 25
#: Larger pages (512 MB, where the small ones have 64 KB) would fill more than they help.
_LARGEST_BYTES: Final = 32 * 2**20

#: ``madvise``: address, bytes, advice; 0 when the kernel has done it.
Advise = Callable[[int, int, int], int]


def page_bytes(kernel: Path = _KERNEL) -> int:
    """The size of a huge page; 0 where there are none, they are too large, or the machine's owner wants none."""
    try:
        if "[never]" in (kernel / "enabled").read_text():
            return 0
        size_bytes = int((kernel / "hpage_pmd_size").read_text())
    except (OSError, ValueError):
        return 0
    return size_bytes if size_bytes <= _LARGEST_BYTES else 0


def stretches(objects: Iterable[object], size_bytes: int) -> list[int]:
    """The addresses, multiples of ``size_bytes``, of the stretches of memory in which the objects begin."""
    return [number * size_bytes for number in sorted({id(one) // size_bytes for one in objects})]


def gather(*, kernel: Path = _KERNEL, advise: Advise | None = None) -> threading.Thread | None:
    """Begin to move all objects that the garbage collector knows of to huge pages: call it before they are frozen.

    It goes on in a thread of its own, which takes no part of the interpreter: some milliseconds for each page. None
    where there is nothing to do.
    """
    size_bytes = page_bytes(kernel)
    chosen = advise or _madvise()
    if not size_bytes or chosen is None:
        return None
    found = stretches(gc.get_objects(), size_bytes)
    thread = threading.Thread(target=_move, args=(found, size_bytes, chosen), name="huge-pages", daemon=True)
    thread.start()
    return thread


def _move(found: Iterable[int], size_bytes: int, advise: Advise) -> None:
    # One that cannot be moved (no memory, part of it not ours) is no reason not to try the next.
    moved = sum(advise(address, size_bytes, _MADV_COLLAPSE) == 0 for address in found)
    if moved:
        logger.info("%d MB of the interpreter's memory moved to huge pages", moved * size_bytes // 2**20)


def _madvise() -> Advise | None:
    if not hasattr(os, "sched_setaffinity"):  # not Linux
        return None
    try:
        call = ctypes.CDLL(None).madvise
    except (AttributeError, OSError):
        return None
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    advise: Advise = call
    return advise
