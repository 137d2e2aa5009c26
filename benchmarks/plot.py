"""The picture of a run: Cortex next to stock Celery (both measured) and to others (published reference figures)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from benchmarks.card import shown
from benchmarks.rivals import RIVALS, STOCK_PER_S

__all__ = ["draw"]

_OURS: Final = "#0b6e4f"
_STOCK: Final = "#c8553d"
_OTHERS: Final = "#a9b0b8"
_INK: Final = "#24292f"
_MUTED: Final = "#6a737d"
_STYLE: Final[Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _MUTED,
    "xtick.color": _MUTED,
    "ytick.color": _INK,
    # The same figures give the same file.
    "svg.hashsalt": "cortex",
}


class Bar(NamedTuple):
    name: str
    value: float
    label: str
    colour: str


def draw(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write ``performance.png`` and ``performance.svg``; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"performance.{kind}" for kind in ("png", "svg")]
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(12.5, 5.4))
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2, gridspec_kw={"wspace": 0.36, "width_ratios": (1.12, 1)})
        figure.subplots_adjust(left=0.148, right=0.98, top=0.92, bottom=0.22)
        _requests(left, results["overhead"])
        _model(right, results["throughput"])
        _legend(figure, results["machine"])
        for path in paths:
            metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
            figure.savefig(path, dpi=160, metadata=metadata, facecolor="white")
    return paths


def _requests(axes: Axes, overhead: Mapping[str, Any]) -> None:
    """Multiples of stock Celery on the same machine, since the machines differ."""
    ours, stock = overhead["async_singles_per_s"], overhead["stock_jobs_per_s"]
    bars = [
        Bar("Cortex", ours / stock, f"{_times(ours / stock)}  ({shown(ours)}/s here)", _OURS),
        Bar("stock Celery *", 1.0, f"1 ×  ({shown(stock)}/s here, {shown(STOCK_PER_S)}/s there)", _STOCK),
    ]
    for rival in RIVALS:
        times = rival.per_s / STOCK_PER_S
        name = f"{rival.name} *" if rival.all_published else rival.name
        bars.append(Bar(name, times, f"{_times(times)}  ({shown(rival.per_s)}/s there)", _OTHERS))
    drawn = _bars(axes, [sorted(bars, key=lambda bar: -bar.value)])
    for bar, at in drawn:
        axes.text(bar.value, at, f" {bar.label}", va="center", ha="left", fontsize=9)
    axes.set_xlim(0, 1.42 * max(bar.value for bar in bars))
    axes.set_title("Single requests to a no-op model, 64 in flight", loc="left", fontsize=11.5, fontweight="bold")
    axes.set_xlabel("requests a second, as a multiple of stock Celery's on the same machine")


def _times(factor: float) -> str:
    return f"{factor:.1f} ×" if factor < 9.95 else f"{factor:.0f} ×"


def _model(axes: Axes, throughput: Mapping[str, Any]) -> None:
    """Shares of the raw engine in the same minutes: these compare from machine to machine."""
    bulk = [_share("Cortex.map", throughput["map_ratio"], _OURS)]
    bulk += [_share(rival.name, rival.bulk, _OTHERS) for rival in RIVALS if rival.bulk is not None]
    singles = [
        _share("Cortex, 512 in flight", throughput["singles_ratio"], _OURS),
        _share("Cortex", throughput["singles_256_ratio"], _OURS),
        _share("stock Celery *", throughput["naive_celery_ratio"], _STOCK),
        *(_share(rival.name, rival.singles_256, _OTHERS) for rival in RIVALS if rival.singles_256 is not None),
    ]
    groups = [sorted(group, key=lambda bar: -bar.value) for group in (bulk, singles)]
    drawn = _bars(axes, groups)
    for bar, at in drawn:
        colour = _INK if bar.colour == _OTHERS else "white"
        # Not across the dashed line.
        end = 1.0 if 1.0 < bar.value < 1.09 else bar.value
        axes.text(end, at, f"{bar.label} ", va="center", ha="right", fontsize=9, color=colour)
    for group, heading in zip(groups, ("in bulk", "single texts, 256 in flight"), strict=True):
        top = min(at for bar, at in drawn if bar in group)
        axes.text(0.0, top - 0.62, heading, va="bottom", ha="left", fontsize=9, color=_MUTED, style="italic")
    axes.axvline(1.0, color=_INK, linewidth=1, linestyle=(0, (4, 3)), zorder=3)
    axes.set_xlim(0, max(1.1, *(bar.value + 0.04 for bar, _ in drawn)))
    axes.set_title("MiniLM, texts a second", loc="left", fontsize=11.5, fontweight="bold")
    axes.set_xlabel("share of the raw in-process engine on the same machine")


def _share(name: str, value: float, colour: str) -> Bar:
    return Bar(name, value, f"{value:.2f}", colour)


def _bars(axes: Axes, groups: Sequence[Sequence[Bar]]) -> list[tuple[Bar, float]]:
    """Horizontal bars from the top down, with room above each group; returns where each is."""
    placed: list[tuple[Bar, float]] = []
    at = 0.0
    for group in groups:
        at += 0.9 if len(groups) > 1 else 0.0
        for bar in group:
            placed.append((bar, at))
            at += 1.0
    places = [place for _, place in placed]
    axes.barh(places, [bar.value for bar, _ in placed], color=[bar.colour for bar, _ in placed], height=0.7, zorder=2)
    axes.set_yticks(places, [bar.name for bar, _ in placed])
    axes.set_ylim(at - 0.4, -0.6)
    axes.grid(axis="x", color="#e6e8eb", linewidth=0.8, zorder=0)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    for tick, (bar, _) in zip(axes.get_yticklabels(), placed, strict=True):
        tick.set_fontweight("bold" if bar.colour == _OURS else "normal")
    return placed


def _legend(figure: Figure, machine: Mapping[str, Any]) -> None:
    here = f"{machine['cpu']}, {machine['cores']} cores, {machine['date']}"
    labels = {
        f"Cortex, measured here ({here})": _OURS,
        "stock Celery 5.7, measured here": _STOCK,
        "others, measured there: a 2-core reference machine": _OTHERS,
    }
    note = "* all jobs published, then all answers fetched; with MiniLM by SentenceTransformer.encode, one text a job"
    figure.text(0.0215, 0.015, note, ha="left", va="bottom", fontsize=9, color=_MUTED)
    handles = [Patch(color=colour) for colour in labels.values()]
    figure.legend(
        handles, list(labels), loc="lower left", bbox_to_anchor=(0.012, 0.035), ncols=3, frameon=False, fontsize=9
    )
