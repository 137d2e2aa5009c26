"""Drawing for terminals: colours where they belong, tables, bars, sparklines and a time-series plot."""

from __future__ import annotations

import itertools
import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, Final

__all__ = ["Band", "Style", "bar", "plot", "sparkline", "style_for", "table", "terminal_width"]

_CODES: Final = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "blue": "34",
                 "magenta": "35", "cyan": "36"}  # fmt: skip
_BLOCKS: Final = "▁▂▃▄▅▆▇█"
# The dots of a braille cell by (column, row), as bits above U+2800.
_DOTS: Final = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))


@dataclass(frozen=True, slots=True)
class Style:
    """Wraps text in colours, or does not."""

    coloured: bool = False

    def __call__(self, text: str, *names: str) -> str:
        if not self.coloured or not names or not text:
            return text
        return f"\033[{';'.join(_CODES[name] for name in names)}m{text}\033[0m"


def style_for(stream: IO[Any], environ: Mapping[str, str] | None = None) -> Style:
    """Colours only on a terminal that can show them, and never with NO_COLOR (https://no-color.org)."""
    env = os.environ if environ is None else environ
    return Style(stream.isatty() and not env.get("NO_COLOR") and env.get("TERM") != "dumb")


def terminal_width(most: int = 100) -> int:
    """Columns to draw in; 80 where no terminal says otherwise."""
    return max(40, min(most, shutil.get_terminal_size((80, 24)).columns))


def table(header: Sequence[str], rows: Iterable[Sequence[object]], style: Style | None = None) -> list[str]:
    """Aligned columns; numbers to the right."""
    cells = [["" if value is None else str(value) for value in row] for row in rows]
    raw = [list(header), *cells]
    widths = [max(len(row[at]) for row in raw) for at in range(len(header))]
    numeric = [bool(cells) and all(_is_number(row[at]) for row in cells) for at in range(len(header))]
    lines = []
    for row in raw:
        parts = [f"{c:>{w}}" if right else f"{c:<{w}}" for c, w, right in zip(row, widths, numeric, strict=True)]
        lines.append("  ".join(parts).rstrip())
    lines[0] = (style or Style())(lines[0], "bold")
    return lines


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).replace(",", "").lstrip("-").isdigit() or text in ("", "-")


def bar(share: float, width: int = 20) -> str:
    """A horizontal bar for a share of 0..1."""
    filled = round(max(0.0, min(1.0, share)) * width)
    return "█" * filled + "·" * (width - filled)


def sparkline(values: Sequence[float], width: int = 60) -> str:
    """One line of blocks; several values a column are averaged."""
    columns = [_mean(values[a:b]) for a, b in _slices(len(values), width)]
    low, high = min(columns, default=0.0), max(columns, default=0.0)
    span = (high - low) or 1.0
    return "".join(_BLOCKS[min(7, int((value - low) / span * 8))] for value in columns)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _slices(length: int, width: int) -> list[tuple[int, int]]:
    """``length`` items cut into at most ``width`` runs of nearly equal size."""
    columns = min(length, width)
    edges = [round(at * length / columns) for at in range(columns + 1)] if columns else [0]
    return list(itertools.pairwise(edges))


@dataclass(frozen=True, slots=True)
class Band:
    """A forecast behind a history: the line and its interval, of one length."""

    yhat: Sequence[float]
    lower: Sequence[float]
    upper: Sequence[float]


def plot(
    history: Sequence[float],
    band: Band,
    labels: tuple[str, str, str],
    *,
    width: int = 76,
    height: int = 12,
    style: Style | None = None,
    marks: Iterable[int] = (),
) -> list[str]:
    """A history, then its forecast with the interval shaded, drawn in braille.

    ``labels``: the first, the boundary's and the last point's. ``marks``: points (from 0) to draw as ``●``.
    """
    canvas = _Canvas(history, band, width, height)
    canvas.draw(marks)
    return canvas.lines(labels, style or Style())


class _Canvas:
    def __init__(self, history: Sequence[float], band: Band, width: int, height: int) -> None:
        self.history, self.band, self.height = list(history), band, height
        values = [*self.history, *band.yhat, *band.lower, *band.upper]
        self.low, self.high = min(values), max(values)
        if self.high == self.low:
            self.low, self.high = self.low - 1.0, self.high + 1.0
        ticks = [_number(value) for value in (self.low, (self.low + self.high) / 2, self.high)]
        self.margin = max(map(len, ticks))
        self.width = max(10, width - self.margin - 2)
        self.points = len(self.history) + len(band.yhat)
        self.dots = [[0] * self.width for _ in range(height)]
        self.shade = [[" "] * self.width for _ in range(height)]

    def draw(self, marks: Iterable[int]) -> None:
        start = len(self.history)
        for column in range(self._x(start) // 2, self.width) if self.band.yhat else ():
            point = round(column * (self.points - 1) / (self.width - 1)) - start
            at = min(max(0, point), len(self.band.yhat) - 1)
            for row in range(self._y(self.band.upper[at]) // 4, self._y(self.band.lower[at]) // 4 + 1):
                self.shade[row][column] = "░"
        line = [*self.history, *self.band.yhat]
        for at, value in enumerate(line):
            self._segment(at, line[max(0, at - 1)], value)
        for at in marks:
            self.shade[self._y(line[at]) // 4][self._x(at) // 2] = "●"

    def _segment(self, at: int, before: float, value: float) -> None:
        """Dots from the point before to this one, so that steep parts stay connected."""
        x0, x1, y0, y1 = self._x(max(0, at - 1)), self._x(at), self._y(before), self._y(value)
        steps = max(abs(x1 - x0), abs(y1 - y0), 1)
        for step in range(steps + 1):
            x, y = x0 + round((x1 - x0) * step / steps), y0 + round((y1 - y0) * step / steps)
            self.dots[y // 4][x // 2] |= _DOTS[x % 2][y % 4]

    def _x(self, at: int) -> int:
        return round(at * (self.width * 2 - 1) / max(1, self.points - 1))

    def _y(self, value: float) -> int:
        """Dot row from the top."""
        share = (self.high - value) / (self.high - self.low)
        return min(self.height * 4 - 1, max(0, round(share * (self.height * 4 - 1))))

    def lines(self, labels: tuple[str, str, str], style: Style) -> list[str]:
        boundary = self._x(len(self.history)) // 2 if self.band.yhat else self.width
        drawn = []
        for row in range(self.height):
            tick = {0: self.high, self.height // 2: (self.low + self.high) / 2, self.height - 1: self.low}.get(row)
            axis = f"{_number(tick) if tick is not None else '':>{self.margin}} {'┤' if tick is not None else '│'}"
            cells = "".join(
                style(self._cell(row, column), *self._colour(row, column, boundary)) for column in range(self.width)
            )
            drawn.append(axis + cells.rstrip())
        drawn.append(" " * self.margin + " └" + "".join("┴" if at == boundary else "─" for at in range(self.width)))
        return [*drawn, " " * (self.margin + 2) + self._legend(labels, boundary)]

    def _cell(self, row: int, column: int) -> str:
        if self.shade[row][column] == "●":
            return "●"
        bits = self.dots[row][column]
        return chr(0x2800 + bits) if bits else self.shade[row][column]

    def _colour(self, row: int, column: int, boundary: int) -> tuple[str, ...]:
        if self.shade[row][column] == "●":
            return ("red", "bold")
        if column < boundary:
            return ()
        return ("cyan", "bold") if self.dots[row][column] else ("cyan", "dim") if self.shade[row][column] != " " else ()

    def _legend(self, labels: tuple[str, str, str], boundary: int) -> str:
        first, middle, last = labels
        text = list(first.ljust(self.width)[: self.width])
        for label, start in ((last, self.width - len(last)), (middle, boundary - len(middle) // 2)):
            start = min(max(0, start), self.width - len(label))
            around = text[max(0, start - 1) : start + len(label) + 1]
            if label and start >= 0 and all(character == " " for character in around):
                text[start : start + len(label)] = label
        return "".join(text).rstrip()


def _number(value: float) -> str:
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}"
