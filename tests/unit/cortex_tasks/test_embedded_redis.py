"""The embedded Redis: what it is told, when it refuses, and that it comes and goes cleanly."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from cortex_tasks.embedded_redis import answers, find_server, server_config
from cortex_tasks.errors import BrokerUnavailable, ConfigError
from cortex_tasks.local_fleet import free_port, session_members
from tests.support.redis_server import RedisServer

CORTEX = str(Path(sys.executable).with_name("cortex"))


def test_it_serves_loopback_only_evicts_only_what_may_go_and_keeps_nothing() -> None:
    config = server_config("redis://localhost:7001/20", 123).splitlines()
    assert {"bind 127.0.0.1 -::1", "port 7001", "maxmemory 123", "maxmemory-policy volatile-lru"} <= set(config)
    assert {'save ""', "appendonly no", "databases 21"} <= set(config)


@pytest.mark.parametrize("url", ["redis://10.0.0.7:6379/0", "redis://:hunter2@example.org", "rediss://localhost:6379"])
def test_it_is_no_stand_in_for_another_machines_redis(url: str) -> None:
    with pytest.raises(ConfigError, match="serves only redis:// on this machine") as caught:
        server_config(url, 1)
    assert "hunter2" not in str(caught.value)


def test_without_any_server_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match=r"datapunk-cortex\[fleet\]"):
        find_server()


def test_an_old_server_on_the_path_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "redis-server"
    old.write_text("#!/bin/sh\necho 'Redis server v=5.0.7 sha=0'\n")
    old.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert find_server() != str(old)
    old.write_text("#!/bin/sh\necho 'Redis server v=6.2.0 sha=0'\n")
    assert find_server() == str(old)


# ------------------------------------------------------------------------------------------------- the command

Start = Callable[[str], subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Runs ``cortex redis`` for a URL; what is left of it is killed."""
    running: list[subprocess.Popen[str]] = []

    def run(url: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [CORTEX, "redis"],
            env={**os.environ, "CORTEX_BROKER_URL": url},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        running.append(process)
        return process

    yield run
    for process in running:
        for pid in session_members({process.pid}):
            os.kill(pid, signal.SIGKILL)
        process.communicate()


def until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.02)


@pytest.mark.fleet
def test_it_runs_until_sigterm_and_leaves_nothing(start: Start) -> None:
    url = f"redis://:hunter%2F2@127.0.0.1:{free_port()}/0"
    process = start(url)
    until(lambda: answers(url))
    with pytest.raises(BrokerUnavailable, match="refuses"):
        answers(url.replace("hunter%2F2", "wrong"))
    for pid in session_members({process.pid}):
        assert "hunter" not in Path(f"/proc/{pid}/cmdline").read_text()
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "hunter" not in out
    assert not session_members({process.pid})


@pytest.mark.fleet
def test_it_waits_for_its_clients_and_a_second_signal_ends_it(start: Start) -> None:
    url = f"redis://127.0.0.1:{free_port()}/0"
    process = start(url)
    until(lambda: answers(url))
    with redis.Redis.from_url(url) as client:
        client.ping()
        process.send_signal(signal.SIGTERM)
        for _ in range(5):
            assert client.ping()
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


@pytest.mark.fleet
def test_the_server_goes_when_its_supervisor_is_killed(start: Start) -> None:
    url = f"redis://127.0.0.1:{free_port()}/0"
    process = start(url)
    until(lambda: answers(url))
    process.kill()
    process.wait()
    until(lambda: not session_members({process.pid}))


@pytest.mark.fleet
def test_a_redis_that_answers_is_used(start: Start) -> None:
    with RedisServer() as server:
        process = start(server.url)
        assert process.stdout is not None
        assert "using it" in process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert answers(server.url)


@pytest.mark.fleet
def test_a_taken_port_is_said(start: Start) -> None:
    import socket

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        process = start(f"redis://127.0.0.1:{other.getsockname()[1]}/0")
        out, _ = process.communicate(timeout=30)
        assert process.returncode == 3
        assert "is the port taken by something else?" in out
