"""A client that is closed while others wait: they hear of it at once, and what it held is given back."""

from __future__ import annotations

import asyncio
import gc
import shutil
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import redis

from cortex_tasks import AsyncCortex, ClientClosed, Cortex, ResultTimeout, testing
from cortex_tasks.book import closed
from cortex_tasks.client.core import Core
from cortex_tasks.config import FleetConfig
from cortex_tasks.testing import LocalFleet, echo_fleet, local
from cortex_tasks.testing.wires import AsyncMemoryWire
from tests.support.fake_worker import FakeWorker
from tests.support.redis_server import RedisServer
from tests.support.stub_models import PATIENCE_S
from tests.support.tls_proxy import TlsProxy, make_certificate
from tests.support.worker_process import poll_until

TEXTS = [f"text {number}" for number in range(600)]


@pytest.fixture
def fleet() -> Iterator[LocalFleet]:
    """It answers nothing."""
    with testing.fleet() as fleet:
        fleet.hold()
        yield fleet


async def entered(fleet: LocalFleet) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not fleet.jobs:
            await asyncio.sleep(0)


CALLS: dict[str, Callable[[Cortex], Any]] = {
    "single": lambda client: client.embed("x", timeout_s=30),
    "bulk": lambda client: client.embed(TEXTS, timeout_s=30),
    "job": lambda client: client.submit("embed", "x").result(30),
    "map": lambda client: list(client.map("embed", TEXTS, chunk=1, timeout_s=30)),
}


async def _job(client: AsyncCortex) -> Any:
    return await (await client.submit("embed", "x")).result(30)


async def _map(client: AsyncCortex) -> Any:
    return [item async for item in client.map("embed", TEXTS, chunk=1, timeout_s=30)]


ASYNC_CALLS: dict[str, Callable[[AsyncCortex], Awaitable[Any]]] = {
    "single": lambda client: client.embed("x", timeout_s=30),
    "bulk": lambda client: client.embed(TEXTS, timeout_s=30),
    "job": _job,
    "map": _map,
}


@pytest.mark.parametrize("call", CALLS)
def test_a_thread_that_waits_hears_of_it_at_once(fleet: LocalFleet, call: str) -> None:
    client = fleet.client()
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(CALLS[call], client)
        poll_until(lambda: fleet.jobs, "a job")
        client.close()
        with pytest.raises(ClientClosed, match="closed during this call"):
            waiting.result(PATIENCE_S)
    assert client._current is None, "nothing was opened anew"
    assert fleet.revoked == []


@pytest.mark.parametrize("call", ASYNC_CALLS)
async def test_a_coroutine_that_waits_hears_of_it_at_once(fleet: LocalFleet, call: str) -> None:
    client = fleet.aclient()
    waiting = asyncio.ensure_future(ASYNC_CALLS[call](client))
    await entered(fleet)
    await client.aclose()
    with pytest.raises(ClientClosed, match="closed during this call"):
        await asyncio.wait_for(waiting, PATIENCE_S)
    assert client._current is None, "nothing was opened anew"
    assert fleet.revoked == []


def test_several_texts_of_which_some_are_answered_do_not_pass_for_a_result() -> None:
    order = Core(echo_fleet(), 30.0).plan("embed").order(TEXTS)
    answered = [{"status": "SUCCESS", "result": None}] * (len(order.drafts) - 1)
    with pytest.raises(ClientClosed):
        order.result([*answered, closed()])


def test_a_job_outlives_the_client_that_waited_for_it(fleet: LocalFleet) -> None:
    client = fleet.client()
    job = client.submit("embed", "x")
    with ThreadPoolExecutor(2) as threads:
        waiting = [threads.submit(job.result, 30) for _ in range(2)]
        client.close()
        assert all(isinstance(call.exception(PATIENCE_S), ClientClosed) for call in waiting)
        assert (job.done(), job.state) == (False, "PENDING")
        again = [threads.submit(job.result, 30) for _ in range(2)]
        poll_until(lambda: len(client._link().replies._book), "the job is awaited again")
        fleet.release()
        assert all(call.result(PATIENCE_S).ok for call in again)
    assert (job.done(), job.state, job.cancel()) == (True, "SUCCESS", False)


async def test_a_job_outlives_the_async_client_that_waited_for_it(fleet: LocalFleet) -> None:
    client = fleet.aclient()
    job = await client.submit("embed", "x")
    waiting = asyncio.create_task(job.result(30))
    await asyncio.sleep(0)
    await client.aclose()
    with pytest.raises(ClientClosed):
        await asyncio.wait_for(waiting, PATIENCE_S)
    assert (job.done(), await job.state()) == (False, "PENDING")
    fleet.release()
    assert (await job.result(PATIENCE_S)).ok
    await client.aclose()


def test_a_stream_whose_client_was_closed_opens_nothing_anew(fleet: LocalFleet) -> None:
    fleet.release()
    client = fleet.client()
    stream = client.map("embed", TEXTS, chunk=1, window=8)
    next(stream)
    client.close()
    with pytest.raises(ClientClosed):
        list(stream)
    assert client._current is None


async def test_an_async_stream_whose_client_was_closed_opens_nothing_anew(fleet: LocalFleet) -> None:
    fleet.release()
    client = fleet.aclient()
    stream = client.map("embed", TEXTS, chunk=1, window=8)
    await anext(stream)
    await client.aclose()
    with pytest.raises(ClientClosed):
        _ = [item async for item in stream]
    assert client._current is None


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalFleet]:
    """Its queue takes one job, and says to come again in a minute."""
    monkeypatch.setattr(local, "_ITEMS_PER_S", 1e-3)
    config = echo_fleet()
    limits = config.models["minilm"].limits.model_copy(update={"queue_jobs": 1})
    model = config.models["minilm"].model_copy(update={"limits": limits})
    with testing.fleet(fleet=config.model_copy(update={"models": {**config.models, "minilm": model}})) as fleet:
        fleet.hold()
        fleet.client().submit("embed", "x")
        yield fleet


def test_a_stream_that_waits_for_a_full_queue_hears_of_it_too(full: LocalFleet) -> None:
    client = full.client()
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(CALLS["map"], client)
        poll_until(lambda: full.refused, "a refusal")
        client.close()
        with pytest.raises(ClientClosed):
            waiting.result(PATIENCE_S)


async def test_an_async_stream_that_waits_for_a_full_queue_hears_of_it_too(full: LocalFleet) -> None:
    client = full.aclient()
    waiting = asyncio.ensure_future(ASYNC_CALLS["map"](client))
    async with asyncio.timeout(PATIENCE_S):
        while not full.refused:
            await asyncio.sleep(0)
    await client.aclose()
    with pytest.raises(ClientClosed):
        await asyncio.wait_for(waiting, PATIENCE_S)


def test_a_call_that_has_just_begun_hears_of_it_too(fleet: LocalFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has its link, and awaits nothing yet."""
    client = fleet.client()
    for text in ("one", ["one", "two"]):
        link = client._link()
        monkeypatch.setattr(client, "_link", lambda link=link: link)
        client.close()
        with pytest.raises(ClientClosed):
            client.embed(text)
        monkeypatch.undo()
    assert fleet.jobs == []
    assert not any(thread.name == "cortex-replies" for thread in threading.enumerate())


async def test_a_subscription_that_is_made_meanwhile_is_given_back(
    fleet: LocalFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, real = asyncio.Event(), AsyncMemoryWire.listen

    async def slow(*args: Any) -> None:
        await gate.wait()
        await real(*args)

    monkeypatch.setattr(AsyncMemoryWire, "listen", slow)
    client = fleet.aclient()
    waiting = asyncio.create_task(client.embed(["one"]))
    await asyncio.sleep(0)
    await client.aclose()
    gate.set()
    with pytest.raises(ClientClosed):
        await asyncio.wait_for(waiting, PATIENCE_S)
    assert fleet._listeners == {}


def test_the_next_call_opens_new_connections(fleet: LocalFleet) -> None:
    fleet.release()
    client = fleet.client()
    for _ in range(2):
        assert client.embed("x").model == "minilm"
        client.close()
    assert fleet._listeners == {}


# --------------------------------------------------------------------------------- from another event loop


async def use(client: AsyncCortex) -> None:
    """It leaves connections of every kind, and an answer that is still awaited."""
    await client.embed("x", model="echo")
    await client.embed(["x", "y"], model="echo")
    with pytest.raises(ResultTimeout):
        await client.embed("never", model="orphan", timeout_s=0.01)
    job = await client.submit("embed", "never", "orphan")
    assert await job.state() == "PENDING"


def after_a_loop_that_ended(client: AsyncCortex) -> None:
    asyncio.run(use(client))
    asyncio.run(client.aclose())


def after_a_loop_that_was_closed_over_its_tasks(client: AsyncCortex) -> None:
    loop = asyncio.new_event_loop()
    loop.run_until_complete(use(client))
    loop.close()
    asyncio.run(client.aclose())


def beside_a_loop_at_rest(client: AsyncCortex) -> None:
    loop = asyncio.new_event_loop()
    loop.run_until_complete(use(client))
    asyncio.run(asyncio.wait_for(client.aclose(), PATIENCE_S))
    loop.close()


def beside_a_loop_of_another_thread(client: AsyncCortex) -> None:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(use(client), loop).result(PATIENCE_S)
        asyncio.run(asyncio.wait_for(client.aclose(), PATIENCE_S))
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture(params=["plain", "tls"])
def url(request: pytest.FixtureRequest, redis_server: RedisServer, redis_url: str, tmp_path: Path) -> Iterator[str]:
    if request.param == "plain":
        yield redis_url
        return
    if shutil.which("openssl") is None:
        pytest.skip("no openssl command to make a certificate with")
    certificate, key = make_certificate(tmp_path)
    with TlsProxy(redis_server.port, certificate, key) as proxy:
        yield f"rediss://127.0.0.1:{proxy.port}/0?ssl_ca_certs={certificate}"


@pytest.mark.parametrize(
    "closing",
    [
        after_a_loop_that_ended,
        after_a_loop_that_was_closed_over_its_tasks,
        beside_a_loop_at_rest,
        beside_a_loop_of_another_thread,
    ],
)
@pytest.mark.filterwarnings("error::ResourceWarning", "error::pytest.PytestUnraisableExceptionWarning")
def test_another_event_loop_may_close_it(
    redis_url: str, url: str, echo_fleet: FleetConfig, caplog: pytest.LogCaptureFixture,
    closing: Callable[[AsyncCortex], None],
) -> None:  # fmt: skip
    models = {alias: model.model_copy(update={"cache": "always"}) for alias, model in echo_fleet.models.items()}
    client = AsyncCortex(url, fleet=echo_fleet.model_copy(update={"models": models}), timeout_s=PATIENCE_S)
    with redis.Redis.from_url(redis_url) as raw, FakeWorker(redis_url):
        connections = raw.info("clients")["connected_clients"]
        closing(client)
        # While the client is still held: nothing is left to the garbage collection.
        poll_until(lambda: raw.info("clients")["connected_clients"] <= connections, "its connections are closed")
        again = asyncio.run(client.embed("x", model="echo"))
        asyncio.run(client.aclose())
        del client
        gc.collect()
    assert again.model == "echo"
    assert "was destroyed" not in caplog.text
