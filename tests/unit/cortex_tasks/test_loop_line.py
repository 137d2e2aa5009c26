"""Replies as their bytes arrive: whole or in pieces, wanted or not, over a connection that breaks or falls silent."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import redis
import redis.asyncio

from cortex_tasks.lines import packed
from cortex_tasks.loop_line import Pipe, Subscription
from tests.support.redis_server import RedisServer


@pytest.fixture
def client(redis_url: str) -> Iterator[Any]:
    with redis.Redis.from_url(redis_url) as made:
        yield made


@pytest.fixture(params=[2, 3], ids=["RESP2", "RESP3"])
async def async_client(redis_url: str, request: pytest.FixtureRequest) -> AsyncIterator[Any]:
    async with redis.asyncio.Redis.from_url(redis_url, protocol=request.param) as made:
        yield made


class Listener:
    """A subscription, and what it told."""

    def __init__(self) -> None:
        self.heard: list[bytes] = []
        self.gone: list[redis.ConnectionError] = []
        self.line: Subscription

    async def begin(self, client: Any, check_s: float = 60.0) -> None:
        self.line = await Subscription.open(client, self.heard.append, self.gone.append)
        await self.line.begin(packed("SUBSCRIBE", "news"), 5.0, check_s)


async def until(condition: Any, timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.002)


def kill(client: Any, kind: str) -> None:
    client.execute_command("CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")


async def test_what_is_published_is_handed_on(async_client: Any, client: Any) -> None:
    listener = Listener()
    await listener.begin(async_client)
    messages = [b"", b"a", b"\r\n$5", bytes(range(256)) * 4_000, b"last"]
    for message in messages:
        assert client.publish("news", message) == 1
    await until(lambda: len(listener.heard) == len(messages))
    assert listener.heard == messages
    await listener.line.close()
    assert listener.gone == []
    await until(lambda: client.publish("news", b"nobody") == 0)


async def test_a_subscription_that_is_lost_says_so_once(async_client: Any, client: Any) -> None:
    listener = Listener()
    await listener.begin(async_client)
    kill(client, "pubsub")
    await until(lambda: listener.gone)
    with pytest.raises(redis.ConnectionError, match="lost"):
        listener.line.send(b"")
    await listener.line.close()
    assert len(listener.gone) == 1


async def test_a_subscription_that_stands_is_left_alone(async_client: Any, client: Any) -> None:
    """Though nothing comes but the answers to what it asks."""
    listener = Listener()
    await listener.begin(async_client, check_s=0.01)
    await asyncio.sleep(0.3)
    assert (listener.heard, listener.gone) == ([], [])
    client.publish("news", b"a")
    await until(lambda: listener.heard == [b"a"])
    await listener.line.close()


async def test_a_subscription_that_falls_silent_is_given_up(tmp_path: Path) -> None:
    """As when a firewall has forgotten the connection: nothing says that it is over."""
    with RedisServer(directory=tmp_path) as server:
        async with redis.asyncio.Redis.from_url(server.url) as made:
            listener = Listener()
            await listener.begin(made, check_s=0.05)
            os.kill(server.pid, signal.SIGSTOP)
            try:
                await until(lambda: listener.gone)
            finally:
                os.kill(server.pid, signal.SIGCONT)
            await listener.line.close()


async def test_a_redis_that_does_not_answer_is_an_error(tmp_path: Path) -> None:
    with RedisServer(directory=tmp_path) as server:
        async with redis.asyncio.Redis.from_url(server.url) as made:
            line = await Subscription.open(made, lambda _: None, lambda _: None)
            os.kill(server.pid, signal.SIGSTOP)
            try:
                with pytest.raises(redis.TimeoutError, match=r"0\.1 s"):
                    await line.begin(packed("SUBSCRIBE", "news"), 0.1, 60.0)
            finally:
                os.kill(server.pid, signal.SIGCONT)
            await line.close()


async def test_a_channel_that_is_not_permitted_is_an_error(async_client: Any, client: Any, redis_url: str) -> None:
    client.execute_command("ACL", "SETUSER", "mute", "on", ">secret", "~*", "+@all", "resetchannels")
    async with redis.asyncio.Redis.from_url(redis_url, username="mute", password="secret") as mute:
        line = await Subscription.open(mute, lambda _: None, lambda _: None)
        with pytest.raises(redis.exceptions.NoPermissionError):
            await line.begin(packed("SUBSCRIBE", "news"), 5.0, 60.0)
        await line.close()


async def test_a_pipe_keeps_answers_and_askers_apart(async_client: Any) -> None:
    pipe = await Pipe.open(async_client)
    until_s = asyncio.get_running_loop().time() + 10
    # Of all kinds of reply, some of them large, some cancelled before they come.
    commands = [("ECHO", f"{n}" * (1 + n % 7 * 5_000)) if n % 3 else ("NO", "such") for n in range(300)]
    asked = [asyncio.create_task(pipe.ask(packed(*command), until_s)) for command in commands]
    await asyncio.sleep(0)
    assert len(pipe) == 300
    for one in asked[::5]:
        one.cancel()
    found = await asyncio.gather(*asked, return_exceptions=True)
    for n, one in enumerate(found):
        if n % 5 == 0:
            assert isinstance(one, asyncio.CancelledError)
        elif n % 3:
            assert one == commands[n][1].encode()
        else:
            assert isinstance(one, redis.ResponseError)
    assert len(pipe) == 0
    await pipe.close()


async def test_a_pipe_that_is_lost_leaves_nobody_waiting(async_client: Any, client: Any) -> None:
    pipe = await Pipe.open(async_client)
    until_s = asyncio.get_running_loop().time() + 60
    asked = [asyncio.create_task(pipe.ask(packed("BLPOP", f"empty{n}", 0), until_s)) for n in range(3)]
    await asyncio.sleep(0.02)
    kill(client, "normal")
    found = await asyncio.gather(*asked, return_exceptions=True)
    assert [type(one) for one in found] == [redis.ConnectionError] * 3
    await pipe.close()


async def test_a_pipe_that_is_given_up_takes_nothing_more(async_client: Any) -> None:
    """Not even in the turn of the loop in which that happens."""
    pipe = await Pipe.open(async_client)
    pipe.abort()
    with pytest.raises(redis.ConnectionError, match="given up"):
        pipe.send(packed("PING"))
    await pipe.close()


async def test_a_cancellation_that_redis_py_loses_is_heeded(
    async_client: Any, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python 3.11's wait_for loses one that comes as what it awaits is done."""
    connect = async_client.connection_pool.connection_class.connect
    connections = client.info("clients")["connected_clients"]

    async def lose_it(connection: Any) -> None:
        await connect(connection)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(0)

    monkeypatch.setattr(async_client.connection_pool.connection_class, "connect", lose_it)
    task = asyncio.create_task(Pipe.open(async_client))
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: client.info("clients")["connected_clients"] == connections)


async def half_an_answer(client: Any, patience_s: float | None) -> tuple[Pipe, asyncio.Task[Any]]:
    """A command whose time is soon over, and of whose answer two bytes of four have come."""
    pipe = await Pipe.open(client, patience_s)
    loop = asyncio.get_running_loop()
    asked = asyncio.create_task(pipe.ask(packed("BLPOP", "empty", 0), loop.time() + 0.02))
    # In the turn in which it is asked for: however busy the machine, in time.
    loop.call_soon(pipe.data_received, b"$4\r\nab")
    await asyncio.sleep(0)
    return pipe, asked


async def test_an_answer_that_keeps_coming_is_not_late(async_client: Any) -> None:
    pipe, asked = await half_an_answer(async_client, 60.0)
    await until(lambda: not pipe._came)
    pipe.data_received(b"cd\r\n")
    assert await asked == b"abcd"
    assert pipe.lost is None
    await pipe.close()


@pytest.mark.parametrize("patience_s", [None, 0.02], ids=["no patience", "and no more comes"])
async def test_an_answer_that_stops_halfway_is_late(async_client: Any, patience_s: float | None) -> None:
    pipe, asked = await half_an_answer(async_client, patience_s)
    with pytest.raises(redis.TimeoutError):
        await asked
    await pipe.close()
