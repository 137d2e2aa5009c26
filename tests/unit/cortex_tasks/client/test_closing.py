"""A client that is closed while others wait: they hear of it at once, and what it held is given back."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from cortex_tasks import AsyncCortex, ClientClosed, Cortex, testing
from cortex_tasks.book import closed
from cortex_tasks.client.core import Core
from cortex_tasks.testing import LocalFleet, echo_fleet
from cortex_tasks.testing.wires import AsyncMemoryWire
from tests.support.stub_models import PATIENCE_S
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
