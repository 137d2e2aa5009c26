"""Which answers are looked for, and when: announced or not, lost or late; and nothing is kept needlessly."""

from __future__ import annotations

import asyncio
import gc

import pytest

from cortex_tasks import codec
from cortex_tasks.book import FIRST_POLL_S, LONGEST_POLL_S, Book, LoopTicket, ThreadTicket, Ticket
from cortex_tasks.errors import ModelError, ResultLost
from cortex_tasks.polling import LOOK_KEYS

DONE = codec.dumps({"status": "SUCCESS", "result": 1}).encode()  # type: ignore[union-attr]
STARTED = DONE.replace(b"SUCCESS", b"STARTED")


class Quiet(Ticket):
    __slots__ = ()

    def _wake(self) -> None: ...


def book_of(*ids: str, now: float = 100.0) -> tuple[Book, dict[str, Quiet]]:
    book, tickets = Book(), {job_id: Quiet(job_id) for job_id in ids}
    book.add(tickets.values(), now)
    return book, tickets


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


@pytest.mark.parametrize(
    "raw", [b"", b"CXP1", b"\xff\xfe", b"[]", b"{}", b"null", b"CXP1\x02\x00\x00\x00{}", b'{"status":"SUCCESS"}']
)
def test_an_unreadable_answer_is_an_outcome_too(raw: bytes) -> None:
    book, tickets = book_of("a")
    book.received(["a"], [raw], 100.0, announced=True)
    assert isinstance(tickets["a"].outcome, ModelError)


def test_a_dropped_ticket_is_not_awaited_any_longer() -> None:
    book, tickets = book_of("a", "b")
    del tickets["a"]
    gc.collect()
    assert book.due(200.0) == ["b"]
    assert len(book) == 1
    book.received(["b"], [DONE], 200.0, announced=False)
    assert book.due(300.0) == []
    assert book.wait_s(300.0) == float("inf")


def test_thousands_of_dropped_tickets_are_forgotten_in_looks_that_follow_at_once() -> None:
    book, tickets = book_of(*(f"t{number}" for number in range(10 * LOOK_KEYS)))
    held = tickets.pop("t7")
    tickets.clear()
    gc.collect()
    looks = 0
    while len(book) > 1:
        assert set(book.due(200.0)) <= {held.id}
        looks += 1
    assert looks <= 25
    book.due(200.0)
    assert book.wait_s(200.0) > 0


def test_the_answer_to_a_dropped_ticket_is_nobodys() -> None:
    book, tickets = book_of("a")
    del tickets["a"]
    gc.collect()
    assert book.heard([("a", DONE)], 100.0) == []
    book.poll_now()
    assert (book.due(100.0), len(book)) == ([], 0)


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
