"""Drawing for terminals."""

from __future__ import annotations

import io
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortex_tasks.terminal import Band, Style, bar, plot, sparkline, style_for, table

FINITE = st.floats(-1e9, 1e9)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "environ", "coloured"),
    [
        (Terminal(), {"TERM": "xterm"}, True),
        (Terminal(), {"TERM": "xterm", "NO_COLOR": "1"}, False),
        (Terminal(), {"TERM": "xterm", "NO_COLOR": ""}, True),
        (Terminal(), {"TERM": "dumb"}, False),
        (io.StringIO(), {"TERM": "xterm"}, False),
    ],
)
def test_colours_only_where_they_belong(stream: io.StringIO, environ: dict[str, str], coloured: bool) -> None:
    style = style_for(stream, environ)
    assert style("x", "red", "bold") == ("\033[31;1mx\033[0m" if coloured else "x")


def test_columns_are_aligned_and_numbers_stand_right() -> None:
    assert table(("name", "n"), [("a", 1), ("bcdef", 1000)]) == ["name      n", "a         1", "bcdef  1000"]


def test_a_table_without_rows_is_its_header() -> None:
    assert table(("a", "b"), []) == ["a  b"]


def test_bars() -> None:
    assert (bar(0, 4), bar(0.5, 4), bar(1, 4), bar(7, 4)) == ("····", "██··", "████", "████")


def test_a_sparkline_goes_from_low_to_high() -> None:
    assert sparkline([1, 2, 3, 4, 5, 6, 7, 8]) == "▁▂▃▄▅▆▇█"
    assert sparkline([]) == ""
    assert sparkline([3.0, 3.0]) == "▁▁"


@given(st.lists(FINITE, max_size=300), st.integers(1, 80))
def test_a_sparkline_fits(values: list[float], width: int) -> None:
    assert len(sparkline(values, width)) == min(len(values), width)


@given(
    st.lists(FINITE, min_size=1, max_size=120),
    st.lists(st.tuples(FINITE, FINITE, FINITE).map(sorted), max_size=60),
    st.integers(40, 100),
    st.integers(3, 20),
)
def test_a_plot_fits_its_frame_whatever_the_values(
    history: list[float], future: list[list[float]], width: int, height: int
) -> None:
    band = Band([v[1] for v in future], [v[0] for v in future], [v[2] for v in future])
    lines = plot(history, band, ("2024-01-01", "now", "2024-12-31"), width=width, height=height)
    assert len(lines) == height + 2
    assert max(map(len, lines)) <= max(width, 30)


def test_a_plot_shows_the_line_the_interval_the_marks_and_the_axes() -> None:
    history = [math.sin(day / 5) for day in range(60)]
    band = Band([0.0] * 30, [-0.5] * 30, [0.5] * 30)
    lines = plot(history, band, ("first", "now", "last"), width=80, height=9, marks=[8])
    text = "\n".join(lines)
    assert "●" in text
    assert "░" in text
    assert lines[0].lstrip().startswith("1.00 ┤")
    assert lines[8].lstrip().startswith("-1.00 ┤")
    assert "┴" in lines[-2]
    assert lines[-1].split() == ["first", "now", "last"]
    # The interval is shaded behind the forecast only.
    boundary = lines[-2].index("┴")
    assert all("░" not in line[:boundary] for line in lines)


def test_a_plot_can_be_coloured_without_changing_its_shape() -> None:
    band = Band([1.0, 2.0], [0.0, 1.0], [2.0, 3.0])
    plain = plot([1.0, 2.0, 1.0], band, ("a", "b", "c"))
    coloured = plot([1.0, 2.0, 1.0], band, ("a", "b", "c"), style=Style(coloured=True))
    import re

    assert [re.sub(r"\033\[[0-9;]*m", "", line).rstrip() for line in coloured] == [line.rstrip() for line in plain]
