"""One child process as its worker sees it: started, asked, answered, replaced, ended."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from cortex_tasks.errors import ConfigError, InferenceFailed, ModelUnavailable, error_from_wire
from workers.adapters.base import LoadContext, Memo
from workers.child_protocol import Channel, context_to_wire, outcome_from_wire

__all__ = ["Child", "end"]

#: How long ``end`` waits for children that were asked to leave, and then for those that got SIGTERM.
POLITE_S: Final = 2.0
TERM_S: Final = 1.0
#: A message that has begun to arrive may take this long past the deadline.
_READ_S: Final = 0.1
_PAGE_BYTES: Final = os.sysconf("SC_PAGESIZE")
_THREAD_VARIABLES: Final = (
    "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS", "BLIS_NUM_THREADS",
)  # fmt: skip


def _environment(scratch: str) -> dict[str, str]:
    """The worker's environment less Cortex's own settings (they hold passwords that no model needs)."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("CORTEX_")}
    env.update(dict.fromkeys(_THREAD_VARIABLES, "1"))
    env["TOKENIZERS_PARALLELISM"] = "false"
    env["TMPDIR"] = scratch
    env["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    return env


class Child:
    """A process that hosts one adapter. Used by one thread, except for what ``end`` calls."""

    def __init__(self, adapter: str, context: LoadContext, start_limit_s: float) -> None:
        """Start it; it loads meanwhile, and ``take`` gives the outcome. Raises ModelUnavailable."""
        self._name = f"the process of model {context.alias!r}"
        #: What the child said when it was ready: version, library, note, examples.
        self.facts: dict[str, Any] | None = None
        #: Its own memory when it was ready.
        self.ready_bytes = 0
        #: It was killed for taking too long.
        self.overdue = False
        self._scratch = tempfile.mkdtemp(prefix="cortex-child-")
        ours, theirs = socket.socketpair()
        self._channel = Channel(ours)
        try:
            with theirs:
                self._process = self._popen(theirs.fileno())
        except OSError as error:
            self._release()
            raise ModelUnavailable(f"{self._name} cannot be started: {error.strerror}") from error
        try:
            self.ask({"adapter": adapter, "context": context_to_wire(context)}, start_limit_s)
        except (TypeError, ValueError) as error:
            self.kill()
            raise ConfigError(f"models.{context.alias}.options: {error}") from error

    def _popen(self, fd: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            # -P: nothing but the worker's own sys.path, which PYTHONPATH holds.
            [sys.executable, "-P", "-m", "workers.child_main", str(fd), self._scratch],
            pass_fds=(fd,),
            stdin=subprocess.DEVNULL,
            # What a library prints belongs in the worker's log.
            stdout=2,
            env=_environment(self._scratch),
            # A session of its own: signals of the terminal pass it by, and its group can be ended as a whole.
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def owes(self) -> bool:
        """An answer is due, at ``deadline_s`` (monotonic)."""
        return self.deadline_s < math.inf

    def fileno(self) -> int:
        return self._channel.fileno()

    @property
    def alive(self) -> bool:
        """Whether the process still runs; leaves its status to be collected by ``kill``."""
        try:
            return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        except ChildProcessError:
            return False

    @property
    def memory_bytes(self) -> int:
        """Memory that is the process's own (resident, not shared with files); 0 when it is gone."""
        try:
            _, resident, shared, *_ = Path(f"/proc/{self.pid}/statm").read_text().split()
        except (OSError, ValueError):
            return 0
        return (int(resident) - int(shared)) * _PAGE_BYTES

    # ------------------------------------------------------------------------------------- conversation

    def ask(self, message: Any, limit_s: float) -> None:
        """Send a request, to be answered within ``limit_s``. A child that is gone shows in ``take``."""
        self._limit_s, self.deadline_s = limit_s, time.monotonic() + limit_s
        try:
            self._channel.send(message, limit_s)
        except (EOFError, TimeoutError):
            return

    def take(self, memo: Memo | None = None) -> list[Any] | None:
        """The outcomes of what was asked; [] for the start; None when it only asked for something kept in ``memo``.

        Raises InferenceFailed when the process died or took too long (it is killed then), and what the start
        failed with.
        """
        try:
            message = self._channel.receive(max(self.deadline_s - time.monotonic(), _READ_S))
        except (EOFError, TimeoutError) as error:
            self.overdue = isinstance(error, TimeoutError)
            self.kill()
            failure = InferenceFailed if self.facts is not None else ModelUnavailable
            raise failure(self._epitaph()) from None
        if "recall" in message or "keep" in message:
            self._remember(message, memo)
            return None
        self.deadline_s = math.inf
        if "error" in message:
            self.kill()
            raise error_from_wire(message["error"])
        if "ready" in message:
            self.facts = message["ready"]
            self.ready_bytes = self.memory_bytes
            return []
        return [outcome_from_wire(wire) for wire in message["outcomes"]]

    def _remember(self, message: dict[str, Any], memo: Memo | None) -> None:
        if "keep" in message:
            if memo is not None:
                memo.keep(message["keep"], message["value"])
            return
        value = memo.recall(message["recall"]) if memo is not None else None
        # A child that is gone meanwhile shows in the next ``take``.
        with contextlib.suppress(EOFError, TimeoutError):
            self._channel.send({"recalled": value}, max(self.deadline_s - time.monotonic(), _READ_S))

    def _epitaph(self) -> str:
        if self.overdue:
            return f"{self._name} took longer than {self._limit_s:g} s"
        status = self._process.returncode
        if status < 0:
            return f"{self._name} was ended by signal {-status} ({signal.strsignal(-status)})"
        return f"{self._name} exited with status {status}"

    # ---------------------------------------------------------------------------------------------- end

    def leave(self) -> None:
        """Ask it to finish what it does and go."""
        self._channel.finish()

    def signal(self, number: signal.Signals) -> None:
        """To the process and what it started. Never after its status was collected: the id may be another's."""
        if self._process.returncode is None:
            try:
                os.killpg(self.pid, number)
            except ProcessLookupError:
                return

    def gone_within(self, timeout_s: float) -> bool:
        try:
            self._process.wait(max(timeout_s, 0.0))
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> None:
        """End it now, with all it started, and give back all it held. Idempotent."""
        self.signal(signal.SIGKILL)
        self._process.wait()
        self._release()

    def _release(self) -> None:
        self._channel.close()
        shutil.rmtree(self._scratch, ignore_errors=True)


def end(children: Iterable[Child]) -> None:
    """End processes: politely, then with SIGTERM, then with SIGKILL. Their channels stay open (see ``kill``)."""
    left = list(children)
    for child in left:
        child.leave()
    left = _remaining(left, POLITE_S)
    for number, patience_s in ((signal.SIGTERM, TERM_S), (signal.SIGKILL, TERM_S)):
        for child in left:
            child.signal(number)
        left = _remaining(left, patience_s)


def _remaining(children: list[Child], patience_s: float) -> list[Child]:
    deadline_s = time.monotonic() + patience_s
    return [child for child in children if not child.gone_within(deadline_s - time.monotonic())]
