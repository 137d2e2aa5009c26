"""One line on stderr that says how far ``map`` is."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sized
from typing import Any, Final, Self, TextIO

_EVERY_S: Final = 0.1


class Progress:
    """``embed 12,345 of 20,000 (61 %), 1,800/s``, written over itself while it changes."""

    def __init__(
        self, label: str, total: int | None, stream: TextIO | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._label, self._total, self._stream, self._clock = label, total, stream, clock
        self._count = 0
        self._began = self._written = clock()

    @classmethod
    def of(cls, label: str, inputs: Any, wanted: bool | None) -> Self:
        """For a stream of ``inputs``. ``wanted=None``: where stderr is a terminal."""
        # None in a program that was started without one.
        stderr: TextIO | None = sys.stderr
        show = stderr is not None and stderr.isatty() if wanted is None else wanted
        return cls(label, len(inputs) if isinstance(inputs, Sized) else None, stderr if show else None)

    def add(self, count: int) -> None:
        """So many more inputs were answered."""
        self._count += count
        now = self._clock()
        if self._stream is not None and now - self._written >= _EVERY_S:
            self._written = now
            self._write(now)

    def close(self) -> None:
        """Leave the final figures on the screen."""
        if self._stream is not None:
            self._write(self._clock())
            self._stream.write("\n")
            self._stream.flush()

    def _write(self, now: float) -> None:
        assert self._stream is not None
        whole = f" of {self._total:,} ({self._count / self._total:.0%})" if self._total else ""
        rate = self._count / max(now - self._began, 1e-9)
        self._stream.write(f"\r{self._label} {self._count:,}{whole}, {rate:,.0f}/s\x1b[K")
        self._stream.flush()
