"""Both clients over a real Redis, with the worker's side of the wire played by a thread."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import redis

from cortex_tasks import (
    AsyncCortex,
    BrokerUnavailable,
    Cortex,
    JobCancelled,
    NoConsumer,
    QueueFull,
    ResultLost,
    ResultTimeout,
    Settings,
)
from cortex_tasks import codec as wire_codec
from cortex_tasks.config import FleetConfig
from cortex_tasks.echo import echo_vector
from cortex_tasks.wire import RedisWire
from tests.support.fake_worker import FakeWorker, answer_message, write_card
from tests.support.redis_server import RedisServer, free_port
from tests.support.worker_process import poll_until


@pytest.fixture
def client(redis_url: str, echo_fleet: FleetConfig) -> Iterator[Cortex]:
    with Cortex(redis_url, fleet=echo_fleet, timeout_s=10) as client:
        yield client


@pytest.fixture
def raw(redis_url: str) -> Iterator[Any]:
    with redis.Redis.from_url(redis_url) as raw:
        yield raw


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[RedisServer]:
    """A server that a test may kill."""
    with RedisServer(directory=tmp_path) as server:
        yield server


def is_own(text: str, item: Any) -> bool:
    return bool(item.vector.tolist() == pytest.approx(echo_vector(text)))


# ---------------------------------------------------------------------------------------------------- answers


def test_twenty_threads_never_get_each_others_answers(redis_url: str, client: Cortex) -> None:
    def ask(thread: int) -> list[bool]:
        texts = [f"thread {thread} text {number}" for number in range(50)]
        return [is_own(text, client.embed(text, model="echo")) for text in texts]

    with FakeWorker(redis_url), ThreadPoolExecutor(20) as pool:
        assert all(ok for oks in pool.map(ask, range(20)) for ok in oks)
    assert threading.active_count() < 20


async def test_many_coroutines_never_get_each_others_answers(redis_url: str, echo_fleet: FleetConfig) -> None:
    before = threading.active_count()
    with FakeWorker(redis_url):
        async with AsyncCortex(redis_url, fleet=echo_fleet) as client:

            async def ask(number: int) -> bool:
                text = f"coroutine {number}"
                return is_own(text, await client.embed(text, model="echo"))

            assert all(await asyncio.gather(*map(ask, range(1_000))))
            assert threading.active_count() <= before + 1


@pytest.mark.parametrize("announce", [True, False])
def test_an_answer_is_found_whether_or_not_its_announcement_arrives(
    redis_url: str, client: Cortex, announce: bool
) -> None:
    with FakeWorker(redis_url, announce=announce):
        assert is_own("x", client.embed("x", model="echo"))


async def test_async_too(redis_url: str, echo_fleet: FleetConfig) -> None:
    with FakeWorker(redis_url, announce=False):
        async with AsyncCortex(redis_url, fleet=echo_fleet) as client:
            assert is_own("x", await client.embed("x", model="echo"))


def test_a_stock_workers_json_answer_is_read(client: Cortex, raw: Any) -> None:
    job = client.submit("embed", ["x"], "echo")
    job_id, _, meta = answer_message(raw.rpop("echo"))
    plain = {**meta, "result": meta["result"].__json__()}
    raw.setex(wire_codec.result_key(job_id), 60, wire_codec.dumps(plain))
    assert is_own("x", job.result()[0])


def test_broker_and_results_may_be_two_servers(
    redis_url: str, own_server: RedisServer, echo_fleet: FleetConfig
) -> None:
    settings = Settings.model_validate({"broker_url": redis_url, "result_url": own_server.url})
    with Cortex(settings=settings, fleet=echo_fleet) as client:
        job = client.submit("embed", ["x"], "echo")
        with redis.Redis.from_url(redis_url) as broker, redis.Redis.from_url(own_server.url) as results:
            job_id, channel, meta = answer_message(broker.rpop("echo"))  # type: ignore[arg-type]
            results.setex(wire_codec.result_key(job_id), 60, wire_codec.dumps(meta))
            assert results.publish(str(channel), job_id) == 1
        assert is_own("x", job.result()[0])


def test_a_user_with_a_password_and_no_channels_is_served(
    own_server: RedisServer, echo_fleet: FleetConfig, caplog: pytest.LogCaptureFixture
) -> None:
    with redis.Redis.from_url(own_server.url) as admin:
        admin.execute_command("ACL", "SETUSER", "lake", "on", ">secret", "~*", "+@all", "resetchannels")
    url = own_server.url.replace("redis://", "redis://lake:secret@")
    with FakeWorker(own_server.url), Cortex(url, fleet=echo_fleet) as client:
        assert is_own("x", client.embed("x", model="echo"))
    assert "will be polled for" in caplog.text
    assert "secret" not in caplog.text
    wrong = own_server.url.replace("redis://", "redis://lake:wrong@")
    with Cortex(wrong, fleet=echo_fleet) as client, pytest.raises(BrokerUnavailable, match=r"lake:\*\*\*@") as caught:
        client.embed("x", model="echo")
    assert "wrong@" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------- map


def test_map_of_ten_thousand_keeps_order_and_bounds_what_is_in_flight(redis_url: str, client: Cortex, raw: Any) -> None:
    deepest = 0
    with FakeWorker(redis_url):
        texts = (f"text {number}" for number in range(10_000))
        for number, item in enumerate(client.map("embed", texts, "echo", chunk=20, window=16)):
            assert is_own(f"text {number}", item)
            if number % 100 == 0:
                deepest = max(deepest, sum(raw.llen(key) for key in wire_codec.queue_keys("echo")))
    assert number == 9_999
    assert deepest <= 16


async def test_async_map_of_ten_thousand(redis_url: str, echo_fleet: FleetConfig) -> None:
    count = 0
    with FakeWorker(redis_url):
        async with AsyncCortex(redis_url, fleet=echo_fleet) as client:
            async for item in client.map("embed", (f"text {n}" for n in range(10_000)), "echo", chunk=20, window=16):
                assert is_own(f"text {count}", item)
                count += 1
    assert count == 10_000


def test_an_interrupted_map_revokes_what_waits(client: Cortex, raw: Any) -> None:
    with raw.pubsub() as control:
        control.subscribe("/0.celery.pidbox")
        control.get_message(timeout=5)

        def texts() -> Iterator[str]:
            yield from ("a", "b", "c")
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            list(client.map("embed", texts(), "echo", chunk=1, window=4))
        heard = control.get_message(timeout=5)
    revoked = json.loads(json.loads(heard["data"])["body"])["arguments"]["task_id"]
    waiting = [json.loads(message)["headers"]["id"] for message in raw.lrange(wire_codec.queue_key("echo", 9), 0, -1)]
    assert sorted(revoked) == sorted(waiting)
    assert len(waiting) == 3


def test_a_push_that_is_interrupted_once_it_has_arrived_is_revoked_too(
    client: Cortex, raw: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    push = RedisWire.push

    def interrupted(self: RedisWire, *args: Any, **kwargs: Any) -> tuple[int, int]:
        push(self, *args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(RedisWire, "push", interrupted)
    with raw.pubsub() as control:
        control.subscribe("/0.celery.pidbox")
        control.get_message(timeout=5)
        with pytest.raises(KeyboardInterrupt):
            list(client.map("embed", ["a", "b", "c"], "echo", chunk=1, window=4))
        heard = control.get_message(timeout=5)
    revoked = json.loads(json.loads(heard["data"])["body"])["arguments"]["task_id"]
    waiting = [json.loads(message)["headers"]["id"] for message in raw.lrange(wire_codec.queue_key("echo", 9), 0, -1)]
    assert waiting
    assert set(waiting) <= set(revoked)


# -------------------------------------------------------------------------------------------- what goes wrong


def test_a_queue_that_nobody_consumes_is_named(client: Cortex, raw: Any) -> None:
    write_card(raw, "other")
    with pytest.raises(NoConsumer, match=r"celery -A workers.app worker -Q echo"):
        client.embed("x", model="echo", timeout_s=0.05)


def test_a_worker_that_loads_or_is_busy_is_a_mere_time_out(client: Cortex, raw: Any) -> None:
    write_card(raw, "echo", state="starting")
    with pytest.raises(ResultTimeout, match="still loading"):
        client.embed("x", model="echo", timeout_s=0.05)
    write_card(raw, "echo")
    with pytest.raises(ResultTimeout, match="2 jobs wait in queue 'echo'"):
        client.embed("x", model="echo", timeout_s=0.05)


async def test_an_async_client_says_the_same(redis_url: str, echo_fleet: FleetConfig, raw: Any) -> None:
    async with AsyncCortex(redis_url, fleet=echo_fleet, timeout_s=0.05) as client:
        with pytest.raises(NoConsumer, match="queue 'echo'"):
            await client.embed("x", model="echo")
        write_card(raw, "echo")
        with pytest.raises(ResultTimeout, match="2 jobs wait"):
            await client.embed("x", model="echo")


def test_a_full_queue_refuses_with_an_estimate(client: Cortex, raw: Any, echo_fleet: FleetConfig) -> None:
    limit = echo_fleet.models["echo"].limits.queue_jobs
    raw.lpush(wire_codec.queue_key("echo", 9), *range(limit))
    with pytest.raises(QueueFull) as caught:
        client.embed("x", model="echo")
    assert caught.value.retry_after_s == 1.0
    write_card(raw, "echo", items_per_s=0.5)
    with pytest.raises(QueueFull) as caught:
        client.embed("x", model="echo")
    assert caught.value.retry_after_s == 2.0
    assert raw.llen("echo") == 0


def test_an_evicted_answer_is_lost_once_it_was_announced(client: Cortex, raw: Any) -> None:
    job = client.submit("embed", ["x"], "echo")
    _, channel, _ = answer_message(raw.rpop("echo"))
    raw.publish(channel, job.id)
    with pytest.raises(ResultLost):
        job.result()


def test_a_cancelled_job_is_revoked(client: Cortex, raw: Any) -> None:
    job = client.submit("embed", ["x"], "echo")
    with raw.pubsub() as control:
        control.subscribe("/0.celery.pidbox")
        control.get_message(timeout=5)
        assert job.cancel()
        heard = control.get_message(timeout=5)
    assert json.loads(json.loads(heard["data"])["body"])["arguments"]["task_id"] == [job.id]
    with pytest.raises(JobCancelled):
        job.result()


def test_a_redis_that_is_not_there_is_named_and_its_password_is_not(echo_fleet: FleetConfig) -> None:
    url = f"redis://user:secret@127.0.0.1:{free_port()}/0"
    with Cortex(url, fleet=echo_fleet) as client, pytest.raises(BrokerUnavailable) as caught:
        client.submit("embed", "x", "echo")
    assert url.replace("secret", "***") in str(caught.value)
    assert "secret" not in repr(caught.value)


@pytest.mark.timeout(20)
async def test_a_redis_that_accepts_but_never_answers_is_given_up(
    echo_fleet: FleetConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cortex_tasks.wire.COMMAND_TIMEOUT_S", 0.2)
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        url = f"redis://127.0.0.1:{mute.getsockname()[1]}"
        with Cortex(url, fleet=echo_fleet) as client, pytest.raises(BrokerUnavailable):
            client.embed("x", model="echo")
        async with AsyncCortex(url, fleet=echo_fleet) as other:
            with pytest.raises(BrokerUnavailable):
                await other.embed("x", model="echo")


def test_a_restart_while_waiting_is_survived(own_server: RedisServer, echo_fleet: FleetConfig) -> None:
    with Cortex(own_server.url, fleet=echo_fleet, timeout_s=30) as client:
        job = client.submit("embed", ["x"], "echo")
        with redis.Redis.from_url(own_server.url) as raw:
            job_id, _, meta = answer_message(raw.rpop("echo"))  # type: ignore[arg-type]
        own_server.restart()
        with redis.Redis.from_url(own_server.url) as raw:
            raw.setex(wire_codec.result_key(job_id), 60, wire_codec.dumps(meta))
        assert is_own("x", job.result()[0])
        # The push script went with the old server's memory.
        with FakeWorker(own_server.url):
            assert is_own("y", client.embed("y", model="echo"))


async def test_an_async_client_survives_it_too(own_server: RedisServer, echo_fleet: FleetConfig) -> None:
    async with AsyncCortex(own_server.url, fleet=echo_fleet, timeout_s=30) as client:
        job = await client.submit("embed", ["x"], "echo")
        with redis.Redis.from_url(own_server.url) as raw:
            job_id, _, meta = answer_message(raw.rpop("echo"))  # type: ignore[arg-type]
        await asyncio.to_thread(own_server.restart)
        with redis.Redis.from_url(own_server.url) as raw:
            raw.setex(wire_codec.result_key(job_id), 60, wire_codec.dumps(meta))
        assert is_own("x", (await job.result())[0])
        with FakeWorker(own_server.url):
            assert is_own("y", await client.embed("y", model="echo"))


def test_a_redis_that_stays_away_while_waiting_is_said_at_the_end(
    own_server: RedisServer, echo_fleet: FleetConfig
) -> None:
    with Cortex(own_server.url, fleet=echo_fleet) as client:
        job = client.submit("embed", ["x"], "echo")
        own_server.kill()
        poll_until(lambda: client._link().replies.down, "the loss is noticed")
        with pytest.raises(BrokerUnavailable):
            job.result(timeout_s=0.05)


# ----------------------------------------------------------------------------------------------- fork, loops


def test_a_forked_child_has_a_connection_of_its_own(redis_url: str, client: Cortex) -> None:
    with FakeWorker(redis_url):
        pending = client.submit("embed", ["parent's"], "echo")
        assert is_own("x", client.embed("x", model="echo"))
        pid = os.fork()
        if pid == 0:
            try:
                # Also a job that the parent submitted.
                own = is_own("child", client.embed("child", model="echo"))
                os._exit(0 if own and is_own("parent's", pending.result()[0]) else 1)
            except BaseException:
                os._exit(2)
        assert all(is_own(f"parent {n}", client.embed(f"parent {n}", model="echo")) for n in range(20))
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert is_own("parent's", pending.result()[0])


async def test_cancelled_coroutines_cross_no_answers(redis_url: str, echo_fleet: FleetConfig) -> None:
    """A command cut off half-way must not leave its reply to the next one on the connection."""
    with FakeWorker(redis_url):
        async with AsyncCortex(redis_url, fleet=echo_fleet) as client:
            for _ in range(5):
                calls = [asyncio.create_task(client.embed(f"gone {n}", model="echo")) for n in range(40)]
                for number, call in enumerate(calls):
                    await asyncio.sleep(0)
                    if number % 2:
                        call.cancel()
                await asyncio.gather(*calls, return_exceptions=True)
                text = "still my own"
                assert is_own(text, await client.embed(text, model="echo"))
            assert len(client._link().replies._book) == 0


def test_closing_an_async_client_leaves_nothing_behind(
    redis_url: str, echo_fleet: FleetConfig, recwarn: pytest.WarningsRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    async def use() -> set[str]:
        async with AsyncCortex(redis_url, fleet=echo_fleet) as client:
            await client.embed("x", model="echo")
        return {task.get_name() for task in asyncio.all_tasks()}

    with FakeWorker(redis_url):
        names = asyncio.run(use(), debug=True)
    assert not any("cortex" in name for name in names)
    assert "was destroyed" not in caplog.text
    assert not [warning for warning in recwarn if issubclass(warning.category, ResourceWarning)]
