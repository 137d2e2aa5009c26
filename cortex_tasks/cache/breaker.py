"""A cache that is down or slow is skipped for a while instead of being asked again and again."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

from cortex_tasks.quiet import warn

__all__ = ["Breaker"]

_log = logging.getLogger(__name__)

#: The first pause, doubled by each failure that follows up to the longest.
FIRST_PAUSE_S: Final = 0.1
LONGEST_PAUSE_S: Final = 5.0
#: A cache that comes and goes is spoken of this often.
TELL_EVERY_S: Final = 60.0


class Breaker:
    """Says whether to ask. After a pause one caller tries for all; the first success ends it.

    ``name``: of what is skipped, for the log, its password masked. ``clock``: monotonic seconds.
    """

    def __init__(self, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._name = name
        self._clock = clock
        self._closed_until_s = 0.0
        self._pause_s = 0.0
        self._told_s = -TELL_EVERY_S
        self._untold, self._out = 0, False
        #: How often asking failed, and how often it was not asked.
        self.failures = 0
        self.skips = 0

    @property
    def open(self) -> bool:
        """Whether the cache is being skipped."""
        return self._pause_s > 0

    def allows(self) -> bool:
        """Whether to ask now."""
        if not self._pause_s:
            return True
        now_s = self._clock()
        if now_s < self._closed_until_s:
            self.skips += 1
            return False
        # This caller tries; the others wait for what it finds.
        self._closed_until_s = now_s + self._pause_s
        return True

    def succeeded(self) -> None:
        self._pause_s = 0.0
        if self._out:
            self._out = False
            warn(_log, "the cache at %s answers again", self._name)

    def failed(self, error: BaseException) -> None:
        """Note a failure, with one line in the log for the first of a row, and one in TELL_EVERY_S at most."""
        self.failures += 1
        now_s = self._clock()
        first = not self._pause_s
        self._pause_s = min(self._pause_s * 2, LONGEST_PAUSE_S) if self._pause_s else FIRST_PAUSE_S
        self._closed_until_s = now_s + self._pause_s
        if (first or not self._out) and now_s - self._told_s >= TELL_EVERY_S:
            untold = self._untold
            self._told_s, self._untold, self._out = now_s, 0, True
            # Last of all: a handler that asks the cache finds it skipped.
            self._tell(error, untold)
        elif first:
            self._untold += 1

    def _tell(self, error: BaseException, untold: int) -> None:
        before = f" (and {untold} times since this was last said)" if untold else ""
        warn(_log, "the cache at %s is skipped until it answers again: %s: %s; jobs are computed meanwhile%s",
             self._name, type(error).__name__, error, before)  # fmt: skip
