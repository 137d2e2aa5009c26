"""Singles of one moment travel together and come back as their own."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from cortex_tasks import (
    BrokerUnavailable,
    ClientClosed,
    CortexError,
    InferenceFailed,
    InvalidInput,
    QueueFull,
    ResultTimeout,
    testing,
)
from cortex_tasks.client import seats
from cortex_tasks.client.core import Order
from cortex_tasks.echo import FAIL, echo_vector
from cortex_tasks.testing import LocalFleet
from tests.support.worker_process import poll_until


@pytest.fixture
def fleet() -> Iterator[LocalFleet]:
    with testing.fleet() as fleet:
        yield fleet


async def test_coroutines_of_one_turn_share_messages(fleet: LocalFleet) -> None:
    async with fleet.aclient() as client:
        texts = [f"text {n}" for n in range(100)]
        results = await asyncio.gather(*(client.embed(text) for text in texts))
    assert [len(job.inputs) for job in fleet.jobs] == [32, 32, 32, 4]
    for text, result in zip(texts, results, strict=True):
        assert result.vector == pytest.approx(echo_vector(text), abs=1e-6)


async def test_where_a_moment_fills_several_messages_alike_texts_share_one(fleet: LocalFleet) -> None:
    texts = [f"{n}" + "x" * (97 * n % 61) for n in range(70)]
    async with fleet.aclient() as client:
        results = await asyncio.gather(*(client.embed(text) for text in texts))
    sent = [sorted(map(len, job.inputs)) for job in fleet.jobs]
    assert [len(job.inputs) for job in fleet.jobs] == [32, 32, 6]
    assert all(shorter[-1] <= longer[0] for shorter, longer in itertools.pairwise(sent))
    for text, result in zip(texts, results, strict=True):
        assert result.vector == pytest.approx(echo_vector(text), abs=1e-6)


async def test_what_fits_in_one_message_keeps_its_order(fleet: LocalFleet) -> None:
    texts = ["long " * n for n in range(5, 0, -1)]
    async with fleet.aclient() as client:
        await asyncio.gather(*(client.embed(text) for text in texts))
    assert [list(job.inputs) for job in fleet.jobs] == [texts]


async def test_a_lone_call_goes_at_once_and_alone(fleet: LocalFleet) -> None:
    async with fleet.aclient() as client:
        for n in range(3):
            await client.embed(f"text {n}")
    assert [len(job.inputs) for job in fleet.jobs] == [1, 1, 1]


async def test_kinds_do_not_mix(fleet: LocalFleet) -> None:
    async with fleet.aclient() as client:
        await asyncio.gather(
            client.embed("a"),
            client.embed("b", normalize=False),
            client.embed("c", lane="bulk"),
            client.classify("d"),
            client.embed("e"),
            client.embed("f", deadline_s=9),
        )
    assert sorted([*job.inputs] for job in fleet.jobs) == [["a", "e"], ["b"], ["c"], ["d"], ["f"]]


async def test_long_texts_do_not_pile_up_in_one_message(fleet: LocalFleet) -> None:
    async with fleet.aclient() as client:
        await asyncio.gather(*(client.embed(f"{n}" + "x" * 9_000) for n in range(8)))
    assert max(sum(map(len, job.inputs)) for job in fleet.jobs) <= seats.GROUP_CHARS


async def test_a_bad_input_is_its_callers_own_error(fleet: LocalFleet) -> None:
    async with fleet.aclient() as client:
        calls = [client.embed("fine"), client.embed(""), client.embed(FAIL), client.embed("fine too")]
        good, empty, failed, too = await asyncio.gather(*calls, return_exceptions=True)
    assert good.vector == pytest.approx(echo_vector("fine"), abs=1e-6)  # type: ignore[union-attr]
    assert too.vector == pytest.approx(echo_vector("fine too"), abs=1e-6)  # type: ignore[union-attr]
    assert isinstance(empty, InvalidInput)
    assert isinstance(failed, InferenceFailed)


async def test_a_cancelled_caller_leaves_the_others_their_answers(fleet: LocalFleet) -> None:
    fleet.hold()
    async with fleet.aclient() as client:
        calls = [asyncio.create_task(client.embed(f"text {n}")) for n in range(3)]
        while not fleet.jobs:
            await asyncio.sleep(0)
        calls[1].cancel()
        fleet.release()
        first, second, third = await asyncio.gather(*calls, return_exceptions=True)
        assert isinstance(second, asyncio.CancelledError)
        assert first.vector == pytest.approx(echo_vector("text 0"), abs=1e-6)  # type: ignore[union-attr]
        assert third.vector == pytest.approx(echo_vector("text 2"), abs=1e-6)  # type: ignore[union-attr]
        assert len(client._link().replies._book) == 0


async def test_a_failed_push_fails_each_caller_with_an_error_of_its_own(fleet: LocalFleet) -> None:
    async with fleet.aclient() as client:
        with fleet.full_queues():
            full = await asyncio.gather(*(client.embed(f"{n}") for n in range(3)), return_exceptions=True)
        with fleet.broker_down():
            down = await asyncio.gather(*(client.embed(f"{n}") for n in range(3)), return_exceptions=True)
    assert [type(error) for error in full] == [QueueFull] * 3
    assert [type(error) for error in down] == [BrokerUnavailable] * 3
    assert len({id(error) for error in full}) == 3


@pytest.mark.parametrize("step", ["look_up", "publish"])
async def test_an_error_that_is_not_ours_reaches_each_caller(
    fleet: LocalFleet, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """A library's TypeError, or a defect: nobody waits on for an answer that cannot come."""

    async def breaks(*_: object) -> None:
        raise TypeError("unexpected keyword")

    async with fleet.aclient() as client:
        await client.embed("warm")
        link = client._link()
        monkeypatch.setattr(*((link.singles, "_look_up") if step == "look_up" else (link, "publish")), breaks)
        calls = asyncio.gather(*(client.embed(f"{n}") for n in range(3)), return_exceptions=True)
        errors = await asyncio.wait_for(calls, 10)
    assert [type(error) for error in errors] == [CortexError] * 3
    assert all("TypeError: unexpected keyword" in str(error) for error in errors)


async def test_an_answer_that_cannot_be_read_reaches_its_caller(
    fleet: LocalFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: object) -> None:
        raise LookupError("no result")

    async with fleet.aclient() as client:
        monkeypatch.setattr(Order, "result", breaks)
        with pytest.raises(CortexError, match="LookupError: no result"):
            await asyncio.wait_for(client.embed("x"), 10)


async def test_every_caller_times_out(fleet: LocalFleet) -> None:
    fleet.hold()
    async with fleet.aclient() as client:
        calls = [client.embed(f"{n}", timeout_s=0.05) for n in range(3)]
        errors = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(error) for error in errors] == [ResultTimeout] * 3
        assert len(client._link().replies._book) == 0
        assert not client._link().singles._riding


async def test_closing_leaves_nobody_waiting(fleet: LocalFleet) -> None:
    fleet.hold()
    client = fleet.aclient()
    call = asyncio.create_task(client.embed("never"))
    while not fleet.jobs:
        await asyncio.sleep(0)
    await client.aclose()
    with pytest.raises(ClientClosed):
        await call


def test_threads_share_the_message_that_waits_behind_a_slow_publish(
    fleet: LocalFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = fleet.client()
    client.embed("warm")
    link = client._link()
    entered, go_on, real = threading.Event(), threading.Event(), link.publish

    def slow(*arguments: object) -> None:
        entered.set()
        assert go_on.wait(10)
        real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(link, "publish", slow)
    with ThreadPoolExecutor(21) as threads:
        first = threads.submit(client.embed, "first")
        assert entered.wait(10)
        others = {f"text {n}": threads.submit(client.embed, f"text {n}") for n in range(20)}
        pending = link.singles._pending
        poll_until(lambda: sum(len(seats) for _, seats in pending._kinds.values()) == 20, "twenty threads in line")
        go_on.set()
        assert first.result(10).vector == pytest.approx(echo_vector("first"), abs=1e-6)
        for text, future in others.items():
            assert future.result(10).vector == pytest.approx(echo_vector(text), abs=1e-6)
    assert [len(job.inputs) for job in fleet.jobs] == [1, 1, 20]


def test_a_thread_that_fails_leaves_no_seat_behind(fleet: LocalFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    client = fleet.client()
    client.embed("warm")
    singles = client._link().singles

    def breaks(*_: object) -> None:
        raise TypeError("unexpected keyword")

    with monkeypatch.context() as patch:
        patch.setattr(singles, "_look_up", breaks)
        with pytest.raises(TypeError):
            client.embed("lost")
    client.embed("next")
    assert [[*job.inputs] for job in fleet.jobs] == [["warm"], ["next"]]


def test_ctrl_c_in_the_thread_that_publishes_is_told_to_those_who_were_to_follow(
    fleet: LocalFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = fleet.client(timeout_s=60)
    client.embed("warm")
    link = client._link()
    singles, real = link.singles, link.publish
    published: list[object] = []

    def interrupted(*arguments: object) -> None:
        published.append(arguments)
        if len(published) == 1:
            raise KeyboardInterrupt
        real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(link, "publish", interrupted)
    kinds: list[dict[str, Any]] = [{}, {"lane": "bulk"}, {"normalize": False}]
    with ThreadPoolExecutor(3) as threads:
        with singles._publishing:
            calls = [threads.submit(client.embed, f"{n}", **kind) for n, kind in enumerate(kinds)]
            poll_until(lambda: len(singles._pending._kinds) == 3, "three kinds in line")
        errors = [call.exception(10) for call in calls]
    assert sorted(type(error).__name__ for error in errors) == ["CortexError", "CortexError", "KeyboardInterrupt"]
    assert len(published) == 1


def test_many_threads_never_cross(fleet: LocalFleet) -> None:
    client = fleet.client()

    def ask(thread: int) -> None:
        for n in range(50):
            text = f"{thread} asks {n}"
            assert client.embed(text).vector == pytest.approx(echo_vector(text), abs=1e-6)

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(ask, range(16)))
    assert sum(len(job.inputs) for job in fleet.jobs) == 800


def test_a_thread_that_gives_up_is_forgotten(fleet: LocalFleet) -> None:
    fleet.hold()
    client = fleet.client()
    with pytest.raises(ResultTimeout):
        client.embed("never", timeout_s=0.05)
    assert not client._link().singles._riding
    assert len(client._link().replies._book) == 0
