"""Answers are heard or polled for by a thread and by a task, also over a connection that breaks."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import pytest

from cortex_tasks import codec
from cortex_tasks.book import LoopTicket, ThreadTicket, Ticket
from cortex_tasks.codec import Heard
from cortex_tasks.errors import BrokerUnavailable, ClientClosed
from cortex_tasks.replies import FETCH_KEYS, AsyncReplies, Replies
from tests.support.worker_process import poll_until

DONE = codec.dumps({"status": "SUCCESS", "result": 1}).encode()  # type: ignore[union-attr]


class FakeWire:
    """The part of a wire that listens; ``heard`` is announced, ``stored`` is fetched, ``down`` breaks it."""

    def __init__(self) -> None:
        self.stored: dict[str, bytes] = {}
        self.heard: list[str | Heard] = []
        self.down = False
        self.listened = 0
        self.unlistened = 0
        self.fetched: list[int] = []

    def listen(self, channel: str) -> None:
        self._check()
        self.listened += 1

    def receive(self, timeout_s: float) -> list[Heard]:
        self._check()
        heard, self.heard = self.heard, []
        if not heard:
            threading.Event().wait(min(timeout_s, 0.002))
        return [(one, None) if isinstance(one, str) else one for one in heard]

    def fetch(self, job_ids: Sequence[str]) -> list[bytes | None]:
        self._check()
        self.fetched.append(len(job_ids))
        return [self.stored.get(job_id) for job_id in job_ids]

    def unlisten(self) -> None:
        self.unlistened += 1

    def _check(self) -> None:
        if self.down:
            raise BrokerUnavailable("down")


class FakeAsyncWire:
    """``FakeWire`` as coroutines."""

    def __init__(self, wire: FakeWire) -> None:
        self._wire = wire
        self.tell: Callable[[list[Heard]], None]
        self.lose: Callable[[BrokerUnavailable], None]

    async def listen(
        self, channel: str, heard: Callable[[list[Heard]], None], lost: Callable[[BrokerUnavailable], None]
    ) -> None:
        self._wire.listen(channel)
        self.tell, self.lose = heard, lost

    def __getattr__(self, name: str) -> Callable[..., Any]:
        async def call(*args: Any) -> Any:
            return getattr(self._wire, name)(*args)

        return call


class Broken(Ticket):
    """Whoever waits for it cannot take its answer."""

    __slots__ = ("_error",)

    def __init__(self, job_id: str, error: type[BaseException] = KeyError) -> None:
        super().__init__(job_id)
        self._error = error

    def _wake(self) -> None:
        raise self._error("a ticket's defect")


@pytest.fixture
def wire() -> FakeWire:
    return FakeWire()


def test_an_announcement_wakes_whoever_waits(wire: FakeWire) -> None:
    replies = Replies(wire, "me", clock=lambda: 0.0)  # type: ignore[arg-type]
    ticket = ThreadTicket("a")
    replies.watch([ticket])
    wire.stored["a"] = DONE
    wire.heard.append("a")
    assert ticket.wait(5)
    replies.close()
    assert (wire.listened, wire.unlistened) == (1, 1)


def test_an_answer_that_nobody_announced_is_polled_for(wire: FakeWire) -> None:
    replies = Replies(wire, "me")  # type: ignore[arg-type]
    ticket = ThreadTicket("a")
    wire.stored["a"] = DONE
    replies.watch([ticket])
    assert ticket.wait(5)
    replies.close()


def test_many_answers_are_fetched_in_bounded_round_trips(wire: FakeWire) -> None:
    replies = Replies(wire, "me", clock=lambda: 0.0)  # type: ignore[arg-type]
    tickets = [ThreadTicket(str(number)) for number in range(FETCH_KEYS * 2 + 1)]
    wire.stored = {ticket.id: DONE for ticket in tickets}
    wire.heard = list(wire.stored)
    replies.watch(tickets)
    assert all(ticket.wait(5) for ticket in tickets)
    replies.close()
    assert sorted(wire.fetched) == [1, FETCH_KEYS, FETCH_KEYS]


def test_a_broken_connection_is_mended_and_what_was_missed_is_found(wire: FakeWire) -> None:
    replies = Replies(wire, "me")  # type: ignore[arg-type]
    ticket = ThreadTicket("a")
    replies.watch([ticket])
    wire.down = True
    poll_until(lambda: replies.down, "the broken connection is noticed")
    wire.stored["a"] = DONE
    wire.down = False
    assert ticket.wait(5)
    poll_until(lambda: replies.down is None, "the mended connection is noticed")
    assert wire.listened == 2
    replies.close()


def test_watching_without_a_connection_fails_at_once(wire: FakeWire) -> None:
    wire.down = True
    with pytest.raises(BrokerUnavailable):
        Replies(wire, "me").watch([ThreadTicket("a")])  # type: ignore[arg-type]


class CountingLock:
    """A lock that knows how often it was wanted."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.wanted = 0

    def __enter__(self) -> bool:
        self.wanted += 1
        return self._lock.__enter__()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lock, name)


def test_who_waits_while_subscribing_fails_is_told_so_and_does_not_try_in_turn(
    wire: FakeWire, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis hangs: each try takes a whole time-out."""
    replies = Replies(wire, "me")  # type: ignore[arg-type]
    lock, tries, errors = CountingLock(), [], []
    replies._changed = threading.Condition(lock)  # type: ignore[arg-type]

    def hang(channel: str) -> None:
        tries.append(channel)
        poll_until(lambda: lock.wanted >= 3, "everybody waits")
        raise BrokerUnavailable("hangs")

    def ask() -> None:
        try:
            replies.watch([ThreadTicket("a")])
        except BrokerUnavailable as error:
            errors.append(error)

    monkeypatch.setattr(wire, "listen", hang)
    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(tries), [str(error) for error in errors]) == (1, ["hangs"] * 3)
    assert len({id(error) for error in errors}) == 3, "each its own, with a traceback of its own"
    ask()
    assert len(tries) == 2, "who comes later tries anew"


async def test_coroutines_that_wait_meanwhile_are_told_so_too(wire: FakeWire) -> None:
    over, tries, gate = FakeAsyncWire(wire), [], asyncio.Event()
    replies = AsyncReplies(over, "me")  # type: ignore[arg-type]

    async def hang(channel: str, *_: Any) -> None:
        tries.append(channel)
        await gate.wait()
        raise BrokerUnavailable("hangs")

    over.listen = hang  # type: ignore[method-assign]
    asked = [asyncio.create_task(replies.watch([LoopTicket("a")])) for _ in range(3)]
    await asyncio.sleep(0)
    gate.set()
    errors = await asyncio.gather(*asked, return_exceptions=True)
    assert (len(tries), [str(error) for error in errors]) == (1, ["hangs"] * 3)
    with pytest.raises(BrokerUnavailable):
        await replies.watch([LoopTicket("b")])
    assert len(tries) == 2


def test_a_closed_one_leaves_nobody_waiting_and_takes_nobody_more(wire: FakeWire) -> None:
    replies = Replies(wire, "me")  # type: ignore[arg-type]
    replies.watch([ticket := ThreadTicket("a")])
    replies.close()
    assert ticket.wait(5)
    assert isinstance(ticket.outcome, ClientClosed)
    with pytest.raises(ClientClosed):
        replies.watch([ThreadTicket("b")])
    assert (wire.listened, wire.unlistened, replies._thread) == (1, 1, None)


async def test_a_closed_task_leaves_nobody_waiting_and_takes_nobody_more(wire: FakeWire) -> None:
    replies = AsyncReplies(FakeAsyncWire(wire), "me")  # type: ignore[arg-type]
    await replies.watch([ticket := LoopTicket("a")])
    await replies.close()
    assert await ticket.wait(5)
    assert isinstance(ticket.outcome, ClientClosed)
    with pytest.raises(ClientClosed):
        await replies.watch([LoopTicket("b")])
    assert wire.listened == 1


def test_a_thread_that_the_system_refused_is_started_by_the_next_call(
    wire: FakeWire, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    replies, other = Replies(wire, "me"), Replies(wire, "other")  # type: ignore[arg-type]
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        for one in (replies, other):
            with pytest.raises(RuntimeError):
                one.watch([ThreadTicket("refused")])
    other.close()
    wire.stored["a"] = DONE
    replies.watch([ticket := ThreadTicket("a")])
    assert ticket.wait(1.0)
    replies.close()


def test_an_answer_that_breaks_its_ticket_is_not_the_end_of_the_others(
    wire: FakeWire, caplog: pytest.LogCaptureFixture
) -> None:
    replies = Replies(wire, "me")  # type: ignore[arg-type]
    broken, neighbour, later = Broken("a"), ThreadTicket("b"), ThreadTicket("c")
    wire.stored = dict.fromkeys("abc", DONE)
    replies.watch([broken, neighbour])
    assert neighbour.wait(1.0)
    replies.watch([later])
    assert later.wait(1.0)
    assert "a ticket's defect" in caplog.text
    replies.close()


async def test_the_task_outlives_such_an_answer_too(wire: FakeWire) -> None:
    replies = AsyncReplies(FakeAsyncWire(wire), "me")  # type: ignore[arg-type]
    broken, neighbour = Broken("a"), LoopTicket("b")
    wire.stored = dict.fromkeys("ab", DONE)
    await replies.watch([broken, neighbour])
    assert await neighbour.wait(1.0)
    await replies.close()


def test_a_thread_that_ended_is_replaced(wire: FakeWire, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    replies = Replies(wire, "me")  # type: ignore[arg-type]
    wire.stored["a"] = DONE
    replies.watch([broken := Broken("a", SystemExit)])
    assert broken
    assert replies._thread is not None
    replies._thread.join(1.0)
    wire.stored["b"] = DONE
    replies.watch([ticket := ThreadTicket("b")])
    assert ticket.wait(1.0)
    replies.close()


async def test_the_task_hears_polls_and_mends_too(wire: FakeWire) -> None:
    over = FakeAsyncWire(wire)
    replies = AsyncReplies(over, "me")  # type: ignore[arg-type]
    carried, first, second, third = (LoopTicket(name) for name in ("carried", "a", "b", "c"))
    await replies.watch([carried, first, second, third])
    over.tell([("carried", DONE)])
    assert carried.outcome, "at once, in the same turn"
    wire.stored["a"] = DONE
    over.tell([("a", None), ("stranger", None)])
    assert await first.wait(5)
    wire.stored["b"] = DONE
    assert await second.wait(5)
    wire.down = True
    over.lose(BrokerUnavailable("gone"))
    async with asyncio.timeout(5):
        while replies.down is None:
            await asyncio.sleep(0)
    wire.stored["c"] = DONE
    wire.down = False
    assert await third.wait(5)
    await replies.close()
    assert wire.listened == 2


async def test_the_task_of_an_idle_client_sleeps_until_it_is_wanted(wire: FakeWire) -> None:
    over = FakeAsyncWire(wire)
    replies = AsyncReplies(over, "me")  # type: ignore[arg-type]
    for name in ("a", "b"):
        ticket = LoopTicket(name)
        await replies.watch([ticket])
        wire.stored[name] = DONE
        over.tell([(name, None)])
        assert await ticket.wait(5)
        async with asyncio.timeout(5):
            while not replies._idle:
                await asyncio.sleep(0)
    fetched = len(wire.fetched)
    for _ in range(100):
        await asyncio.sleep(0)
    assert len(wire.fetched) == fetched
    await replies.close()


@pytest.mark.parametrize("at", ["fetch", "listen"])
async def test_a_cancellation_that_redis_py_loses_ends_the_task_all_the_same(wire: FakeWire, at: str) -> None:
    """Python 3.11's wait_for loses one that comes as what it awaits is done; asyncio.run cancels only once."""
    over = FakeAsyncWire(wire)
    replies = AsyncReplies(over, "me")  # type: ignore[arg-type]
    await replies.watch([ticket := LoopTicket("a")])
    task = replies._task
    assert task is not None

    async def lose_it(*_: Any) -> list[bytes | None]:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(0)
        return [DONE]

    setattr(over, at, lose_it)
    if at == "fetch":
        over.tell([("a", None)])
    else:
        replies.forget([ticket])
        over.lose(BrokerUnavailable("gone"))
    assert await asyncio.wait({task}, timeout=1.0) == ({task}, set())
    await replies.close()
