"""All benchmarks, one after another: ``make bench``, or ``python -m benchmarks [--seconds 20] [--dry-run]``.

Writes ``benchmarks/results/latest.json``, the README's table and ``docs/figures/performance.{png,svg}``; with
``--redraw`` only the latter two, from the results of the last run.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Final

from benchmarks import latency, overhead, startup, throughput
from benchmarks.card import SECONDS, stop_on_sigterm
from benchmarks.processes import ROOT
from benchmarks.report import machine, table, with_table

RESULTS: Final = ROOT / "benchmarks" / "results" / "latest.json"


def main() -> None:
    parser = argparse.ArgumentParser(description="Run all benchmarks (about ten minutes).")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="length of each part (default %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="print the figures, write nothing")
    parser.add_argument("--redraw", action="store_true", help="measure nothing: table and picture of the last run")
    options = parser.parse_args()
    if options.redraw:
        wrote(*publish(json.loads(RESULTS.read_text(encoding="utf-8"))))
        return
    stop_on_sigterm()
    results: dict[str, Any] = {"machine": machine()}
    for benchmark in (overhead.BENCHMARK, throughput.BENCHMARK, latency.BENCHMARK, startup.BENCHMARK):
        figures = benchmark.run(options.seconds, lambda text: print(f"… {text}", file=sys.stderr, flush=True))
        results[benchmark.name] = figures
        print(f"\n{benchmark.card(figures)}", flush=True)
    if not options.dry_run:
        wrote(keep(results), *publish(results))
    print(json.dumps(results))


def keep(results: dict[str, Any]) -> Path:
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return RESULTS


def publish(results: dict[str, Any]) -> list[Path]:
    """Put the figures where people look for them; returns the files."""
    from benchmarks.plot import draw

    readme = ROOT / "README.md"
    readme.write_text(with_table(readme.read_text(encoding="utf-8"), table(results)), encoding="utf-8")
    return [readme, *draw(results, ROOT / "docs" / "figures")]


def wrote(*paths: Path) -> None:
    for path in paths:
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
