"""Is the worker of this container well? ``python -m cortex_tasks.probe live|ready``, for health checks.

The worker writes a few words about itself into a file (CORTEX_HEALTH_FILE) every two seconds; the probe reads them. It
asks no Redis: workers must not be restarted because Redis is away. Nothing but the standard library is loaded, for a
probe runs every few seconds beside a worker that needs the CPU.

``live``: the worker writes, and finishes what it takes. ``ready``: and its pinned models are warm and it consumes.
Exit codes: 0 yes, 1 no (the reason on stderr), 2 wrong usage.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

__all__ = ["SILENT_AFTER_S", "STALLED_AFTER_S", "Report", "main", "problem", "write_report"]

#: The worker's health thread may wait for a Redis that does not answer, for as long as its time-outs and retries take.
SILENT_AFTER_S: Final = 60.0
#: Jobs in hand, none finished for so long, and no model at work on them or being loaded.
STALLED_AFTER_S: Final = 60.0


class Report(NamedTuple):
    """What a worker says about itself."""

    node: str
    #: "starting", "ready" or "stopping".
    state: str
    #: Jobs taken and not yet answered.
    in_hand: int
    #: For how long nothing of that has been finished, in seconds.
    stalled_s: float
    #: When it was said, in seconds of the system's monotonic clock, which all processes of a machine share.
    at_s: float
    #: Pinned models that could not be loaded.
    missing: tuple[str, ...] = ()


def write_report(file: Path, report: Report) -> None:
    """Replace the file in one step. Raises OSError."""
    fresh = file.with_name(f"{file.name}.{os.getpid()}")
    fresh.write_text(json.dumps(report._asdict()), encoding="utf-8")
    fresh.replace(file)


def problem(text: str, wanted: str, now_s: float) -> str:
    """Why a worker that wrote ``text`` is not what is wanted ("live" or "ready"); "" when it is.

    ``now_s``: monotonic seconds.
    """
    try:
        said = json.loads(text)
        report = Report(*(said[name] for name in Report._fields))
        missing = ", ".join(report.missing)
        silent_s, stalled_s, in_hand = now_s - float(report.at_s), float(report.stalled_s), int(report.in_hand)
    except (ValueError, TypeError, KeyError):
        return "the health file is damaged"
    if silent_s > SILENT_AFTER_S:
        return f"{report.node} has said nothing for {silent_s:.0f} s"
    if stalled_s > STALLED_AFTER_S:
        return f"{report.node} holds {in_hand} jobs and has finished none for {stalled_s:.0f} s"
    if wanted == "ready" and report.state != "ready":
        return f"{report.node} is {report.state}"
    if wanted == "ready" and missing:
        return f"{report.node} could not load {missing}"
    return ""


def main(arguments: Sequence[str], environ: Mapping[str, str], now_s: float) -> int:
    """The exit code."""
    file = environ.get("CORTEX_HEALTH_FILE")
    if list(arguments) not in (["live"], ["ready"]) or not file:
        return _say("usage: python -m cortex_tasks.probe live|ready, with CORTEX_HEALTH_FILE set", 2)
    text = ""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        text = Path(file).read_text(encoding="utf-8")
    found = problem(text, arguments[0], now_s) if text else f"no worker has written {file}"
    return _say(found, 1) if found else 0


def _say(text: str, code: int) -> int:
    sys.stderr.write(f"cortex: {text}\n")
    return code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:], os.environ, time.monotonic()))
