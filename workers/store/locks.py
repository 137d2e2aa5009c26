"""Locks among the processes of a host: flock on a file, so that a lock ends with its holder, however that ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, Self

__all__ = ["FileLock"]

#: A waiting process looks again after this long.
_POLL_S: Final = 0.05


class FileLock:
    """A lock that is held until ``release``. The file stays: removing it would let two holders in."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor

    @classmethod
    def take(
        cls,
        path: Path,
        *,
        shared: bool = False,
        wait_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> Self | None:
        """The lock, or None when others still hold it after ``wait_s``. Raises OSError where no file can be opened.

        On a read-only disk a shared lock is taken on the file as it is; one that does not exist cannot be made.
        """
        # Python's descriptors are not inherited by programs that are started, so no child keeps a lock alive.
        writable = os.O_RDWR | os.O_CREAT
        try:
            descriptor = os.open(path, writable, 0o644)
        except OSError:
            if not shared:
                raise
            descriptor = os.open(path, os.O_RDONLY)
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        until_s = clock() + wait_s
        while True:
            try:
                fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
                return cls(descriptor)
            except BlockingIOError:
                if clock() >= until_s:
                    os.close(descriptor)
                    return None
            except BaseException:
                os.close(descriptor)
                raise
            sleep(_POLL_S)

    def release(self) -> None:
        """Give the lock back. May be repeated."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
