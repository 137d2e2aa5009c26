"""A real worker process of the Celery command line, for tests."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import redis

from cortex_tasks.presence import WorkerCard, read_cards

ROOT = Path(__file__).resolve().parents[2]
QUEUES_FILE = ROOT / "tests" / "support" / "queues.test.yaml"
START_TIMEOUT_S = 120.0


class WorkerProcess:
    """``celery -A workers.app worker -Q <queues>`` until it is stopped; its output goes to ``log``."""

    def __init__(
        self,
        redis_url: str,
        log: Path,
        *,
        queues: str = "echo,slow,poison,gated",
        queues_file: Path = QUEUES_FILE,
        env: Mapping[str, str] | None = None,
        arguments: tuple[str, ...] = (),
        wait: bool = True,
    ) -> None:
        self.url = redis_url
        self.log = log
        self.env = {
            **os.environ,
            "CORTEX_BROKER_URL": redis_url,
            "CORTEX_QUEUES_FILE": str(queues_file),
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
            **(env or {}),
        }
        command = [sys.executable, "-m", "celery", "-A", "workers.app", "worker", "-Q", queues, *arguments]
        with log.open("ab") as sink:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=self.env, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
            )
        if wait:
            self.wait_ready()

    @property
    def pid(self) -> int:
        return self.process.pid

    def card(self) -> WorkerCard | None:
        """The worker's own card, by its pid."""
        with redis.Redis.from_url(self.url) as client:
            return next((card for card in read_cards(client) if card.pid == self.pid), None)

    def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> WorkerCard:
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            card = self.card()
            if card is not None and card.state == "ready":
                return card
            assert self.process.poll() is None, f"the worker ended with {self.process.returncode}:\n{self.tail()}"
            time.sleep(0.05)
        raise AssertionError(f"the worker was not ready within {timeout_s} s:\n{self.tail()}")

    def terminate(self, timeout_s: float = 30.0) -> int:
        """Warm shutdown; returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self._wait(timeout_s)

    @contextlib.contextmanager
    def halted(self) -> Iterator[None]:
        """It stands still meanwhile."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL to the whole group, as the OOM killer or a lost machine would."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait(10)

    def tail(self, lines: int = 40) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def _wait(self, timeout_s: float) -> int:
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            tail = self.tail()
            self.kill()
            raise AssertionError(f"the worker did not stop within {timeout_s} s:\n{tail}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.terminate()


def forget_answers(url: str) -> None:
    """Drop every cached answer, so that what one test computed is unknown to the next."""
    with redis.Redis.from_url(url) as client:
        if names := list(client.scan_iter(match="cortex:cache:e:*", count=1_000)):
            client.unlink(*names)


def poll_until(condition, what: str, timeout_s: float = 30.0):  # type: ignore[no-untyped-def]
    """The first truthy value of ``condition()``; fails, saying ``what``, after a deadline."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"not within {timeout_s} s: {what}")
