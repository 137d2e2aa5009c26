"""A whole fleet on this machine: the Procfile's processes on free ports, started, watched and stopped together.

Used by ``cortex demo`` and by tests. (``cortex up`` leaves the same Procfile to honcho.)
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from cortex_tasks.catalog import nearest
from cortex_tasks.embedded_redis import answers, tie_to_parent
from cortex_tasks.errors import ConfigError, DeliveryError, ResultTimeout
from cortex_tasks.presence import WorkerCard, read_cards
from cortex_tasks.procfile import child_environment, default_procfile, read_procfile

__all__ = ["LocalFleet", "free_port", "session_members"]

_BROKER: Final = "redis"
_FLOWER: Final = "flower"
_POLL_S: Final = 0.1
_TAIL_LINES: Final = 25

#: Called while waiting, with the seconds since the start and a process' name -> its state.
Progress = Callable[[float, Mapping[str, str]], None]


class LocalFleet:
    """A context manager: entering starts the processes and waits until each is ready, leaving stops them.

    Leaving sends SIGTERM to each process (a worker then finishes what it took), after ``stop_timeout_s`` SIGKILL
    to what is left, and stops Redis last; nothing of the fleet remains. Each process writes to a file of
    ``log_dir``. ``env`` is added to the environment; ``only`` names the processes to start.
    """

    def __init__(
        self,
        *,
        procfile: Path | None = None,
        only: Iterable[str] | None = None,
        env: Mapping[str, str] | None = None,
        start_timeout_s: float = 180.0,
        stop_timeout_s: float = 30.0,
        progress: Progress | None = None,
    ) -> None:
        commands = read_procfile(procfile or default_procfile())
        chosen = list(commands) if only is None else list(only)
        for name in chosen:
            if name not in commands:
                raise ConfigError(f"unknown process {name!r}{nearest(name, commands)}")
        self._commands = {name: commands[name] for name in commands if name in chosen}
        self._start_timeout_s = start_timeout_s
        self._stop_timeout_s = stop_timeout_s
        self._progress = progress
        self._env = {**child_environment(), **dict(env or {})}
        self._env.setdefault("PYTHONUNBUFFERED", "1")
        self.url = f"redis://127.0.0.1:{free_port()}/0"
        self.flower_url = f"http://127.0.0.1:{free_port()}"
        self._env.update(CORTEX_BROKER_URL=self.url, CORTEX_FLOWER_PORT=self.flower_url.rpartition(":")[2])
        # Nothing of the caller's shell may send answers or cached values to another Redis.
        urls = ("CORTEX_RESULT_URL", "CORTEX_CACHE_URL")
        passwords = (f"CORTEX_{role}_PASSWORD_FILE" for role in ("BROKER", "RESULT", "CACHE"))
        for name in (*urls, *passwords, "CORTEX_IMAGE"):
            if name not in (env or {}):
                self._env.pop(name, None)
        self._logs = tempfile.TemporaryDirectory(prefix="cortex-fleet-", ignore_cleanup_errors=True)
        self.log_dir = Path(self._logs.name)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        #: Every session this fleet has opened; a restarted process has a new one.
        self._sessions: set[int] = set()
        #: Processes that did not end by themselves and were killed.
        self.killed: list[str] = []

    def __enter__(self) -> Self:
        try:
            self.start()
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def env(self) -> dict[str, str]:
        """The environment of the fleet's processes, for others that shall join it."""
        return dict(self._env)

    # --------------------------------------------------------------------------------------------------- start

    def start(self) -> None:
        """Start Redis, wait until it answers, start the rest. Raises DeliveryError or ResultTimeout."""
        if _BROKER in self._commands:
            self.spawn(_BROKER)
            self._wait(lambda: {_BROKER: "ready" if answers(self.url) else "starting"})
        for name in self._commands:
            if name not in self.processes:
                self.spawn(name)

    def spawn(self, name: str) -> subprocess.Popen[bytes]:
        """Start one of the Procfile's processes (again), in a session of its own."""
        with (self.log_dir / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                # exec: the process is the command itself, not a shell around it, so signals and its pid are its own.
                ["/bin/sh", "-c", f"exec {self._commands[name]}"],
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=tie_to_parent(),
            )
        self.processes[name] = process
        self._sessions.add(process.pid)
        return process

    def wait_ready(self) -> None:
        """Wait until each worker's card says ready and Flower listens.

        Raises DeliveryError with the end of its log when a process ends, ResultTimeout when time is over.
        """
        self._wait(self.states)

    def states(self) -> dict[str, str]:
        """Process name -> ``starting``, ``loading minilm``, ``ready``, ... as its card or its port says."""
        cards = {card.pid: card for card in self.cards()}
        return {name: self._state(name, cards.get(process.pid)) for name, process in self.processes.items()}

    def cards(self) -> list[WorkerCard]:
        """The workers' cards; none while Redis does not answer."""
        import redis

        try:
            with redis.Redis.from_url(self.url, socket_timeout=2.0, socket_connect_timeout=2.0) as client:
                return read_cards(client)
        except redis.RedisError:
            return []

    def _state(self, name: str, card: WorkerCard | None) -> str:
        if name == _BROKER:
            return "ready"
        if name == _FLOWER:
            return "ready" if _listens(int(self._env["CORTEX_FLOWER_PORT"])) else "starting"
        if card is None:
            return "starting"
        loading = [model.alias for model in card.models if model.state == "loading"]
        return f"loading {', '.join(loading)}" if card.state == "starting" and loading else card.state

    def _wait(self, states: Callable[[], Mapping[str, str]]) -> None:
        began = time.monotonic()
        while True:
            for name, process in self.processes.items():
                if process.poll() is not None:
                    raise DeliveryError(
                        f"process {name!r} ended with code {process.returncode} before the fleet was ready; "
                        f"its log ends:\n{self.tail(name)}"
                    )
            now = states()
            waited_s = time.monotonic() - began
            if self._progress is not None:
                self._progress(waited_s, now)
            late = [name for name, state in now.items() if state != "ready"]
            if not late:
                return
            if waited_s > self._start_timeout_s:
                raise ResultTimeout(
                    f"not ready after {waited_s:.0f} s: {', '.join(f'{name} ({now[name]})' for name in late)}; "
                    f"the log of {late[0]!r} ends:\n{self.tail(late[0])}"
                )
            time.sleep(_POLL_S)

    def tail(self, name: str, lines: int = _TAIL_LINES) -> str:
        """The last lines of a process' log."""
        try:
            text = (self.log_dir / f"{name}.log").read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return ""
        return "\n".join("  " + line for line in text.splitlines()[-lines:])

    # ---------------------------------------------------------------------------------------------------- stop

    def stop(self) -> None:
        """Stop everything, Redis last, and return when nothing is left. Idempotent.

        An interruption (Ctrl-C while workers finish) kills at once. Raises DeliveryError if a process survives that.
        """
        try:
            self._end([name for name in self.processes if name != _BROKER], self._stop_timeout_s, signal.SIGTERM)
            # Two signals: Redis does not wait for clients that stay connected, the workers are gone.
            self._end([name for name in self.processes if name == _BROKER], 10.0, signal.SIGTERM, signal.SIGINT)
        finally:
            self._sweep()
            self._logs.cleanup()

    def _end(self, names: list[str], timeout_s: float, *signals: signal.Signals) -> None:
        for name in names:
            for number in signals:
                self.processes[name].send_signal(number)
        until = time.monotonic() + timeout_s
        for name in names:
            try:
                self.processes[name].wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.killed.append(name)
                self.processes[name].kill()

    def _sweep(self) -> None:
        """Kill what is left of any session, and make sure."""
        until = time.monotonic() + 10.0
        while left := session_members(self._sessions):
            if time.monotonic() > until:
                raise DeliveryError(f"processes {sorted(left)} of the fleet survived SIGKILL")
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        for process in self.processes.values():
            process.wait()
        self.processes = {}
        self._sessions.clear()


def free_port() -> int:
    """A loopback port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def session_members(sessions: set[int]) -> set[int]:
    """The pids of living processes (not zombies) of some sessions, from /proc."""
    found = set()
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            # "pid (command) state ppid pgrp session ..."; a command may hold spaces and parentheses.
            state, _, _, session = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[:4]
        except (OSError, ValueError):
            continue
        if int(session) in sessions and state != "Z":
            found.add(int(entry))
    return found


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0
