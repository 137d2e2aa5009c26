"""``python -m workers.probe live|ready|started|stop``: for a supervisor on the worker's own machine.

Reads the heartbeat that each worker leaves in a file, so it needs neither Redis nor a model library and is over in
milliseconds. Exit code 0: yes; 1: no, and why.

    started  the pinned models are loaded, or known to fail
    ready    all pinned models are warm and the worker consumes
    live     its threads run and, if it holds jobs, it finishes some; true while Redis is away
    stop     ask it for a warm shutdown and wait until it has ended
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Final

from workers import heartbeat
from workers.heartbeat import Beat

__all__ = ["main"]

_QUESTIONS: Final[dict[str, Callable[[Beat, float], str]]] = {
    "started": lambda beat, _: beat.why_not_started(),
    "ready": Beat.why_not_ready,
    "live": Beat.why_dead,
}
_LOOK_S: Final = 0.2


def main(arguments: Sequence[str] | None = None) -> int:
    """Answer for every worker of this user on the machine, or for ``--pid`` alone. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m workers.probe", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("question", choices=[*_QUESTIONS, "stop"])
    parser.add_argument("--pid", type=int, help="of one worker; default: all of this user's")
    parser.add_argument("--timeout-s", type=float, default=float("inf"), help="for stop: how long to wait")
    given = parser.parse_args(arguments)
    found = [beat for beat in heartbeat.beats(heartbeat.directory()) if given.pid in (None, beat.pid)]
    if not found:
        return _say(1, f"no worker's heartbeat in {heartbeat.directory()}")
    if given.question == "stop":
        return _stop(found, given.timeout_s)
    question, now_s = _QUESTIONS[given.question], time.monotonic()
    faults = [f"{beat.node}: {why}" for beat in found if (why := question(beat, now_s))]
    return _say(1, *faults) if faults else _say(0, *(f"{beat.node}: {given.question}" for beat in found))


def _stop(found: Sequence[Beat], timeout_s: float) -> int:
    """One signal each: a second one would be taken for impatience, and make the shutdown a cold one."""
    for beat in found:
        if beat.state != "stopping":
            with contextlib.suppress(ProcessLookupError):
                os.kill(beat.pid, signal.SIGTERM)
    until_s = time.monotonic() + timeout_s
    while left := [beat for beat in found if heartbeat.born_ticks(beat.pid) == beat.born_ticks]:
        if time.monotonic() > until_s:
            return _say(1, *(f"{beat.node}: has not ended after {timeout_s:g} s" for beat in left))
        time.sleep(_LOOK_S)
    return _say(0, *(f"{beat.node}: ended" for beat in found))


def _say(code: int, *lines: str) -> int:
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return code


if __name__ == "__main__":
    sys.exit(main())
