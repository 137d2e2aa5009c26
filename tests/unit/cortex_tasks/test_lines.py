"""A script over a connection of its own: it mends, and never hands out another call's answer."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import redis.asyncio

from cortex_tasks.errors import ClientClosed
from cortex_tasks.lines import AsyncScriptLine, ScriptLine
from tests.support.failover import Failover
from tests.support.redis_server import RedisServer, free_port

#: Returns its argument, and counts how often it ran.
SCRIPT = "redis.call('INCR', KEYS[1]) return ARGV[1]"
#: The same, after so many microseconds of Redis' time.
SLOW = "local till = redis.call('TIME') till = till[1] * 1e6 + till[2] + ARGV[2] repeat local now = redis.call('TIME') until now[1] * 1e6 + now[2] >= till return ARGV[1]"  # noqa: E501


@pytest.fixture
def client(redis_url: str) -> Iterator[Any]:
    with redis.Redis.from_url(redis_url) as made:
        yield made


@pytest.fixture
async def async_client(redis_url: str) -> AsyncIterator[Any]:
    async with redis.asyncio.Redis.from_url(redis_url, socket_timeout=None) as made:
        yield made


def kill_others(client: Any) -> None:
    client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")


@pytest.fixture
def failover(tmp_path: Path) -> Iterator[Failover]:
    with Failover(tmp_path) as made:
        yield made


# ------------------------------------------------------------------------------------------------- threads


def test_it_returns_what_the_script_returns(client: Any) -> None:
    line = ScriptLine(client, SCRIPT)
    assert [line.run(["n"], [word]) for word in ("a", "b")] == [b"a", b"b"]
    client.script_flush()
    assert line.run(["n"], ["c"]) == b"c"
    assert client.get("n") == b"3"
    line.close()
    assert line.run(["n"], ["d"]) == b"d"


def test_a_lost_connection_is_tried_once_more(client: Any, redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as other:
        line = ScriptLine(other, SCRIPT)
        line.run(["n"], ["a"])
        kill_others(client)
        assert line.run(["n"], ["b"]) == b"b"


def test_a_refusal_leaves_the_line_in_order(client: Any) -> None:
    client.set("n", "no number")
    line = ScriptLine(client, SCRIPT)
    with pytest.raises(redis.ResponseError):
        line.run(["n"], ["a"])
    client.delete("n")
    assert line.run(["n"], ["b"]) == b"b"


@pytest.mark.parametrize("busy", [False, True], ids=["on the line", "through the pool"])
def test_after_a_failover_the_new_primary_is_asked(failover: Failover, busy: bool) -> None:
    with redis.Redis.from_url(failover.url) as client:
        line = ScriptLine(client, SCRIPT)
        if busy:
            line._taken.acquire()
        assert line.run(["n"], ["a"]) == b"a"
        failover.happen()
        assert line.run(["n"], ["b"]) == b"b"


def test_a_replica_is_an_error_all_the_same(failover: Failover) -> None:
    with redis.Redis.from_url(failover.url) as client:
        line = ScriptLine(client, SCRIPT)
        line.run(["n"], ["a"])
        client.replicaof("127.0.0.1", free_port())
        with pytest.raises(redis.ResponseError, match="READONLY"):
            line.run(["n"], ["b"])


def test_threads_at_once_get_their_own_answers(client: Any) -> None:
    line = ScriptLine(client, SCRIPT)
    wrong: list[Any] = []

    def ask(thread: int) -> None:
        for n in range(200):
            word = f"{thread}-{n}"
            if line.run(["n"], [word]) != word.encode():
                wrong.append(word)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert client.get("n") == b"800"


def test_a_late_answer_is_nobodys(redis_url: str) -> None:
    with redis.Redis.from_url(redis_url, socket_timeout=0.2, retry=None) as impatient:
        line = ScriptLine(impatient, SLOW)
        assert line.run([], ["a", 0]) == b"a"
        with pytest.raises(redis.TimeoutError):
            line.run([], ["late", 500_000])
        with redis.Redis.from_url(redis_url) as patient:
            patient.ping()
        assert line.run([], ["b", 0]) == b"b"


def test_an_interrupted_call_leaves_no_answer_behind(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    line = ScriptLine(client, SCRIPT)
    line.run(["n"], ["a"])
    connection = line._connection
    with monkeypatch.context() as patched:
        patched.setattr(connection, "read_response", lambda: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            line.run(["n"], ["interrupted"])
    assert line.run(["n"], ["b"]) == b"b"


def test_a_redis_that_is_away_is_an_error_and_its_return_is_noticed(tmp_path: Path) -> None:
    with RedisServer(directory=tmp_path) as server, redis.Redis.from_url(server.url, retry=None) as client:
        line = ScriptLine(client, SCRIPT)
        line.run(["n"], ["a"])
        server.kill()
        with pytest.raises(redis.ConnectionError):
            line.run(["n"], ["b"])
        server.start()
        assert line.run(["n"], ["c"]) == b"c"


# ---------------------------------------------------------------------------------------------- coroutines


async def test_async_it_returns_what_the_script_returns(async_client: Any, client: Any) -> None:
    line = AsyncScriptLine(async_client, SCRIPT, 5.0)
    assert [await line.run(["n"], [word]) for word in ("a", "b")] == [b"a", b"b"]
    client.script_flush()
    assert await line.run(["n"], ["c"]) == b"c"
    kill_others(client)
    assert await line.run(["n"], ["d"]) == b"d"
    client.set("n", "no number")
    with pytest.raises(redis.ResponseError):
        await line.run(["n"], ["e"])
    client.delete("n")
    assert await line.run(["n"], ["f"]) == b"f"
    await line.close()
    with pytest.raises(ClientClosed, match="closed"):
        await line.run(["n"], ["g"])


async def test_async_a_line_that_is_closed_meanwhile_opens_no_connection(async_client: Any) -> None:
    line = AsyncScriptLine(async_client, SLOW, 5.0)
    await line.run([], ["a", 0])
    asked = asyncio.create_task(line.run([], ["b", 100_000]))
    await asyncio.sleep(0.02)
    await line.close()
    with pytest.raises(ClientClosed, match="closed"):
        await asked
    assert line._pipe is None


async def test_async_many_at_once_get_their_own_answers_until_it_is_taken(async_client: Any, client: Any) -> None:
    line = AsyncScriptLine(async_client, SCRIPT, 5.0)
    words = [str(n).encode() for n in range(64)]
    assert await line.run(["n"], ["first"]) == b"first"
    asked = [asyncio.create_task(line.run(["n"], [word])) for word in words]
    assert not line.taken
    await asyncio.sleep(0)
    assert line.taken
    assert await asyncio.gather(*asked) == words
    assert not line.taken
    assert client.get("n") == b"65"
    await line.close()


async def test_async_a_line_with_much_to_send_is_taken(async_client: Any) -> None:
    line = AsyncScriptLine(async_client, SLOW, 20.0)
    held = asyncio.create_task(line.run([], ["held", 300_000]))
    while line._pipe is None:
        await asyncio.sleep(0)
    large = asyncio.create_task(line.run([], ["large", 0, b"x" * 64_000_000]))
    await asyncio.sleep(0.05)
    assert line.taken
    assert await asyncio.gather(held, large) == [b"held", b"large"]
    await line.close()


async def test_async_a_refusal_is_the_callers_own(async_client: Any, client: Any) -> None:
    client.set("text", "no number")
    line = AsyncScriptLine(async_client, SCRIPT, 5.0)
    found = await asyncio.gather(*(line.run([key], [key]) for key in ("a", "text", "b")), return_exceptions=True)
    assert [found[0], type(found[1]), found[2]] == [b"a", redis.ResponseError, b"b"]
    await line.close()


async def test_async_after_a_failover_the_new_primary_is_asked(failover: Failover) -> None:
    async with redis.asyncio.Redis.from_url(failover.url, socket_timeout=None) as client:
        line = AsyncScriptLine(client, SCRIPT, 5.0)
        assert await line.run(["n"], ["a"]) == b"a"
        failover.happen()
        words = [str(n).encode() for n in range(8)]
        assert await asyncio.gather(*(line.run(["n"], [word]) for word in words)) == words
        assert await client.get("n") == b"8"
        await line.close()


async def test_async_a_replica_is_an_error_all_the_same(failover: Failover) -> None:
    async with redis.asyncio.Redis.from_url(failover.url, socket_timeout=None) as client:
        line = AsyncScriptLine(client, SCRIPT, 5.0)
        await line.run(["n"], ["a"])
        await client.replicaof("127.0.0.1", free_port())
        with pytest.raises(redis.ResponseError, match="READONLY"):
            await line.run(["n"], ["b"])
        await line.close()


async def test_async_a_late_answer_is_nobodys(async_client: Any) -> None:
    line = AsyncScriptLine(async_client, SLOW, 0.2)
    assert await line.run([], ["a", 0]) == b"a"
    with pytest.raises(redis.TimeoutError, match=r"0\.2 s"):
        await line.run([], ["late", 500_000])
    await async_client.ping()
    assert [await line.run([], [word, 0]) for word in ("b", "c")] == [b"b", b"c"]
    await line.close()


async def test_async_a_cancelled_call_leaves_no_answer_behind(async_client: Any) -> None:
    line = AsyncScriptLine(async_client, SLOW, 5.0)
    assert await line.run([], ["a", 0]) == b"a"
    asked = asyncio.create_task(line.run([], ["cancelled", 100_000]))
    await asyncio.sleep(0.02)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    assert [await line.run([], [word, 0]) for word in ("b", "c")] == [b"b", b"c"]
    await line.close()


@pytest.mark.parametrize("later_s", [0.0, 0.1], ids=["at once", "a moment later"])
async def test_async_who_is_behind_a_late_answer_gets_an_error_in_time(async_client: Any, later_s: float) -> None:
    """Also where the connection is given up before his own time is over, and Redis takes no new one."""
    line = AsyncScriptLine(async_client, SLOW, 0.3)
    await line.run([], ["a", 0])
    began_s = time.monotonic()
    late = asyncio.create_task(line.run([], ["late", 4_000_000]))
    await asyncio.sleep(later_s)
    found = await asyncio.gather(late, *(line.run([], [f"{n}", 0]) for n in range(5)), return_exceptions=True)
    assert time.monotonic() - began_s < 3.0, "Redis answers after four seconds"
    assert [type(one) for one in found] == [redis.TimeoutError] * 6
    await async_client.ping()
    assert await line.run([], ["b", 0]) == b"b"
    await line.close()


async def test_async_a_redis_that_is_away_is_an_error_and_its_return_is_noticed(tmp_path: Path) -> None:
    with RedisServer(directory=tmp_path) as server:
        async with redis.asyncio.Redis.from_url(server.url, socket_timeout=None) as client:
            line = AsyncScriptLine(client, SCRIPT, 5.0)
            await line.run(["n"], ["a"])
            server.kill()
            with pytest.raises(redis.ConnectionError):
                await line.run(["n"], ["b"])
            server.start()
            assert await line.run(["n"], ["c"]) == b"c"
            await line.close()
