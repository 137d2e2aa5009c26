"""Schedules in cron's syntax: minute, hour, day of the month, month, day of the week, in UTC.

A field is ``*``, a number, a range ``1-5``, any of these with a step ``*/15``, or a list of them with commas; months
and days of the week also by their first three letters, Sunday is 0 or 7. As cron has it, a moment fits either day
where both days are restricted.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Final, NamedTuple, Self

__all__ = ["Cron"]

_MONTHS: Final = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_DAYS: Final = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_PART: Final = re.compile(r"(?:(\*)|(\w{1,4})(?:-(\w{1,4}))?)(?:/(\d{1,3}))?")
#: ``latest`` looks back no further: a schedule that was missed for a day is not caught up with.
_LOOK_BACK_MINUTES: Final = 1_440


class _Field(NamedTuple):
    name: str
    low: int
    high: int
    #: Names of the numbers from ``low``.
    names: tuple[str, ...] = ()

    def parse(self, text: str) -> frozenset[int]:
        """The numbers that a field stands for. Raises ValueError."""
        return frozenset(number for part in text.split(",") for number in self._part(part))

    def _part(self, part: str) -> range:
        match = _PART.fullmatch(part)
        if match is None:
            raise ValueError(f"{self.name} {part[:20]!r} is none of '*', '5', '1-5', '*/15'")
        star, first, last, step = match.groups()
        low = self.low if star else self._number(first)
        # A single number with a step goes on to the end, as cron has it.
        high = self._number(last) if last else self.high if star or step else low
        if low > high or step == "0" * len(step or "-"):
            raise ValueError(f"{self.name} {part[:20]!r} is an empty range")
        return range(low, high + 1, int(step or 1))

    def _number(self, text: str) -> int:
        if text.lower() in self.names:
            return self.names.index(text.lower()) + self.low
        if not (text.isascii() and text.isdigit() and self.low <= int(text) <= self.high):
            raise ValueError(f"{self.name} {text[:20]!r} is not within {self.low} to {self.high}")
        return int(text)


_FIELDS: Final = (
    _Field("minute", 0, 59),
    _Field("hour", 0, 23),
    _Field("day of the month", 1, 31),
    _Field("month", 1, 12, _MONTHS),
    _Field("day of the week", 0, 7, _DAYS),
)


class Cron(NamedTuple):
    """A schedule."""

    minutes: frozenset[int]
    hours: frozenset[int]
    days: frozenset[int]
    months: frozenset[int]
    #: Sunday is 0.
    weekdays: frozenset[int]
    #: Both days are restricted: one of them suffices.
    either_day: bool

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises ValueError that names the field."""
        parts = text.split()
        if len(parts) != len(_FIELDS):
            raise ValueError(
                f"{text[:40]!r} has {len(parts)} fields; cron's five are {', '.join(f.name for f in _FIELDS)}"
            )
        minutes, hours, days, months, weekdays = (f.parse(part) for f, part in zip(_FIELDS, parts, strict=True))
        either_day = not parts[2].startswith("*") and not parts[4].startswith("*")
        return cls(minutes, hours, days, months, frozenset(day % 7 for day in weekdays), either_day)

    def matches(self, at_s: float) -> bool:
        """Whether the minute of an epoch second is one of the schedule."""
        at = datetime.fromtimestamp(at_s, UTC)
        day, weekday = at.day in self.days, at.isoweekday() % 7 in self.weekdays
        today = (day or weekday) if self.either_day else (day and weekday)
        return today and at.minute in self.minutes and at.hour in self.hours and at.month in self.months

    def latest(self, after_s: float, until_s: float) -> int | None:
        """The last scheduled moment after one epoch second and up to another; None when there is none."""
        last = int(until_s // 60)
        first = max(int(after_s // 60), last - _LOOK_BACK_MINUTES)
        return next((minute * 60 for minute in range(last, first, -1) if self.matches(minute * 60)), None)
