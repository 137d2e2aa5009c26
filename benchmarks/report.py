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
from benchmarks.rivals import RIVALS, STOCK_PER_S

__all__ = ["machine", "table", "with_table"]

START: Final = "<!-- bench:start -->"
END: Final = "<!-- bench:end -->"


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
    rows = _rows(results["overhead"], results["throughput"], results["latency"], results["startup"])
    lines = [
        "| | Cortex | stock Celery | the best of the others |",
        "|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    where = f"{about['cpu']}, {about['cores']} cores, {about['date']}"
    said = (
        f"Measured by `make bench` on {where}. The others were measured on another machine, where stock Celery "
        f"reaches {shown(STOCK_PER_S)} requests/s: compare the multiples, not the rates. "
        "[What each figure means](docs/performance.md)."
    )
    return "\n".join([*lines, "", *textwrap.wrap(said, 120, break_on_hyphens=False)])


def _rows(overhead: Figures, throughput: Figures, latency: Figures, startup: Figures) -> list[tuple[str, ...]]:
    fastest = max(RIVALS, key=lambda rival: rival.per_s)
    bulk = max(RIVALS, key=lambda rival: rival.bulk or 0.0)
    many = max(RIVALS, key=lambda rival: rival.singles_256 or 0.0)
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
        (
            "MiniLM in bulk, share of the raw engine",
            f"**{throughput['map_ratio']:.2f}**",
            "",
            f"{bulk.bulk:.2f}, {bulk.name}",
        ),
        (
            "MiniLM, single texts, 256 in flight",
            f"**{throughput['singles_256_ratio']:.2f}** ({throughput['singles_ratio']:.2f} with 512)",
            f"{throughput['naive_celery_ratio']:.2f}",
            f"{many.singles_256:.2f}, {many.name}",
        ),
        ("`SentenceTransformer.encode` in-process, for comparison", f"{throughput['encode_ratio']:.2f}", "", ""),
        ("What the fleet adds to one text when idle", f"{shown(latency['idle_overhead_ms'])} ms", "", ""),
        (
            "p99 of an interactive text: idle, next to saturating bulk",
            f"{shown(latency['idle_p99_ms'])} ms, {shown(latency['interactive_p99_under_bulk_ms'])} ms",
            "",
            "",
        ),
        (
            "Import of the client; first answer of a fresh worker",
            f"{shown(startup['import_ms'])} ms; {shown(startup['first_answer_ms'] / 1e3)} s",
            "",
            "",
        ),
    ]


def with_table(readme: str, markdown: str) -> str:
    """The README with the table between its markers; in a section of its own when it has none."""
    block = f"{START}\n{markdown}\n{END}"
    before, start, rest = readme.partition(START)
    _, end, after = rest.partition(END)
    if start and end:
        return f"{before}{block}{after}"
    return f"{readme.rstrip()}\n\n## Measured\n\n{block}\n"
