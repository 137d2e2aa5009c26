"""Claims and entries in a real Redis."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import redis

from cortex_tasks.cache.breaker import Breaker
from cortex_tasks.cache.counters import Counters
from cortex_tasks.cache.frame import sealed
from cortex_tasks.cache.names import (
    BYTES,
    ENTRY_OVERHEAD_BYTES,
    INDEX,
    active_revision,
    entry_prefix,
    flight_prefix,
    model_key,
    owner_key,
    stats_key,
)
from workers.flights import FLIGHT_S, MINE, Entry, FlightTower, granted_bytes

KEY, OTHER = b"k" * 16, b"o" * 16


class Times:
    """Both clocks."""

    def __init__(self) -> None:
        self.now_s = 1_000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def times() -> Times:
    return Times()


@pytest.fixture
def raw(redis_url: str) -> Iterator[Any]:
    with redis.Redis.from_url(redis_url) as raw:
        yield raw


def tower_of(url: str, owner: str, times: Times, max_bytes: int = 10**9) -> FlightTower:
    client = redis.Redis.from_url(url)
    return FlightTower(client, owner, max_bytes, Breaker("redis", times), times, times)


def entry(key: bytes, size: int = 100, ttl_s: int = 600) -> Entry:
    return Entry("m", key, sealed(key, {"data": bytes(size), "truncated": False}), ttl_s)


def test_the_first_one_computes_and_the_other_waits_until_the_answer_is_there(redis_url: str, times: Times) -> None:
    one, other = tower_of(redis_url, "one", times), tower_of(redis_url, "other", times)
    assert one.look("m", [KEY, OTHER], "interactive") == [MINE, MINE]
    assert other.look("m", [KEY], "interactive") == [0]
    one.store([entry(KEY)])
    assert other.look("m", [KEY, OTHER], "interactive") == [entry(KEY).frame, 0]


def test_ones_own_claim_is_ones_own(redis_url: str, times: Times) -> None:
    one = tower_of(redis_url, "one", times)
    assert [one.look("m", [KEY], "interactive") for _ in range(2)] == [[MINE], [MINE]]


def test_a_dead_owners_claim_is_taken_over(redis_url: str, times: Times, raw: Any) -> None:
    tower_of(redis_url, "dead", times).look("m", [KEY], "interactive")
    raw.delete(owner_key("dead"))
    assert 0 < raw.ttl(flight_prefix("m") + KEY) <= FLIGHT_S
    assert tower_of(redis_url, "other", times).look("m", [KEY], "interactive") == [MINE]
    assert raw.get(flight_prefix("m") + KEY) == b"other i"


def test_the_sign_of_life_ends_by_itself_and_is_renewed(redis_url: str, times: Times, raw: Any) -> None:
    one = tower_of(redis_url, "one", times)
    one.look("m", [KEY], "interactive")
    assert 0 < raw.pttl(owner_key("one")) <= 2_000
    raw.delete(owner_key("one"))
    one.renew()
    assert not raw.exists(owner_key("one")), "it is not due"
    times.now_s += 0.6
    one.renew()
    assert raw.exists(owner_key("one"))
    one.land()
    assert not raw.exists(owner_key("one"))


def test_interactive_work_does_not_wait_for_bulk_but_bulk_waits_for_it(redis_url: str, times: Times) -> None:
    one, other = tower_of(redis_url, "one", times), tower_of(redis_url, "other", times)
    assert one.look("m", [KEY], "bulk") == [MINE]
    assert other.look("m", [KEY], "interactive") == [MINE]
    assert one.look("m", [KEY], "bulk") == [0]


def test_a_flight_is_given_up_without_an_answer_by_its_owner_only(redis_url: str, times: Times, raw: Any) -> None:
    one, other = tower_of(redis_url, "one", times), tower_of(redis_url, "other", times)
    one.look("m", [KEY], "interactive")
    other.store([Entry("m", KEY, b"", 1)])
    assert raw.exists(flight_prefix("m") + KEY)
    one.store([Entry("m", KEY, b"", 1)])
    assert not raw.exists(flight_prefix("m") + KEY)
    assert not raw.exists(entry_prefix("m") + KEY)


def test_an_entry_lives_as_long_as_it_should_and_is_counted_once(redis_url: str, times: Times, raw: Any) -> None:
    one = tower_of(redis_url, "one", times)
    for _ in range(2):
        one.store([entry(KEY, ttl_s=300)])
    assert 290 < raw.ttl(entry_prefix("m") + KEY) <= 300
    assert int(raw.get(BYTES)) == len(entry(KEY).frame) + ENTRY_OVERHEAD_BYTES
    assert raw.zcard(INDEX) == 1


def test_what_ends_next_is_dropped_while_there_is_too_much_and_queues_never_are(
    redis_url: str, times: Times, raw: Any
) -> None:
    raw.lpush("minilm", *[b"x" * 1_000] * 100)
    one = tower_of(redis_url, "one", times, max_bytes=20_000)
    keys = [b"%016d" % number for number in range(500)]
    one.store([entry(key, ttl_s=600 + number) for number, key in enumerate(keys)])
    assert one.trim() > 400
    assert int(raw.get(BYTES)) <= 20_000
    left = [key for key in keys if raw.exists(entry_prefix("m") + key)]
    assert left == keys[-len(left) :]
    assert raw.zcard(INDEX) == len(left)
    assert raw.llen("minilm") == 100


def test_what_has_ended_counts_no_more(redis_url: str, times: Times, raw: Any) -> None:
    one = tower_of(redis_url, "one", times)
    one.store([entry(b"%016d" % number) for number in range(300)])
    times.now_s += 601
    assert one.trim() == 0
    assert int(raw.get(BYTES)) == 0
    assert not raw.exists(INDEX)


@pytest.mark.parametrize(
    ("memory", "granted"),
    [
        ({"maxmemory": 0, "maxmemory_policy": "noeviction"}, 1_000),
        ({"maxmemory": 1_200, "maxmemory_policy": "noeviction"}, 600),
        ({"maxmemory": 1_200, "maxmemory_policy": "volatile-lru"}, 1_000),
        ({"maxmemory": 1_200, "maxmemory_policy": "allkeys-lru"}, 600),
        ({}, 1_000),
    ],
)
def test_half_of_a_redis_that_evicts_nothing_is_left_to_queues(memory: dict[str, Any], granted: int) -> None:
    assert granted_bytes(memory, 1_000) == granted


def test_a_full_redis_refuses_the_entry_and_the_flight_is_given_up_all_the_same(
    redis_url: str, times: Times, raw: Any
) -> None:
    one = tower_of(redis_url, "one", times)
    one.look("m", [KEY], "interactive")
    raw.config_set("maxmemory", 1)
    try:
        one.store([entry(KEY)])
        assert not raw.exists(flight_prefix("m") + KEY)
        assert one.look("m", [OTHER], "interactive") in ([MINE], None)
    finally:
        raw.config_set("maxmemory", 0)


def test_an_absent_redis_says_nothing(times: Times) -> None:
    one = tower_of("redis://127.0.0.1:1/0", "one", times)
    assert one.look("m", [KEY], "interactive") is None
    one.store([entry(KEY)])
    one.renew()
    one.land()
    assert one.trim() == 0


def test_a_revision_is_named_confirmed_and_handed_over(redis_url: str, times: Times, raw: Any) -> None:
    def active() -> str | None:
        return active_revision(raw.get(model_key("m")))

    old, new = tower_of(redis_url, "old", times), tower_of(redis_url, "new", times)
    old.activate("m", "r1", loaded=True)
    new.activate("m", "r2", loaded=True)
    old.activate("m", "r1", loaded=False)
    assert active() == "r2", "the one that was loaded last"
    times.now_s += 14
    new.activate("m", "r2", loaded=False)
    times.now_s += 14
    old.activate("m", "r1", loaded=False)
    assert active() == "r2"
    times.now_s += 2
    old.activate("m", "r1", loaded=False)
    assert active() == "r1", "nobody confirms the other any more"
    raw.set(model_key("m"), b"noise")
    old.activate("m", "r1", loaded=False)
    assert active() == "r1"


def test_counts_are_added_up(redis_url: str, times: Times, raw: Any) -> None:
    counters = Counters(times)
    one = tower_of(redis_url, "one", times)
    for _ in range(2):
        counters.add("m", stored=2, too_large=0)
        one.tell(counters)
    assert raw.hgetall(stats_key("m")) == {b"stored": b"4"}


def test_counts_that_cannot_be_told_are_kept(times: Times) -> None:
    counters = Counters(times)
    counters.add("m", stored=2)
    tower_of("redis://127.0.0.1:1/0", "one", times).tell(counters)
    assert counters.take() == {"m": {"stored": 2}}
