"""CPU time of processes, from /proc: what the kernel charged them, whatever else runs on the machine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

__all__ = ["cpu_s"]

_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")


def cpu_s(sessions: Mapping[str, int]) -> dict[str, float]:
    """Seconds (user and system) of the processes of some sessions, and of their children that have ended.

    ``sessions``: name -> session id, which is the pid of the process that opened it. The kernel counts in ticks
    of 10 ms, so measure over seconds.
    """
    ticks = dict.fromkeys(sessions.values(), 0)
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            # "pid (command) state ppid pgrp session ... utime stime cutime cstime ..."; a command may hold anything.
            fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
        except (OSError, ValueError):
            continue
        session = int(fields[3])
        if session in ticks:
            ticks[session] += sum(map(int, fields[11:15]))
    return {name: ticks[session] / _TICKS_PER_S for name, session in sessions.items()}
