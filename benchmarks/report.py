"""From the figures of a run to what is kept: ``results/latest.json`` and the table in the README."""

from __future__ import annotations

import os
import platform
import textwrap
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from benchmarks.card import Figures, shown
from benchmarks.latency import LOADS
from benchmarks.rivals import RIVALS, STOCK_PER_S
from benchmarks.throughput import QUIET_SPREAD

__all__ = ["machine", "table", "with_table"]

START: Final = "<!-- bench:start -->"
END: Final = "<!-- bench:end -->"
#: In the place of a figure that the run did not measure.
ABSENT: Final = "—"


def machine() -> dict[str, Any]:
    """What the figures were measured on, and when; nothing that tells whose machine it is."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": _cpu_model(Path("/proc/cpuinfo")),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{name: version(name) for name in ("celery", "redis", "torch", "sentence-transformers")},
    }


def _cpu_model(cpuinfo: Path) -> str:
    for line in cpuinfo.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()


def table(results: Mapping[str, Any]) -> str:
    """The figures that matter most, in Markdown. ``results``: as in ``results/latest.json``."""
    about = results["machine"]
    overhead, throughput, latency = (results[name] for name in ("overhead", "throughput", "latency"))
    rows = [*_requests(overhead), *_model(throughput), *_waiting(latency, results["startup"])]
    lines = [
        "| | Cortex | stock Celery ¹ | the best of the others ² |",
        "|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    where = f"{about['cpu']}, {about['cores']} cores, {about['date']}"
    said = (
        f"Measured by `make bench` on {where}{_disturbed(throughput)}. Raw engine: batches one after the other, each "
        f"on all cores; a batch on each core, as in a worker, reaches {_share(throughput, 'raw_apart_ratio')} of it. "
        "¹ All tasks published, then all fetched; MiniLM: `encode`, one text a task. "
        f"² On another machine, where stock Celery reaches {shown(STOCK_PER_S)} requests/s (compare the multiples, not "
        "the rates); shares are of the raw engine there. [What each figure means](docs/performance.md)."
    )
    return "\n".join([*lines, "", *textwrap.wrap(said, 120, break_on_hyphens=False)])


def _disturbed(throughput: Figures) -> str:
    """A warning where the shares may be chance."""
    spread = throughput.get("raw_spread", 1.0)
    return f" while it was not quiet (the raw engine varied by {shown(spread)} ×)" if spread > QUIET_SPREAD else ""


def _share(figures: Figures, name: str) -> str:
    return f"{figures[name]:.2f}" if name in figures else ABSENT


def _shown(figures: Figures, name: str) -> str:
    """A dash for what an older run did not measure."""
    return shown(figures[name]) if name in figures else ABSENT


def _requests(overhead: Figures) -> list[tuple[str, ...]]:
    fastest = max(RIVALS, key=lambda rival: rival.per_s)
    stock_per_s = overhead["stock_jobs_per_s"]
    times = overhead["async_singles_per_s"] / stock_per_s
    return [
        (
            "Single requests to a no-op model, 64 in flight",
            f"**{shown(overhead['async_singles_per_s'])}/s** ({times:.1f} × stock)",
            f"{shown(stock_per_s)}/s",
            f"{shown(fastest.per_s)}/s ({fastest.per_s / STOCK_PER_S:.1f} × stock), {fastest.name}",
        ),
        (
            "CPU of a job submitted in bulk: worker, client",
            f"{shown(overhead['worker_cpu_us_per_job'])} µs, {shown(overhead['client_cpu_us_per_job'])} µs",
            f"{shown(overhead['stock_worker_cpu_us_per_job'])} µs, {shown(overhead['stock_client_cpu_us_per_job'])} µs",
            "",
        ),
    ]


def _model(throughput: Figures) -> list[tuple[str, ...]]:
    """Shares of the raw engine of the same machine and minutes."""
    bulk = max(RIVALS, key=lambda rival: rival.bulk or 0.0)
    many = max(RIVALS, key=lambda rival: rival.singles_256 or 0.0)
    return [
        (
            "MiniLM in bulk, share of the raw engine",
            f"**{_share(throughput, 'map_ratio')}**",
            "",
            f"{bulk.bulk:.2f}, {bulk.name}",
        ),
        (
            "The same, single texts, 256 in flight",
            f"**{_share(throughput, 'singles_256_ratio')}** ({_share(throughput, 'singles_ratio')} with 512)",
            f"{_share(throughput, 'naive_celery_ratio')}, all published",
            f"{many.singles_256:.2f}, {many.name}",
        ),
        ("The same, `SentenceTransformer.encode` in-process", _share(throughput, "encode_ratio"), "", ""),
    ]


def _waiting(latency: Figures, startup: Figures) -> list[tuple[str, ...]]:
    first_s = shown(startup["first_answer_ms"] / 1e3) if "first_answer_ms" in startup else ABSENT
    interactive = [_shown(latency, f"{name}_ms") for name in ("idle_p99", "interactive_p99_under_bulk")]
    rows = {
        "What the fleet adds to one text when idle": f"{_shown(latency, 'idle_overhead_ms')} ms",
        "MiniLM, arrivals at random at 30, 60, 90 % of capacity: p50; p99": (
            f"{_open_load(latency, 'p50_ms')}; {_open_load(latency, 'p99_ms')} ms"
        ),
        "p99 of an interactive text: idle, next to saturating bulk": f"{interactive[0]} ms, {interactive[1]} ms",
        "Import of the client; first answer of a fresh worker": f"{_shown(startup, 'import_ms')} ms; {first_s} s",
    }
    return [(label, cell, "", "") for label, cell in rows.items()]


def _open_load(latency: Figures, name: str) -> str:
    return " / ".join(_shown(latency.get(name, {}), str(load)) for load in LOADS)


def with_table(readme: str, markdown: str) -> str:
    """The README with the table between its markers; in a section of its own when it has none."""
    block = f"{START}\n{markdown}\n{END}"
    before, start, rest = readme.partition(START)
    _, end, after = rest.partition(END)
    if start and end:
        return f"{before}{block}{after}"
    return f"{readme.rstrip()}\n\n## Measured\n\n{block}\n"
