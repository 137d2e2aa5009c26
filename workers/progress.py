"""Does the worker finish what it takes? Pure: the time is an argument."""

from __future__ import annotations

__all__ = ["Progress"]


class Progress:
    """For how long jobs have been in hand and none of their items has been finished."""

    def __init__(self) -> None:
        self._done = 0
        self._since_s: float | None = None

    def update(self, now_s: float, *, done: int, in_hand: int, excused: bool) -> float:
        """Seconds without progress; 0.0 while nothing is in hand.

        ``now_s``: seconds of any clock; ``done``: a total that grows; ``excused``: a model computes or is being
        loaded, which ends by itself or by the watchdog, or Redis is away: no standstill, however long it takes.
        """
        if self._since_s is None or done != self._done or in_hand == 0 or excused:
            self._done, self._since_s = done, now_s
        return now_s - self._since_s
