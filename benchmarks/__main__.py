"""All benchmarks, one after another: ``make bench``, or ``python -m benchmarks [--seconds 20] [--dry-run]``.

Writes ``benchmarks/results/latest.json``, the README's table and ``docs/figures/performance.{png,svg}``.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from benchmarks import latency, overhead, startup, throughput
from benchmarks.card import SECONDS, stop_on_sigterm
from benchmarks.processes import ROOT
from benchmarks.report import machine, table, with_table


def main() -> None:
    parser = argparse.ArgumentParser(description="Run all benchmarks (about eight minutes).")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="length of each part (default %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="print the figures, write nothing")
    options = parser.parse_args()
    stop_on_sigterm()
    results: dict[str, Any] = {"machine": machine()}
    for benchmark in (overhead.BENCHMARK, throughput.BENCHMARK, latency.BENCHMARK, startup.BENCHMARK):
        figures = benchmark.run(options.seconds, lambda text: print(f"… {text}", file=sys.stderr, flush=True))
        results[benchmark.name] = figures
        print(f"\n{benchmark.card(figures)}", flush=True)
    if not options.dry_run:
        write(results)
    print(json.dumps(results))


def write(results: dict[str, Any]) -> None:
    """Keep the figures where people look for them."""
    from benchmarks.plot import draw

    kept = ROOT / "benchmarks" / "results" / "latest.json"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    readme = ROOT / "README.md"
    readme.write_text(with_table(readme.read_text(encoding="utf-8"), table(results)), encoding="utf-8")
    drawn = draw(results, ROOT / "docs" / "figures")
    for path in (kept, readme, *drawn):
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
