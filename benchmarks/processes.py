"""The processes of a benchmark: started in sessions of their own, stopped however the benchmark ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from cortex_tasks.embedded_redis import tie_to_parent
from cortex_tasks.local_fleet import LocalFleet, session_members
from cortex_tasks.procfile import child_environment

__all__ = ["ROOT", "Peer", "Process", "fleet", "only_redis", "serve"]

ROOT: Final = Path(__file__).resolve().parents[1]
_STOP_TIMEOUT_S: Final = 20.0
_START_TIMEOUT_S: Final = 120.0
_TAIL_LINES: Final = 20


def _environment(env: Mapping[str, str]) -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**child_environment(), "PYTHONPATH": path, **env}


class Process:
    """A command that runs until the context is left. Its stderr goes to a file, for ``tail``."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], *, piped: bool = False) -> None:
        self.command = " ".join(command)
        self._log = tempfile.TemporaryFile("w+b")  # noqa: SIM115 - closed by stop
        pipe = subprocess.PIPE if piped else subprocess.DEVNULL
        self.process = subprocess.Popen(
            list(command),
            cwd=ROOT,
            env=_environment(env),
            stdin=pipe,
            stdout=pipe,
            stderr=self._log,
            text=True,
            start_new_session=True,
            preexec_fn=tie_to_parent(),
        )

    @property
    def pid(self) -> int:
        """Also the id of its session."""
        return self.process.pid

    def tail(self) -> str:
        """The last lines it wrote to stderr."""
        self._log.seek(0)
        return "\n".join(self._log.read().decode(errors="replace").splitlines()[-_TAIL_LINES:])

    def stop(self) -> None:
        """SIGTERM, and SIGKILL to whatever of its session is left after a while. Idempotent."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
        finally:
            for pid in session_members({self.pid}):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait()
            self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class Peer(Process):
    """A module of ours in a process of its own, which obeys: a JSON command a line in, a JSON answer a line out."""

    def __init__(self, module: str, env: Mapping[str, str]) -> None:
        super().__init__([sys.executable, "-m", module], env, piped=True)

    def tell(self, do: str, **arguments: Any) -> None:
        """Give a command without waiting for its answer."""
        assert self.process.stdin is not None, "Popen was given a pipe"
        self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self.process.stdin.flush()

    def fileno(self) -> int:
        """For ``select``: there is something to read once the answer comes."""
        assert self.process.stdout is not None, "Popen was given a pipe"
        return self.process.stdout.fileno()

    def answer(self) -> dict[str, Any]:
        """The answer to the oldest command that has none yet. Raises RuntimeError with the peer's traceback."""
        assert self.process.stdout is not None, "Popen was given a pipe"
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            raise RuntimeError(f"{self.command} failed:\n{self.tail()}")
        found: dict[str, Any] = json.loads(line)
        return found

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        self.tell(do, **arguments)
        return self.answer()

    def stop(self) -> None:
        super().stop()
        for pipe in (self.process.stdin, self.process.stdout):
            # A peer that was killed leaves a broken pipe behind.
            with contextlib.suppress(BrokenPipeError):
                if pipe is not None:
                    pipe.close()


def serve(**commands: Callable[..., Mapping[str, Any]]) -> None:
    """The peer's side: obey until stdin ends. What libraries print goes to stderr."""
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        arguments = json.loads(line)
        print(json.dumps(commands[arguments.pop("do")](**arguments)), file=answers, flush=True)


@contextlib.contextmanager
def fleet(
    queues: str, queues_file: Path = ROOT / "queues.yaml", *, started: bool = True, workers: int = 1
) -> Iterator[LocalFleet]:
    """Redis and workers of these queues, ready unless ``started`` is False.

    The processes are ``redis``, ``worker``, and ``worker2`` and so on when there are more.
    """
    names = ["worker", *(f"worker{number}" for number in range(2, workers + 1))]
    lines = [f"{name}: celery -A workers.app worker -Q {queues}\n" for name in names]
    local = _local_fleet(f"redis: cortex redis --grace-s 1\n{''.join(lines)}", queues_file)
    try:
        if started:
            local.start()
            if os.environ.get("CORTEX_POOL") == "stock":
                _await_pongs(local, workers)
            else:
                local.wait_ready()
        yield local
    finally:
        local.stop()


def _await_pongs(local: LocalFleet, workers: int) -> None:
    """Wait until so many workers answer Celery's ping: with a stock pool they write no card that would say so."""
    # Only here: all peers import this module, and a light client's process has no Celery in its caches.
    from celery import Celery

    control = Celery(broker=local.url, set_as_current=False).control
    until_s = time.monotonic() + _START_TIMEOUT_S
    while len(control.ping(timeout=0.5)) < workers:
        if time.monotonic() > until_s:
            raise RuntimeError(f"no pong within {_START_TIMEOUT_S} s:\n{local.tail('worker')}")


@contextlib.contextmanager
def only_redis(queues_file: Path = ROOT / "queues.yaml") -> Iterator[LocalFleet]:
    """A Redis by itself: for stock Celery, or for a client whom nobody answers."""
    with _local_fleet("redis: cortex redis --grace-s 1\n", queues_file) as local:
        yield local


def _local_fleet(procfile: str, queues_file: Path) -> LocalFleet:
    with tempfile.NamedTemporaryFile("w", prefix="cortex-bench-", suffix=".procfile") as file:
        file.write(procfile)
        file.flush()
        return LocalFleet(procfile=Path(file.name), env={"CORTEX_QUEUES_FILE": str(queues_file)})
