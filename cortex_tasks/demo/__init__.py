"""``cortex demo``: a fleet on this machine, real jobs on every model, the answers as a person wants to read them."""

from __future__ import annotations

import signal
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NoReturn, TextIO

from cortex_tasks.errors import CortexError
from cortex_tasks.terminal import Style, style_for, terminal_width

if TYPE_CHECKING:
    from cortex_tasks.client import Cortex

__all__ = ["Stage", "run_demo"]

#: How long one job of the demo may take, in seconds.
_JOB_TIMEOUT_S: Final = 120.0


@dataclass
class Stage:
    """Where the scenes play: the client, the screen, and what did not come out as expected."""

    cortex: Cortex
    out: TextIO
    style: Style
    width: int
    problems: list[str] = field(default_factory=list)

    def title(self, text: str) -> None:
        self.say(
            "", f"{self.style('── ' + text + ' ', 'bold')}{self.style('─' * max(0, self.width - len(text) - 4), 'dim')}"
        )

    def say(self, *lines: str) -> None:
        for line in lines:
            self.out.write(line + "\n")
        self.out.flush()

    def paragraph(self, text: str, *names: str) -> None:
        """A long text, wrapped to the screen."""
        for line in textwrap.wrap(text, self.width - 2, break_long_words=False, break_on_hyphens=False):
            self.say("  " + self.style(line, *names))

    def note(self, text: str) -> None:
        """A line of small print, such as a job's timings."""
        self.say(self.style(text, "dim"))

    def expect(self, holds: bool, otherwise: str) -> None:
        """Note a problem unless something holds."""
        if not holds:
            self.problems.append(otherwise)
            self.paragraph(f"not as expected: {otherwise}", "red", "bold")


Scene = Callable[[Stage], None]


class ProgressLine:
    """Which processes are ready: one line, written over itself on a terminal, a line a change elsewhere."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._last = ""

    def __call__(self, waited_s: float, states: Mapping[str, str]) -> None:
        shown = ", ".join(f"{name} {state}" for name, state in states.items())
        if self._out.isatty():
            self._out.write(f"\r  {waited_s:3.0f} s  {shown}\x1b[K")
        elif shown != self._last:
            self._out.write(f"  {waited_s:3.0f} s  {shown}\n")
        self._last = shown
        self._out.flush()

    def end(self) -> None:
        if self._out.isatty() and self._last:
            self._out.write("\n")


def run_demo(timeout_s: float, scenes: Sequence[Scene] | None = None, out: TextIO | None = None) -> int:
    """Start the Procfile's fleet, play the scenes, stop everything. Returns 0, or 1 when an expected answer was
    wrong or missing. Raises CortexError when the fleet does not start; leaves no process behind either way."""
    from cortex_tasks.client import Cortex
    from cortex_tasks.demo.scenes import SCENES
    from cortex_tasks.local_fleet import LocalFleet

    out = out or sys.stdout
    style = style_for(out)
    before = _end_on_signals()
    progress = ProgressLine(out)
    began = time.monotonic()
    out.write(style("Starting Redis, an nlp worker, an ml worker and Flower on free ports ...", "bold") + "\n")
    fleet = LocalFleet(start_timeout_s=timeout_s, progress=progress)
    try:
        with fleet:
            progress.end()
            with Cortex(fleet.url, timeout_s=_JOB_TIMEOUT_S) as cortex:
                stage = Stage(cortex, out, style, terminal_width(80))
                stage.say(
                    f"Warm after {time.monotonic() - began:.0f} s. Redis: {fleet.url}  Flower: {fleet.flower_url}"
                )
                for scene in scenes or SCENES:
                    _play(scene, stage)
            stage.say("", "Stopping the fleet ...")
        stage.expect(not fleet.killed, f"had to be killed: {', '.join(fleet.killed)}")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return _verdict(stage)


def _play(scene: Scene, stage: Stage) -> None:
    try:
        scene(stage)
    except CortexError as error:
        stage.expect(False, f"{type(error).__name__}: {error}")


def _verdict(stage: Stage) -> int:
    if stage.problems:
        stage.say(stage.style(f"{len(stage.problems)} answers were not as expected:", "red", "bold"))
        for problem in stage.problems:
            stage.paragraph(problem)
        return 1
    stage.say(stage.style("Every answer as expected; no process left behind.", "green", "bold"))
    stage.say("`make up` keeps such a fleet running; then try: cortex run embed 'A sentence.'")
    return 0


def _end_on_signals() -> dict[signal.Signals, Any]:
    """Let SIGTERM and SIGHUP end the demo as an exception, so that the fleet is stopped; returns the old handlers."""

    def leave(number: int, _frame: Any) -> NoReturn:
        raise SystemExit(128 + number)

    return {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
