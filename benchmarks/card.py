"""What a benchmark prints, and its command line: ``python -m benchmarks.<name> [--seconds 20] [--json-only]``."""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from benchmarks.stats import rounded
from cortex_tasks.terminal import table

__all__ = ["SECONDS", "Benchmark", "Figures", "Row", "command_line", "shown", "stop_on_sigterm"]

#: How long each part of a benchmark runs by default.
SECONDS: Final = 20.0

#: A benchmark's JSON line: name -> a number, or a dictionary of numbers.
Figures = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a card: a figure and, where we hold ourselves to one, its bound (a number or another figure)."""

    field: str
    label: str
    unit: str = ""
    at_least: float | None = None
    at_most: float | str | None = None
    #: Where its own bound is missed, the run was disturbed, and no other bound is judged.
    condition: bool = False

    def bound(self, figures: Figures, *, disturbed: bool) -> str:
        """``≥ 0.95`` or ``≤ 250``, with whether it was met; "" without one."""
        if self.at_least is None and self.at_most is None:
            return ""
        verdict = "met" if self.is_met(figures) else "MISSED"
        if disturbed and not self.condition:
            verdict = "not judged: disturbed"
        sign, limit = ("≥", self.at_least) if self.at_least is not None else ("≤", self._most(figures))
        return f"{sign} {shown(limit)} {verdict}"

    def is_met(self, figures: Figures) -> bool:
        """Its bound, if it has one."""
        if self.at_least is not None:
            return bool(figures[self.field] >= self.at_least)
        return bool(figures[self.field] <= self._most(figures))

    def _most(self, figures: Figures) -> float:
        if isinstance(self.at_most, str):
            return float(figures[self.at_most])
        return math.inf if self.at_most is None else self.at_most


def shown(value: float) -> str:
    """A figure for people: 3 significant digits, thousands grouped."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


@dataclass(frozen=True, slots=True)
class Benchmark:
    """``measure(seconds, say)`` returns the figures; ``say`` tells a person what is being measured."""

    name: str
    title: str
    rows: Sequence[Row]
    measure: Callable[[float, Callable[[str], None]], Figures]

    def run(self, seconds: float, say: Callable[[str], None]) -> Figures:
        """Measure, and round to what the measurement can tell."""
        began_s = time.monotonic()
        figures = self.measure(seconds, lambda text: say(f"{self.name}: {text}"))
        return {
            "benchmark": self.name,
            "seconds": seconds,
            "took_s": round(time.monotonic() - began_s, 1),
            **{name: _rounded(value) for name, value in figures.items()},
        }

    def card(self, figures: Figures) -> str:
        """The figures as a table, each with its bound; one line when there is nothing to measure here."""
        if "skipped" in figures:
            return f"{self.title}: skipped, {figures['skipped']}"
        disturbed = any(row.condition and not row.is_met(figures) for row in self.rows)
        lines = table(
            ("", "measured", "", "we hold ourselves to"),
            [
                (row.label, shown(figures[row.field]), row.unit, row.bound(figures, disturbed=disturbed))
                for row in self.rows
            ],
        )
        return "\n".join([f"{self.title}", "", *lines, ""])


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _rounded(entry) for name, entry in value.items()}
    return rounded(value) if isinstance(value, float) else value


def command_line(benchmark: Benchmark, argv: Sequence[str] | None = None) -> None:
    """Run one benchmark as a program."""
    parser = argparse.ArgumentParser(description=benchmark.title)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="length of each part (default %(default)s)")
    parser.add_argument("--json-only", action="store_true", help="print nothing but the JSON line")
    options = parser.parse_args(argv)
    stop_on_sigterm()
    figures = benchmark.run(options.seconds, _nobody if options.json_only else _person)
    if not options.json_only:
        print(benchmark.card(figures))
    print(json.dumps(figures))


def stop_on_sigterm() -> None:
    """SIGTERM ends the program as Ctrl-C does: through the contexts that stop its processes."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def _nobody(text: str) -> None:
    """Keeps quiet."""


def _person(text: str) -> None:
    print(f"… {text}", file=sys.stderr, flush=True)
