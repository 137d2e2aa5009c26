"""Near memory: bounded in bytes and time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from cortex_tasks.cache.near import Near, weigh
from cortex_tasks.payloads import Document, Embedding, Timings, Token


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_the_longest_unused_leaves_first(clock: Clock) -> None:
    near = Near(20_000, 60, clock)
    for name in (b"a", b"b", b"c"):
        near.put(name, name, 1_000, 0)
    near.get(b"a", 0)
    while near.evicted == 0:
        near.put(b"more%d" % len(near), 0, 1_000, 0)
    assert near.get(b"a", 0) == b"a"
    assert near.get(b"b", 0) is None
    assert near.size_bytes <= near.max_bytes


def test_bytes_are_bounded_whatever_comes(clock: Clock) -> None:
    near = Near(50_000, 60, clock)
    for number in range(500):
        near.put(b"%d" % (number % 70), number, number * 13 % 4_000, 0)
        assert near.size_bytes <= 50_000
    for number in range(70):
        near.discard(b"%d" % number)
    assert near.size_bytes == 0 == len(near)


def test_one_large_answer_does_not_push_out_all_others(clock: Clock) -> None:
    near = Near(50_000, 60, clock)
    near.put(b"small", 1, 10, 0)
    near.put(b"large", 2, 40_000, 0)
    assert near.get(b"small", 0) == 1
    assert near.get(b"large", 0) is None


def test_an_entry_ends_with_its_time(clock: Clock) -> None:
    near = Near(50_000, 60, clock)
    near.put(b"a", 1, 10, 0)
    clock.now_s += 60
    assert near.get(b"a", 0) == 1
    clock.now_s += 1
    assert near.get(b"a", 0) is None
    assert near.size_bytes == 0


def test_an_entry_of_an_older_stamp_is_gone(clock: Clock) -> None:
    near = Near(50_000, 60, clock)
    near.put(b"a", 1, 10, stamp=0)
    assert near.get(b"a", stamp=1) is None
    assert near.get(b"a", stamp=0) is None


def test_threads_share_it(clock: Clock) -> None:
    near = Near(30_000, 60, clock)

    def work(thread: int) -> None:
        for number in range(2_000):
            near.put(b"%d" % (number % 50), thread, 500, 0)
            near.get(b"%d" % (number % 37), 0)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))
    assert near.size_bytes <= 30_000
    near.clear()
    assert near.size_bytes == 0


def test_a_weight_grows_with_what_is_in_an_answer() -> None:
    fixed = {"model": "m", "revision": "r", "timings": Timings()}
    assert weigh(Embedding(data=bytes(1536), **fixed)) > 1536
    tokens = tuple(Token(text=f"token {n}", start=n, end=n) for n in range(100))
    assert weigh(Document(tokens=tokens, **fixed)) > 100 * 500
