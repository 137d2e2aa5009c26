"""Answers are found: announced or not, lost or late, over a connection that breaks; and nothing is kept needlessly."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from cortex_tasks import codec
from cortex_tasks.codec import Heard
from cortex_tasks.errors import BrokerUnavailable, ModelError, ResultLost
from cortex_tasks.polling import LOOK_KEYS
from cortex_tasks.replies import (
    FETCH_KEYS,
    FIRST_POLL_S,
    LONGEST_POLL_S,
    AsyncReplies,
    Book,
    LoopTicket,
    Replies,
    ThreadTicket,
    Ticket,
)
from tests.support.worker_process import poll_until

DONE = codec.dumps({"status": "SUCCESS", "result": 1}).encode()  # type: ignore[union-attr]
STARTED = DONE.replace(b"SUCCESS", b"STARTED")


class Quiet(Ticket):
    __slots__ = ()

    def _wake(self) -> None: ...


def book_of(*ids: str, now: float = 100.0) -> tuple[Book, dict[str, Quiet]]:
    book, tickets = Book(), {job_id: Quiet(job_id) for job_id in ids}
    book.add(tickets.values(), now)
    return book, tickets


# ---------------------------------------------------------------------------------------------------- the book


def test_an_announced_answer_is_fetched_and_settles_its_ticket() -> None:
    book, tickets = book_of("a", "b")
    assert book.heard([("a", None), ("stranger", None)], 100.0) == ["a"]
    book.received(["a"], [DONE], 100.0, announced=True)
    assert tickets["a"].outcome == {"status": "SUCCESS", "result": 1}
    assert (tickets["b"].outcome, len(book)) == (None, 1)
    assert book.heard([("a", None)], 100.0) == []


def test_an_answer_that_its_announcement_carries_is_not_fetched() -> None:
    book, tickets = book_of("a", "b")
    assert book.heard([("a", DONE), ("stranger", DONE), ("b", None)], 100.0) == ["b"]
    assert tickets["a"].outcome == {"status": "SUCCESS", "result": 1}
    assert (tickets["b"].outcome, len(book)) == (None, 1)
    assert book.wait_s(100.0) == pytest.approx(0.05)


def test_a_carried_answer_that_nobody_can_read_is_an_outcome() -> None:
    book, tickets = book_of("a")
    assert book.heard([("a", b"torn")], 100.0) == []
    assert isinstance(tickets["a"].outcome, ModelError)


def test_polling_begins_soon_and_grows_rarer() -> None:
    book, _tickets = book_of("a")
    now, waits = 100.0, []
    for _ in range(8):
        waits.append(round(book.wait_s(now), 3))
        assert book.due(now + waits[-1] - 0.001) == []
        now += waits[-1]
        assert book.due(now) == ["a"]
        book.received(["a"], [None], now, announced=False)
    assert waits == [FIRST_POLL_S, 0.1, 0.2, 0.4, 0.8, LONGEST_POLL_S, LONGEST_POLL_S, LONGEST_POLL_S]


def test_announcements_put_polling_off_but_not_for_ever() -> None:
    """One of them may have been lost while the others go on."""
    book, tickets = book_of("lost", *map(str, range(100)))
    now = 100.0
    for number in range(100):
        now += 0.02
        due = book.due(now)
        if due:
            break
        book.received([str(number)], [DONE], now, announced=True)
    assert 100.0 + LONGEST_POLL_S <= now <= 100.0 + LONGEST_POLL_S + 0.05
    assert "lost" in due
    assert tickets["lost"].outcome is None


def test_after_a_reconnect_everything_is_looked_for_at_once() -> None:
    book, _tickets = book_of("a", "b")
    book.due(200.0)
    assert book.due(200.0) == []
    book.poll_now()
    assert sorted(book.due(200.0)) == ["a", "b"]


def test_of_thousands_a_look_takes_a_part_and_what_was_announced_in_vain() -> None:
    ids = [str(number) for number in range(20 * LOOK_KEYS)]
    book, _tickets = book_of(*ids)
    book.received([ids[-1]], [None], 100.0, announced=True)
    now, seen = 100.0, set[str]()
    for _ in range(40):
        now += LONGEST_POLL_S
        due = book.due(now)
        assert LOOK_KEYS <= len(due) <= LOOK_KEYS + 1
        assert due[0] == ids[-1]
        assert due[1] == ids[0], "who waits longest is looked for each time"
        book.received(due[1:], [None] * len(due[1:]), now, announced=False)
        seen |= set(due)
    assert len(seen) == len(ids), "everybody has a turn"
    book.poll_now()
    assert len(book.due(now)) == len(ids)


def test_while_looks_find_what_nobody_announced_the_next_one_comes_at_once() -> None:
    """As with a stock worker, which announces nothing."""
    ids = [str(number) for number in range(10 * LOOK_KEYS)]
    book, tickets = book_of(*ids)
    done, now = set(ids[: 3 * LOOK_KEYS]), 101.0
    looks = 0
    while due := book.due(now):
        looks += 1
        book.received(due, [DONE if job_id in done else None for job_id in due], now, announced=False)
    assert all(tickets[job_id].outcome for job_id in done)
    assert 3 <= looks <= 8
    assert book.wait_s(now) > 0


def test_an_answer_announced_but_gone_is_lost_after_a_second_look() -> None:
    book, tickets = book_of("a", "b")
    book.received(["a", "b"], [None, None], 100.0, announced=True)
    assert tickets["a"].outcome is None
    book.received(["a", "b"], [None, DONE], 101.0, announced=False)
    assert isinstance(tickets["a"].outcome, ResultLost)
    assert tickets["b"].outcome == {"status": "SUCCESS", "result": 1}


def test_a_job_that_has_merely_started_is_awaited_further() -> None:
    book, tickets = book_of("a")
    book.received(["a"], [STARTED], 100.0, announced=False)
    assert (tickets["a"].outcome, len(book)) == (None, 1)


@pytest.mark.parametrize("raw", [b"", b"CXP1", b"\xff\xfe", b"[]", b"{}", b"null", b"CXP1\x02\x00\x00\x00{}"])
def test_an_unreadable_answer_is_an_outcome_too(raw: bytes) -> None:
    book, tickets = book_of("a")
    book.received(["a"], [raw], 100.0, announced=True)
    assert isinstance(tickets["a"].outcome, ModelError)


def test_a_dropped_ticket_is_not_awaited_any_longer() -> None:
    book, tickets = book_of("a", "b")
    del tickets["a"]
    gc.collect()
    assert len(book) == 1
    assert book.due(200.0) == ["b"]


def test_an_idle_book_needs_nothing() -> None:
    book = Book()
    assert book.wait_s(5.0) == float("inf")
    book, tickets = book_of("a")
    book.received(["a"], [DONE], 100.0, announced=True)
    assert book.due(200.0) == []
    assert book.wait_s(200.0) == float("inf")
    assert tickets["a"].outcome


def test_only_the_first_outcome_counts() -> None:
    ticket = ThreadTicket("a")
    ticket.settle(ResultLost("first"))
    ticket.settle({"status": "SUCCESS"})
    assert isinstance(ticket.outcome, ResultLost)
    assert ticket.wait(0.0)


# -------------------------------------------------------------------------------------------- thread and task


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


def test_a_closed_one_starts_again_when_needed(wire: FakeWire) -> None:
    replies = Replies(wire, "me")  # type: ignore[arg-type]
    for job_id in "ab":
        ticket = ThreadTicket(job_id)
        wire.stored[job_id] = DONE
        replies.watch([ticket])
        assert ticket.wait(5)
        replies.close()
    assert (wire.listened, wire.unlistened) == (2, 2)


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


async def test_a_cancelled_wait_leaves_nothing_behind() -> None:
    ticket = LoopTicket("a")
    wait = asyncio.create_task(ticket.wait(60))
    await asyncio.sleep(0)
    wait.cancel()
    with pytest.raises(asyncio.CancelledError):
        await wait
    assert not await ticket.wait(0.0)
    assert ticket._waiters == []
    ticket.settle(ResultLost("gone"))
    assert await ticket.wait(0.0)
