"""What is asked for often: samples are fair, the sets in Redis bounded, and heavy inputs are found."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cortex_tasks.cache.counters import Counters, tell
from cortex_tasks.cache.popular import (
    KEPT,
    SLOT_S,
    Kind,
    Sampler,
    Samples,
    Wanted,
    read_inputs,
    read_models,
    tell_samples,
)
from cortex_tasks.config import CacheWarming
from cortex_tasks.errors import InvalidInput
from cortex_tasks.payloads import Series

KIND = Kind("m", "embed", "{}")
NOW_S = 100.0 * SLOT_S


@pytest.fixture
def raw(redis_url: str) -> Iterator[Any]:
    with redis.Redis.from_url(redis_url) as raw:
        # Samples of the test's own time expire at once by the server's: EXPIREAT is put off.
        yield raw


def sampler(keep: int = 100, max_bytes: int = 200, seed: int = 1) -> Sampler:
    return Sampler(keep, max_bytes, random.Random(seed), lambda: NOW_S)


def member(text: str) -> bytes:
    return f'["embed","{{}}","{text}"]'.encode()


# -------------------------------------------------------------------------------------------------- the sample


def test_few_inputs_are_all_told_each_with_its_count() -> None:
    one = sampler()
    one.offer(KIND, ["a", "b", "a"])
    one.offer(KIND._replace(alias="n"), ["a"])
    assert one.take() == Samples(NOW_S, 100, {"m": {member("a"): 2, member("b"): 1}, "n": {member("a"): 1}})
    assert one.take().weights == {}


@given(st.lists(st.integers(1, 700), min_size=1, max_size=8), st.integers(0, 1_000))
@settings(max_examples=50)
def test_however_many_come_as_many_are_kept_and_they_stand_for_all(sizes: list[int], seed: int) -> None:
    one = sampler(seed=seed)
    for batch, size in enumerate(sizes):
        one.offer(KIND, [f"{batch} {number}" for number in range(size)])
    assert len(one._kept) == min(KEPT, sum(sizes))
    assert sum(one.take().weights["m"].values()) == pytest.approx(sum(sizes))


def test_each_input_is_as_likely_as_any_other() -> None:
    """Of 20,000 inputs, a third of them one text, in batches and one by one: its weight is near the third, and early
    inputs are sampled as often as late ones."""
    shares, halves = [], Counter[bool]()
    for seed in range(40):
        one = sampler(seed=seed)
        for number in range(0, 20_000, 100):
            batch = ["often" if at % 3 == 0 else f"{number + at}" for at in range(100)]
            if number % 200:
                one.offer(KIND, batch)
            else:
                for value in batch:
                    one.offer(KIND, (value,))
        halves.update(int(value) < 10_000 for _, value in one._kept if value != "often")
        shares.append(one.take().weights["m"][member("often")] / 20_000)
    assert sum(shares) / len(shares) == pytest.approx(0.34, abs=0.03)
    assert halves[True] / halves.total() == pytest.approx(0.5, abs=0.05)


def test_random_numbers_at_the_edges_do_no_harm() -> None:
    class Edge(random.Random):
        value = 0.0

        def random(self) -> float:
            return self.value

    for value in (0.0, 1.0 - 2**-53, 2**-53):
        edge = Edge(1)
        edge.value = value
        one = Sampler(10, 100, edge, lambda: NOW_S)
        one.offer(KIND, ["a"] * 5_000)
        assert sum(one.take().weights["m"].values()) == pytest.approx(5_000)


def test_long_and_refused_inputs_are_not_told() -> None:
    one = sampler(max_bytes=60)
    series = Series(ds=("2024-01-01", "2024-01-02"), y=(1.0, 2.0))
    one.offer(KIND, ["a" * 44, "é" * 22, "a" * 43, "é" * 21, InvalidInput("bad"), series])
    assert list(one.take().weights["m"]) == [member("a" * 43), member("é" * 21)]


def test_nothing_is_sampled_where_nothing_is_warmed() -> None:
    assert Sampler.of(None) is None
    assert Sampler.of(CacheWarming(schedule="0 * * * *", inputs=10)) is not None


# --------------------------------------------------------------------------------------------- the fleet's sets


def told(raw: Any, weights: dict[str, dict[bytes, float]], keep: int = 100, at_s: float | None = None) -> None:
    now_s = raw.time()[0] if at_s is None else at_s
    with raw.pipeline(transaction=False) as pipe:
        tell_samples(pipe, Samples(now_s, keep, weights))
        pipe.execute()


streams = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 20)), min_size=1, max_size=80)


@given(streams, st.integers(2, 12))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_the_heaviest_are_kept_within_the_bound_and_no_weight_is_far_off(
    raw: Any, stream: list[tuple[int, int]], keep: int
) -> None:
    """Space-Saving's promise, of the script that runs in Redis."""
    raw.flushdb()
    now_s = raw.time()[0]
    true: Counter[bytes] = Counter()
    for number, weight in stream:
        true[b"%d" % number] += weight
        told(raw, {"m": {b"%d" % number: float(weight)}}, keep, now_s)
    [key] = raw.keys("cortex:cache:popular:*:m")
    found = dict(raw.zrange(key, 0, -1, withscores=True))
    bound = true.total() / keep
    assert len(found) <= keep
    assert {name for name, weight in true.items() if weight > bound} <= found.keys()
    assert all(true[name] <= weight <= true[name] + bound for name, weight in found.items())
    assert sum(found.values()) == pytest.approx(true.total())


def test_heavy_inputs_of_a_long_tail_are_found_through_samples(raw: Any) -> None:
    """Zipf's stream of 200,000 inputs, sampled by four processes: the ten most frequent are among the twenty told."""
    choose, now_s = random.Random(5), raw.time()[0]
    ranks = range(1, 20_001)
    weights = [1 / rank for rank in ranks]
    processes = [Sampler(200, 200, random.Random(n), lambda: now_s) for n in range(4)]
    for number, one in enumerate(processes * 25):
        one.offer(KIND, [f"text {rank}" for rank in choose.choices(ranks, weights, k=2_000)])
        with raw.pipeline(transaction=False) as pipe:
            tell_samples(pipe, one.take())
            pipe.execute()
        assert number < 100
    found = read_inputs(raw, "m", now_s, 20)
    assert {f"text {rank}" for rank in range(1, 11)} <= {wanted.value for wanted in found}
    [key] = raw.keys("cortex:cache:popular:*:m")
    assert raw.zcard(key) <= 200


def test_the_last_hour_counts_and_older_times_do_not(raw: Any) -> None:
    slot = raw.time()[0] // SLOT_S * SLOT_S
    told(raw, {"m": {member("old"): 100}, "old": {member("a"): 500}}, at_s=slot - 3 * SLOT_S)
    told(raw, {"m": {member("a"): 3, member("b"): 4}}, at_s=slot - SLOT_S)
    told(raw, {"m": {member("a"): 2}, "n": {member("a"): 1}}, at_s=slot)
    assert read_inputs(raw, "m", slot, 10) == [Wanted("embed", "{}", "a"), Wanted("embed", "{}", "b")]
    assert read_inputs(raw, "m", slot, 1) == [Wanted("embed", "{}", "a")]
    assert read_models(raw, slot, 5) == ["m", "n"]
    assert read_models(raw, slot, 1) == ["m"]


def test_the_sets_end_by_themselves(raw: Any) -> None:
    told(raw, {"m": {member("a"): 1}})
    names = raw.keys("cortex:cache:popular:*")
    assert len(names) == 2
    assert all(2 * SLOT_S < raw.ttl(name) <= 3 * SLOT_S for name in names)


@pytest.mark.parametrize("strange", ["", "{}", "[1,2]", '["embed","{}",7]', '["nothing","{}","a"]', '["embed",{},"a"]'])
def test_what_cannot_be_read_is_left_out(raw: Any, strange: str) -> None:
    told(raw, {"m": {strange.encode(): 9, member("a"): 1}})
    assert read_inputs(raw, "m", raw.time()[0], 10) == [Wanted("embed", "{}", "a")]


def test_a_series_comes_back(raw: Any) -> None:
    one = Sampler(10, 1_000, wall_clock=lambda: raw.time()[0])
    one.offer(Kind("m", "forecast", "{}"), [Series(ds=("2024-01-01", "2024-01-02"), y=(1.5, 2.0))])
    told(raw, one.take().weights)
    [wanted] = read_inputs(raw, "m", raw.time()[0], 10)
    assert wanted.value == {"ds": ["2024-01-01", "2024-01-02"], "y": [1.5, 2.0]}


def test_samples_travel_with_the_counts(raw: Any) -> None:
    counters = Counters(sampler=Sampler(10, 100, wall_clock=lambda: raw.time()[0]))
    counters.add("m", l2_hits=1)
    assert counters.sampler is not None
    counters.sampler.offer(KIND, ["a"])
    with raw.pipeline(transaction=False) as pipe:
        tell(pipe, counters.take())
        pipe.execute()
    assert read_models(raw, raw.time()[0], 3) == ["m"]
    assert raw.hgetall("cortex:cache:stats:m") == {b"l2_hits": b"1"}


def test_a_full_redis_takes_no_samples_and_the_counts_arrive(raw: Any) -> None:
    counters = Counters(sampler=Sampler(10, 100, wall_clock=lambda: raw.time()[0]))
    assert counters.sampler is not None
    counters.sampler.offer(KIND, ["a"])
    before = raw.config_get("maxmemory")["maxmemory"]
    raw.config_set("maxmemory", 1)
    try:
        with raw.pipeline(transaction=False) as pipe:
            tell_samples(pipe, counters.take().samples or Samples(0, 0, {}))
            replies = pipe.execute(raise_on_error=False)
    finally:
        raw.config_set("maxmemory", before)
    assert len(replies) == 1
    assert raw.keys("cortex:cache:popular:*") == []
