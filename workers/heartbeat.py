"""A worker's heartbeat: a small file that says what it is about, for probes on its own machine.

Redis is not asked, neither to write nor to read one: a worker whose Redis is away is alive. Only the standard library
is imported, so that a probe is over in milliseconds.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

__all__ = ["LATE_S", "STALLED_S", "Beat", "Progress", "beats", "born_ticks", "directory", "erase", "write"]

#: In seconds: the health thread beats every two. Longer than this, and it no longer gets its turn.
LATE_S: Final = 60.0
#: Jobs in hand, nothing finished, no model at work. A job may wait for the answer of another worker for 60 s.
STALLED_S: Final = 120.0


@dataclass(frozen=True, slots=True)
class Beat:
    """What a worker said of itself last. Times are this machine's monotonic seconds."""

    pid: int
    #: When the process began (clock ticks since boot): a later process may get the same pid.
    born_ticks: int
    node: str
    #: ``starting``, ``ready`` or ``stopping``, as on its card.
    state: str
    beat_at_s: float
    #: Pinned model -> its state.
    pinned: dict[str, str] = field(default_factory=dict)
    #: How long it has held jobs without finishing a batch or answering one, with nothing to wait for.
    stalled_s: float = 0.0

    def age_s(self, now_s: float) -> float:
        return max(0.0, now_s - self.beat_at_s)

    def why_not_started(self) -> str:
        """Which pinned models are still being loaded; "" when each is warm or known to fail."""
        loading = sorted(alias for alias, state in self.pinned.items() if state in ("idle", "loading"))
        return f"{', '.join(loading)}: still loading" if loading else ""

    def why_not_ready(self, now_s: float) -> str:
        """Why it takes no jobs, or lacks a pinned model; "" when it consumes and all of them are warm."""
        if dead := self.why_dead(now_s):
            return dead
        if self.state != "ready":
            return f"the worker is {self.state}"
        return ", ".join(f"{alias} is {state}" for alias, state in sorted(self.pinned.items()) if state != "ready")

    def why_dead(self, now_s: float) -> str:
        """Why only a restart helps; "" while it lives and, if it holds jobs, gets on with them."""
        if self.age_s(now_s) > LATE_S:
            return f"no heartbeat for {self.age_s(now_s):.0f} s"
        if self.stalled_s > STALLED_S:
            return f"it holds jobs and has finished nothing for {self.stalled_s:.0f} s"
        return ""


@dataclass(slots=True)
class Progress:
    """How long a worker has held jobs without getting anywhere."""

    _mark: tuple[int, ...] = ()
    _since_s: float | None = None

    def update(self, now_s: float, mark: tuple[int, ...], *, busy: bool) -> float:
        """Note what was done so far (``mark``: totals that grow with the work); returns the seconds without a change.

        ``busy``: there is something to get on with. While there is not, no time counts.
        """
        if not busy or mark != self._mark or self._since_s is None:
            self._mark, self._since_s = mark, now_s
        return now_s - self._since_s


def directory() -> Path:
    """Where this user's workers leave their heartbeats, below the directory for temporary files."""
    return Path(tempfile.gettempdir()) / f"cortex-{os.getuid()}"


def born_ticks(pid: int) -> int | None:
    """When a process began, None when there is none of that pid, or it has ended and nobody has noticed yet."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        # The second field is the program's name in brackets, which may hold blanks and brackets.
        fields = stat.rpartition(")")[2].split()
        return None if fields[0] == "Z" else int(fields[19])
    except (OSError, ValueError, IndexError):
        return None


def write(beat: Beat, where: Path) -> None:
    """Replace a worker's heartbeat as a whole. Raises OSError."""
    where.mkdir(mode=0o700, exist_ok=True)
    owner = where.lstat()
    if where.is_symlink() or owner.st_uid != os.getuid():
        # The directory for temporary files is everybody's.
        raise PermissionError(f"{where} belongs to somebody else")
    beside = where / f".{beat.pid}"
    beside.write_text(json.dumps(asdict(beat)), encoding="utf-8")
    beside.replace(_file(where, beat.pid))


def erase(pid: int, where: Path) -> None:
    """A worker ends."""
    _file(where, pid).unlink(missing_ok=True)


def beats(where: Path) -> list[Beat]:
    """The last heartbeats of the workers that run. What a process left that ended without a word is taken away."""
    found = []
    for file in sorted(where.glob("worker-*.json")):
        try:
            beat = Beat(**json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            continue
        if born_ticks(beat.pid) == beat.born_ticks:
            found.append(beat)
        else:
            file.unlink(missing_ok=True)
    return found


def _file(where: Path, pid: int) -> Path:
    return where / f"worker-{pid}.json"
