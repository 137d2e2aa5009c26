"""How a Redis that says no is told from one that does not answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import redis
from click.testing import CliRunner
from pydantic import SecretStr

from cortex_tasks import AsyncCortex, BrokerUnavailable, Cortex, Settings
from cortex_tasks.app import make_app
from cortex_tasks.cli import main
from cortex_tasks.client.core import Core
from cortex_tasks.config import FleetConfig
from cortex_tasks.lines import AsyncScriptLine
from cortex_tasks.tasks import register
from cortex_tasks.wire import AsyncRedisWire, RedisWire, unavailable
from tests.support.failover import Failover
from tests.support.redis_server import RedisServer, free_port

URL = "redis://lake:hunter2@127.0.0.1:6379/0"
PASSWORD = "hunter2"


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer() as running:
        yield running


@pytest.fixture
def admin(server: RedisServer) -> Iterator[redis.Redis]:
    """A connection that stays let in, whatever a test forbids to new ones."""
    with redis.Redis.from_url(server.url, single_connection_client=True) as connected:
        connected.flushall()
        yield connected
        connected.config_set("maxmemory", 0)
        connected.config_set("requirepass", "")
        connected.execute_command("REPLICAOF", "NO", "ONE")


def fill(admin: redis.Redis) -> None:
    admin.config_set("maxmemory", 1)


def make_replica(admin: redis.Redis) -> None:
    admin.execute_command("REPLICAOF", "127.0.0.1", free_port())


def lock(admin: redis.Redis) -> None:
    admin.config_set("requirepass", "hunter2")


def forbid(admin: redis.Redis) -> None:
    admin.execute_command("ACL", "SETUSER", "lake", "on", f">{PASSWORD}", "~*", "&*", "+@all", "-eval", "-evalsha")


REFUSALS = [
    (fill, "", "is full (maxmemory)", "raise its maxmemory"),
    (make_replica, "", "is a read-only replica", "name its primary"),
    (lock, "", "does not let us in", "give a valid user and password"),
    (lock, ":wrong@", "does not let us in", "give a valid user and password"),
    (forbid, f"lake:{PASSWORD}@", "does not permit this", "(ACL)"),
]
each_refusal = pytest.mark.parametrize(
    ("refuse", "user", "means", "remedy"), REFUSALS, ids=["OOM", "READONLY", "NOAUTH", "WRONGPASS", "NOPERM"]
)


def check(error: BrokerUnavailable, means: str, remedy: str) -> None:
    assert means in str(error)
    assert remedy in str(error)
    assert "does not answer" not in str(error)
    assert PASSWORD not in str(error)
    assert "wrong@" not in str(error)


@pytest.mark.fleet
@each_refusal
async def test_both_clients_say_how_redis_refuses(
    server: RedisServer, admin: redis.Redis, echo_fleet: FleetConfig,
    refuse: Callable[[redis.Redis], None], user: str, means: str, remedy: str,
) -> None:  # fmt: skip
    refuse(admin)
    url = server.url.replace("://", f"://{user}")
    with Cortex(url, fleet=echo_fleet) as client, pytest.raises(BrokerUnavailable) as caught:
        client.embed("x", model="echo")
    check(caught.value, means, remedy)
    async with AsyncCortex(url, fleet=echo_fleet) as asynchronous:
        with pytest.raises(BrokerUnavailable) as caught:
            await asynchronous.embed("x", model="echo")
    check(caught.value, means, remedy)


@pytest.mark.fleet
@each_refusal
def test_celery_native_tasks_say_how_redis_refuses(
    server: RedisServer, admin: redis.Redis, echo_fleet: FleetConfig,
    refuse: Callable[[redis.Redis], None], user: str, means: str, remedy: str,
) -> None:  # fmt: skip
    if refuse is forbid:
        # kombu pushes with a plain LPUSH.
        admin.execute_command("ACL", "SETUSER", "lake", "on", f">{PASSWORD}", "~*", "&*", "+@all", "-lpush")
    else:
        refuse(admin)
    url = server.url.replace("://", f"://{user}")
    settings = Settings.model_validate({"broker_url": url})
    embed = register(make_app(settings, echo_fleet, fail_fast=True), settings, echo_fleet)["embed"]
    with pytest.raises(BrokerUnavailable) as caught:
        embed.delay(["x"], model="echo")
    check(caught.value, means, remedy)


@pytest.mark.fleet
def test_the_command_line_says_how_redis_refuses(
    server: RedisServer, admin: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock(admin)
    monkeypatch.setenv("CORTEX_BROKER_URL", server.url.replace("://", "://:wrong@"))
    result = CliRunner().invoke(main, ["status"])
    assert result.exit_code == 3
    assert "does not let us in" in result.stderr
    assert "wrong" not in result.stderr.replace("WRONGPASS", "")


def test_more_than_a_hundred_threads_may_ask_at_once(redis_url: str) -> None:
    """redis-py 8 gives no more than 100 connections unless it is told to."""
    wire = RedisWire(Settings.model_validate({"broker_url": redis_url}))
    for client in (wire._broker, wire._results):
        for _ in range(101):
            client.connection_pool.get_connection()
    assert wire.depth("echo") == 0
    assert wire.fetch(["a"]) == [None]
    wire.close()


@pytest.mark.parametrize("busy", [False, True], ids=["on the line", "through the pool"])
async def test_after_a_failover_the_new_primary_gets_the_jobs(
    tmp_path: Path, echo_fleet: FleetConfig, monkeypatch: pytest.MonkeyPatch, busy: bool
) -> None:
    monkeypatch.setattr(AsyncScriptLine, "taken", busy)
    envelope = Core(echo_fleet, 1.0).plan("embed", model="echo").envelope
    with Failover(tmp_path) as failover:
        # Not validated: no setting names a socket's file.
        wire = AsyncRedisWire(Settings.model_construct(broker_url=SecretStr(failover.url)))
        assert await wire.push(envelope, [b"a"], partial=False) == (1, 1)
        failover.happen()
        assert await wire.push(envelope, [b"b"], partial=False) == (1, 1)
        await wire.close()


@pytest.mark.parametrize("call", ["push", "revoke", "cards", "depth"])
async def test_a_cancellation_that_redis_py_loses_is_heeded(
    redis_url: str, echo_fleet: FleetConfig, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Python 3.11's wait_for loses one that comes as what it awaits is done."""
    wire = AsyncRedisWire(Settings.model_validate({"broker_url": redis_url}))
    get_connection = wire._broker.connection_pool.get_connection

    async def lose_it(*args: Any) -> Any:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(0)
        return await get_connection(*args)

    monkeypatch.setattr(AsyncScriptLine, "taken", True)
    monkeypatch.setattr(wire._broker.connection_pool, "get_connection", lose_it)
    calls = {
        "push": lambda: wire.push(Core(echo_fleet, 1.0).plan("embed", model="echo").envelope, [b"a"], partial=False),
        "revoke": lambda: wire.revoke(["a"]),
        "cards": wire.cards,
        "depth": lambda: wire.depth("echo"),
    }
    task = asyncio.create_task(calls[call]())
    with pytest.raises(asyncio.CancelledError):
        await task
    await wire.close()


async def test_an_answer_may_take_longer_than_a_command_to_come(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wire = AsyncRedisWire(Settings.model_validate({"broker_url": redis_url}))
    assert await wire.fetch(["a"]) == [None]
    pipe = wire._results._pipe
    assert pipe is not None
    monkeypatch.setattr(wire._results, "_timeout_s", 0.02)
    # What comes over the slow link comes from here.
    monkeypatch.setattr(pipe, "send", lambda command: None)
    asked = asyncio.create_task(wire.fetch(["a"]))
    # In the turn in which it is asked for: however busy the machine, in time.
    asyncio.get_running_loop().call_soon(pipe.data_received, b"*1\r\n$2\r\na")
    await asyncio.sleep(0)
    async with asyncio.timeout(5):
        while pipe._came:
            await asyncio.sleep(0.002)
    pipe.data_received(b"b\r\n")
    assert await asked == [b"ab"]
    await wire.close()


@pytest.mark.parametrize(
    ("error", "means"),
    [
        (redis.exceptions.BusyLoadingError("Redis is loading the dataset in memory"), "is starting"),
        (redis.ResponseError("MISCONF Redis is configured to save RDB snapshots"), "refuses: MISCONF"),
        (redis.ConnectionError("Error 111 connecting to 127.0.0.1:6379"), "does not answer: Error 111"),
        (TimeoutError("timed out"), "does not answer: timed out"),
    ],
)
def test_other_answers(error: Exception, means: str) -> None:
    found = unavailable(URL, error)
    assert f"Redis at redis://lake:***@127.0.0.1:6379/0 {means}" in str(found)
    assert found.details == {"url": "redis://lake:***@127.0.0.1:6379/0"}
