"""A peer that computes until it has used so much CPU time, and says when it did (see ``benchmarks.processes``)."""

from __future__ import annotations

import time
from typing import Any

from benchmarks.processes import serve


def count(*, cpu_s: float) -> dict[str, Any]:
    """``seen_s``: when it ran (``time.perf_counter``), once each millisecond of CPU time."""
    began_s, until_s, seen_s = time.perf_counter(), time.process_time() + cpu_s, list[float]()
    while (now_s := time.process_time()) < until_s:
        if len(seen_s) < (now_s - until_s + cpu_s) * 1e3:
            seen_s.append(time.perf_counter())
    return {"began_s": began_s, "ended_s": time.perf_counter(), "seen_s": seen_s}


if __name__ == "__main__":
    serve(count=count)
