"""What becomes of answers that the cache does not take."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import redis

from cortex_tasks.cache.breaker import LONGEST_PAUSE_S, Breaker
from cortex_tasks.cache.frame import sealed
from cortex_tasks.cache.names import entry_prefix
from workers.flights import ALIVE_S, MINE, Entry, FlightTower
from workers.ledger import MOST_BYTES, Ledger

KEY, OTHER = b"k" * 16, b"o" * 16


class Times:
    def __init__(self) -> None:
        self.now_s = 1_000.0

    def __call__(self) -> float:
        return self.now_s


class Lines:
    """A client whose commands can be cut off."""

    def __init__(self, url: str) -> None:
        self.client = redis.Redis.from_url(url)
        self.cut = False

    def pipeline(self, transaction: bool) -> Any:
        if self.cut:
            raise redis.TimeoutError("Timeout reading from socket")
        return self.client.pipeline(transaction=transaction)


class Bench:
    """The ledger of one worker, and another worker that waits for its answers."""

    def __init__(self, url: str) -> None:
        self.times = Times()
        self.lines = Lines(url)
        self.tower = self._tower(self.lines, "first")
        self.ledger = Ledger(self.tower, self.times)
        self.other = self._tower(redis.Redis.from_url(url), "second")

    def _tower(self, client: Any, owner: str) -> FlightTower:
        return FlightTower(client, owner, 10**9, Breaker("redis", self.times), self.times, self.times)

    def found(self) -> Any:
        """What the other worker finds."""
        return (self.other.look("m", [KEY], "interactive") or [None])[0]


@pytest.fixture
def bench(redis_url: str) -> Bench:
    return Bench(redis_url)


@pytest.fixture
def raw(redis_url: str) -> Iterator[Any]:
    with redis.Redis.from_url(redis_url) as raw:
        yield raw


def entry(size_bytes: int = 100) -> Entry:
    return Entry("m", KEY, sealed(KEY, {"data": bytes(size_bytes), "truncated": False}), 600)


def test_an_answer_that_could_not_be_stored_is_stored_when_the_cache_answers_again(bench: Bench) -> None:
    assert bench.tower.look("m", [KEY], "interactive") == [MINE]
    bench.ledger.keep([entry()])
    bench.lines.cut = True
    bench.ledger.store_left(0.0)
    assert bench.ledger.waiting
    assert bench.found() == 0, "the claim stands"
    bench.lines.cut = False
    bench.times.now_s += LONGEST_PAUSE_S
    bench.ledger.store_left(0.0)
    assert bench.found() == entry().frame
    assert not bench.ledger.waiting


def test_what_goes_along_with_results_meanwhile_is_not_lost_either(bench: Bench, raw: Any) -> None:
    bench.lines.cut = True
    bench.ledger.keep([entry()])
    bench.ledger.store_left(0.0)
    with raw.pipeline(transaction=False) as pipe:
        assert bench.ledger.board(pipe) == 1
        bench.ledger.arrived(pipe.execute(raise_on_error=False))
    assert bench.found() == entry().frame


def test_answers_dropped_for_want_of_room_free_their_flights(bench: Bench, raw: Any) -> None:
    assert bench.tower.look("m", [KEY], "interactive") == [MINE]
    bench.lines.cut = True
    bench.ledger.keep([entry(MOST_BYTES)])
    bench.ledger.store_left(0.0)
    assert not bench.ledger.waiting
    assert_taken_over(bench, raw)


def test_answers_that_redis_refuses_free_their_flights(
    bench: Bench, raw: Any, caplog: pytest.LogCaptureFixture
) -> None:
    assert bench.tower.look("m", [KEY], "interactive") == [MINE]
    bench.ledger.keep([entry()])
    with raw.pipeline(transaction=False) as pipe:
        assert bench.ledger.board(pipe) == 1
        for _ in range(100):
            bench.ledger.arrived([redis.ResponseError("OOM command not allowed")])
    assert caplog.text.count("OOM command not allowed") == 1, "one line, however often it happens"
    assert bench.tower.look("m", [OTHER], "interactive") is None, "the cache is skipped"
    assert_taken_over(bench, raw)


def assert_taken_over(bench: Bench, raw: Any) -> None:
    """The other one computes as soon as the claim's owner counts as dead, though the worker lives and goes on."""
    assert bench.found() == 0
    bench.lines.cut = False
    bench.times.now_s += LONGEST_PAUSE_S
    bench.tower.renew()
    # Redis' own clock, which cannot be moved, would end the old name's sign of life in ALIVE_S.
    (old,) = [name for name in raw.scan_iter(match="*first") if raw.pttl(name) > 0]
    assert raw.pttl(old) <= ALIVE_S * 1000
    raw.delete(old)
    assert bench.found() == MINE
    assert bench.tower.look("m", [OTHER], "interactive") == [MINE]
    assert bench.other.look("m", [OTHER], "interactive") == [0], "new claims count"
    assert not raw.exists(entry_prefix("m") + KEY)
