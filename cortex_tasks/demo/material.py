"""What the demo works on: sentences, and a daily series whose truth is known because it is made here."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from datetime import date, timedelta
from importlib import resources
from typing import Final

__all__ = ["ANOMALIES", "DAYS", "HOLDOUT", "Visits", "sentences", "visits"]

#: Days of history, and days kept back to judge the forecast by.
DAYS: Final = 3 * 365
HOLDOUT: Final = 42
#: Days (from 0) of the history on which something happened, and how the day's value changed.
ANOMALIES: Final = {410: 2.1, 655: 0.2, 890: 1.8}

_FIRST: Final = date(2021, 1, 4)
_WEEK: Final = (1.08, 1.12, 1.10, 1.06, 0.98, 0.78, 0.88)


@dataclass(frozen=True, slots=True)
class Visits:
    """Visits a day to a public library: a growing town, quiet summers, full Tuesdays, empty Saturdays."""

    ds: list[str]
    y: list[float]
    #: What came after the history.
    future: list[float]

    def series(self) -> dict[str, list[str] | list[float]]:
        return {"ds": self.ds, "y": self.y}


def sentences() -> list[str]:
    """A few hundred true sentences on many topics."""
    text = resources.files("cortex_tasks").joinpath("demo_data", "sentences.txt").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line]


def visits(*, with_anomalies: bool = False) -> Visits:
    """The same numbers on every machine."""
    noise = random.Random(20210104)
    y = [_expected(day) * (1 + noise.gauss(0, 0.03)) for day in range(DAYS + HOLDOUT)]
    if with_anomalies:
        for day, factor in ANOMALIES.items():
            y[day] *= factor
    y = [round(value, 1) for value in y]
    ds = [(_FIRST + timedelta(days=day)).isoformat() for day in range(DAYS)]
    return Visits(ds, y[:DAYS], y[DAYS:])


def _expected(day: int) -> float:
    season = 1 + 0.18 * math.cos(2 * math.pi * (day - 20) / 365.25)
    return (900 + 0.35 * day) * season * _WEEK[day % 7]
