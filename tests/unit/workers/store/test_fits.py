"""Small results that are kept: in memory by bytes, in Redis for the others; losing one is a miss."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis

from workers.store.counters import Counters
from workers.store.fits import Fits
from workers.store.l2 import L2


@pytest.fixture
def l2(redis_url: str) -> Iterator[L2]:
    with redis.Redis.from_url(redis_url) as client:
        yield L2(client, max_bytes=10**6, ttl_s=100)


def test_what_one_worker_kept_another_recalls(l2: L2) -> None:
    counters = Counters()
    Fits(l2, 1_000, Counters()).keep("key", b"fitted")
    other = Fits(l2, 1_000, counters)
    assert other.recall("key") == b"fitted"
    l2.drop("fit:key")
    assert other.recall("key") == b"fitted", "it is in memory now"
    assert other.recall("unheard") is None
    fits = counters.card(memory_bytes=0, memory_limit_bytes=0).tiers["fits"]
    assert (fits.hits, fits.misses) == (2, 1)


def test_memory_is_bounded_and_the_longest_unused_go() -> None:
    fits = Fits(None, 10, Counters())
    for key in ("a", "b"):
        fits.keep(key, key.encode() * 4)
    assert fits.recall("a") == b"aaaa"
    fits.keep("c", b"cccc")
    assert (fits.recall("a"), fits.recall("b"), fits.recall("c")) == (b"aaaa", None, b"cccc")
    fits.keep("large", b"x" * 11)
    fits.keep("a", b"A")
    assert fits.used_bytes == 5


def test_a_redis_that_does_not_answer_is_a_miss() -> None:
    nobody = L2(redis.Redis(port=1, socket_connect_timeout=1), max_bytes=10**6, ttl_s=100)
    fits = Fits(nobody, 100, Counters())
    assert fits.recall("key") is None
    fits.keep("key", b"fitted")
    assert fits.recall("key") == b"fitted"
