"""What is to be logged while a lock is held is logged once it is free.

A handler may itself ask the fleet, or wait for another thread that does; under the client's lock that never ends.
"""

from __future__ import annotations

import logging
import threading
from types import TracebackType

__all__ = ["Quiet", "warn"]

_here = threading.local()


class Quiet:
    """``with Quiet(), lock``: what this thread warns of within is logged at the end, of the outermost where they are
    nested."""

    __slots__ = ("_outermost",)

    def __enter__(self) -> None:
        self._outermost = getattr(_here, "kept", None) is None
        if self._outermost:
            _here.kept = []

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._outermost:
            kept, _here.kept = _here.kept, None
            for log, message, args in kept:
                log.warning(message, *args)


def warn(log: logging.Logger, message: str, *args: object) -> None:
    """Log a warning, at the end of the ``Quiet`` that this thread is in."""
    kept = getattr(_here, "kept", None)
    if kept is None:
        log.warning(message, *args)
    else:
        kept.append((log, message, args))
