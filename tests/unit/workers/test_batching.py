"""The batcher: urgency, lanes, length, budget; nothing lost, nothing twice."""

from __future__ import annotations

import math
from itertools import cycle
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.batching import (
    BRIEF_AFTER,
    INTERACTIVE_STREAK,
    OVERTAKING_STREAK,
    Ahead,
    Batcher,
    Budget,
    Group,
    Waiting,
)

EMBED = Group("minilm", "embed", "{}")
OTHER = Group("minilm", "embed", '{"normalize":false}')


def limits(items: int = 64, padded: int = 10_000) -> Budget:
    return Budget(items, padded)


def drain(batcher: Batcher[int], limit: Budget) -> list[list[int]]:
    batches = []
    while (batch := batcher.take(lambda _: limit)) is not None:
        batches.append([waiting.payload for waiting in batch.items])
    return batches


def test_empty() -> None:
    assert Batcher[int]().take(lambda _: limits()) is None


def test_equal_lengths_leave_in_order_of_arrival() -> None:
    batcher: Batcher[int] = Batcher()
    for number in range(10):
        batcher.add(Waiting(number, EMBED))
    assert drain(batcher, limits(items=4)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_groups_never_mix() -> None:
    batcher: Batcher[int] = Batcher()
    for number in range(6):
        batcher.add(Waiting(number, EMBED if number % 2 else OTHER))
    assert drain(batcher, limits()) == [[0, 2, 4], [1, 3, 5]]


def test_batch_takes_the_neighbours_by_length_of_the_most_urgent() -> None:
    batcher: Batcher[int] = Batcher()
    for cost in (10, 500, 11, 480, 12):
        batcher.add(Waiting(cost, EMBED, cost_tokens=cost))
    assert drain(batcher, limits(padded=40)) == [[10, 11, 12], [500], [480]]


def test_an_item_over_the_budget_runs_by_itself() -> None:
    batcher: Batcher[int] = Batcher()
    batcher.add(Waiting(1, EMBED, cost_tokens=9_999))
    batcher.add(Waiting(2, EMBED, cost_tokens=1))
    assert drain(batcher, limits(padded=100)) == [[1], [2]]


def test_earliest_deadline_first() -> None:
    batcher: Batcher[int] = Batcher()
    for number, deadline in enumerate((9.0, 3.0, 6.0)):
        batcher.add(Waiting(number, EMBED, deadline_s=deadline))
    assert drain(batcher, limits(items=1)) == [[1], [2], [0]]


def test_interactive_goes_before_bulk_that_came_first() -> None:
    batcher: Batcher[int] = Batcher()
    batcher.add(Waiting(1, EMBED, lane="bulk"))
    batcher.add(Waiting(2, EMBED, lane="interactive"))
    assert drain(batcher, limits()) == [[2], [1]]


def test_bulk_gets_a_turn_under_a_stream_of_interactive_work() -> None:
    batcher: Batcher[int] = Batcher()
    batcher.add(Waiting(-1, EMBED, lane="bulk"))
    seen = []
    for number in range(2 * INTERACTIVE_STREAK):
        batcher.add(Waiting(number, EMBED))
        batch = batcher.take(lambda _: limits(items=1))
        assert batch is not None
        seen.append(batch.items[0].payload)
    assert seen.index(-1) == INTERACTIVE_STREAK


@pytest.mark.parametrize("deadline_s", [math.inf, 1e6])
def test_an_item_with_a_far_deadline_or_none_gets_a_turn_under_a_stream_of_near_ones(deadline_s: float) -> None:
    batcher: Batcher[int] = Batcher()
    batcher.add(Waiting(-1, EMBED, deadline_s=deadline_s))
    seen = []
    for number in range(2 * OVERTAKING_STREAK):
        batcher.add(Waiting(number, EMBED, deadline_s=number + 60.0))
        batch = batcher.take(lambda _: limits(items=1))
        assert batch is not None
        seen.append(batch.items[0].payload)
    assert seen[: OVERTAKING_STREAK + 2] == [*range(OVERTAKING_STREAK), -1, OVERTAKING_STREAK]


def test_deadlines_go_first_however_many_without_one_have_waited() -> None:
    batcher: Batcher[int] = Batcher()
    for number in range(40):
        batcher.add(Waiting(number, EMBED))
    for number in range(100, 100 + 2 * OVERTAKING_STREAK):
        batcher.add(Waiting(number, EMBED, deadline_s=float(number)))
    left = [number for [number] in drain(batcher, limits(items=1))]
    turn = [OVERTAKING_STREAK, 2 * OVERTAKING_STREAK + 1]
    assert [left[at] for at in turn] == [0, 1]
    assert [number for number in left if number >= 100] == left[: turn[0]] + left[turn[0] + 1 : turn[1]]
    assert [number for number in left if number < 100] == list(range(40))


def test_bulk_batches_are_brief_as_long_as_interactive_items_come() -> None:
    batcher: Batcher[int] = Batcher()

    def taken() -> int:
        batch = batcher.take(lambda _: limits(items=10), lambda _: limits(items=2))
        assert batch is not None
        return len(batch.items)

    for number in range(200):
        batcher.add(Waiting(number, EMBED, lane="bulk"))
    assert taken() == 10
    for number in range(5):
        batcher.add(Waiting(number, EMBED))
    assert taken() == 5, "an interactive batch takes what there is"
    assert [taken() for _ in range(BRIEF_AFTER + 2)] == [2] * BRIEF_AFTER + [10, 10]


def test_a_suspect_shares_its_batch_with_nobody() -> None:
    batcher: Batcher[int] = Batcher()
    for number in range(4):
        batcher.add(Waiting(number, EMBED, alone=number == 1))
    assert drain(batcher, limits()) == [[0, 2, 3], [1]]


def test_a_batch_is_full_while_others_of_its_group_and_lane_wait() -> None:
    batcher: Batcher[int] = Batcher()
    for number in range(3):
        batcher.add(Waiting(number, EMBED))
    batcher.add(Waiting(3, OTHER))
    batcher.add(Waiting(4, EMBED, lane="bulk"))
    full = []
    while (batch := batcher.take(lambda _: limits(2))) is not None:
        full.append(([waiting.payload for waiting in batch.items], batch.full))
    assert full == [([0, 1], True), ([2], False), ([3], False), ([4], False)]


def test_ahead_is_what_take_takes_next() -> None:
    batcher: Batcher[int] = Batcher()
    other = Group("other", "embed", "{}")

    def ahead() -> Ahead | None:
        return batcher.ahead(lambda group: limits(3, 100) if group.model == "minilm" else limits())

    assert ahead() is None
    for number in range(3):
        batcher.add(Waiting(number, EMBED, 30, lane="bulk"))
    assert ahead() == Ahead("minilm", by_itself=False, more=False, cost_tokens=30)
    batcher.add(Waiting(3, EMBED, 30, lane="bulk"))
    assert ahead() == Ahead("minilm", by_itself=False, more=True, cost_tokens=30), "too many items"
    batcher.add(Waiting(4, other, deadline_s=5.0))
    assert ahead() == Ahead("other", by_itself=False, more=False), "interactive first"
    batcher.add(Waiting(5, other, deadline_s=4.0, alone=True))
    assert ahead() == Ahead("other", by_itself=True, more=False)
    assert [batcher.take(lambda _: limits(3, 100)) is not None for _ in range(2)] == [True, True]
    assert ahead() == Ahead("minilm", by_itself=True, more=False, cost_tokens=30), "interactive items come"


def test_ahead_counts_padding() -> None:
    batcher: Batcher[int] = Batcher()
    for number, tokens in enumerate((10, 10, 40)):
        batcher.add(Waiting(number, EMBED, tokens))
    assert batcher.ahead(lambda _: limits(padded=120)) == Ahead("minilm", by_itself=False, more=False, cost_tokens=10)
    assert batcher.ahead(lambda _: limits(padded=119)) == Ahead("minilm", by_itself=False, more=True, cost_tokens=10)


def test_one_of_several_batches_at_a_time_holds_its_part_of_the_tokens() -> None:
    batcher: Batcher[int] = Batcher()
    for number in range(10):
        batcher.add(Waiting(number, EMBED, 10))
    batch = batcher.take(lambda _: limits(8, 90), parts=2)
    assert batch is not None
    assert [waiting.payload for waiting in batch.items] == [0, 1, 2, 3]
    assert batch.budget == limits(8, 90), "which budget it is a part of"
    assert batcher.take(lambda _: limits(8, 1), parts=2) is not None, "the head always goes"


@given(
    st.lists(
        st.tuples(
            st.integers(1, 400),
            st.sampled_from(["interactive", "bulk"]),
            st.sampled_from([EMBED, OTHER]),
            st.floats(0, 100),
            st.booleans(),
        ),
        max_size=120,
    ),
    st.integers(1, 16),
    st.integers(1, 2_000),
)
def test_every_item_leaves_once_within_the_limits(items, max_items, max_padded) -> None:  # type: ignore[no-untyped-def]
    batcher: Batcher[int] = Batcher()
    for number, (cost, lane, group, deadline, alone) in enumerate(items):
        batcher.add(Waiting(number, group, cost, lane, deadline, alone))
    limit = limits(max_items, max_padded)
    left = []
    while (ahead := batcher.ahead(lambda _: limit)) is not None:
        waits = len(batcher)
        batch = batcher.take(lambda _: limit)
        assert batch is not None
        assert ahead.model == batch.group.model
        assert ahead.by_itself or len(batch.items) == waits or not batch.full or ahead.more
        assert ahead.by_itself or not batch.items[0].alone
        assert len({waiting.group for waiting in batch.items} | {batch.group}) == 1
        assert len({waiting.lane for waiting in batch.items}) == 1
        assert len(batch.items) <= max_items
        assert len(batch.items) == 1 or batch.padded_tokens <= max_padded
        assert len(batch.items) == 1 or not any(waiting.alone for waiting in batch.items)
        costs = [waiting.cost_tokens for waiting in batch.items]
        assert costs == sorted(costs)
        left += [waiting.payload for waiting in batch.items]
    assert sorted(left) == list(range(len(items)))
    assert len(batcher) == 0
    assert batcher.take(lambda _: limit) is None


items_of_any_kind = st.tuples(
    st.integers(1, 400), st.sampled_from(["interactive", "bulk"]), st.sampled_from([0.0, 5.0, 1e6, math.inf])
)


@settings(deadline=None)
@given(
    st.lists(items_of_any_kind, max_size=4),
    items_of_any_kind,
    st.lists(st.lists(items_of_any_kind, max_size=3), min_size=1, max_size=4),
    st.integers(1, 4),
    st.booleans(),
)
def test_every_item_leaves_within_a_bound_whatever_comes_beside_it(
    before: list[Any], victim: Any, stream: list[list[Any]], max_items: int, alone: bool
) -> None:
    batcher: Batcher[str] = Batcher()
    for cost, lane, due_in_s in before:
        batcher.add(Waiting("before", EMBED, cost, lane, due_in_s))
    cost, lane, due_in_s = victim
    batcher.add(Waiting("victim", EMBED, cost, lane, due_in_s, alone))
    # Each that came before it has its turn, then it; and so it is with its lane.
    bound = (len(before) + 1) * (OVERTAKING_STREAK + 1) * (INTERACTIVE_STREAK + 1)
    for now_s, arriving in zip(range(bound), cycle(stream), strict=False):
        for cost, lane, due_in_s in arriving:
            batcher.add(Waiting("beside", EMBED, cost, lane, now_s + due_in_s))
        batch = batcher.take(lambda _: limits(max_items, 800))
        assert batch is not None
        if any(item.payload == "victim" for item in batch.items):
            return
    raise AssertionError(f"still there after {bound} batches")


def test_where_little_waits_each_of_those_that_may_begin_gets_its_share() -> None:
    batcher: Batcher[int] = Batcher()
    for number, cost in enumerate([50] * 16 + [200] * 4):
        batcher.add(Waiting(number, EMBED, cost_tokens=cost))
    first = batcher.take(lambda _: limits(), parts=2, sharers=2)
    second = batcher.take(lambda _: limits(), parts=2)
    assert first is not None
    assert second is not None
    assert [sum(item.cost_tokens for item in batch.items) for batch in (first, second)] == [800, 800]
    # Its share kept the one from growing, the other took all: neither says anything of the budget.
    assert not first.full
    assert not second.full


def test_a_share_leaves_no_crumbs_and_does_not_go_beyond_the_budget() -> None:
    batcher: Batcher[int] = Batcher()
    for number in range(12):
        batcher.add(Waiting(number, EMBED, cost_tokens=10))
    assert (batch := batcher.take(lambda _: limits(), parts=4, sharers=4)) is not None
    assert len(batch.items) == 12
    for number in range(12):
        batcher.add(Waiting(number, EMBED, cost_tokens=100))
    assert (batch := batcher.take(lambda _: limits(padded=1_000), parts=2, sharers=2)) is not None
    assert len(batch.items) == 5
    assert batch.full


@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=80),
    st.integers(1, 20),
    st.integers(1, 8),
    st.integers(1, 2_000),
)
def test_shares_lose_nothing_and_are_about_equal(costs: list[int], items: int, sharers: int, padded: int) -> None:
    batcher: Batcher[int] = Batcher()
    for number, cost in enumerate(costs):
        batcher.add(Waiting(number, EMBED, cost_tokens=cost))
    taken: list[int] = []
    for free in range(sharers, 0, -1):
        left = [cost for number, cost in enumerate(costs) if number not in taken]
        batch = batcher.take(lambda _: limits(items, padded), parts=sharers, sharers=free)
        if batch is None:
            break
        held = sum(item.cost_tokens for item in batch.items)
        if free > 1 and len(left) <= free * items:
            # It stops with the text that makes it full.
            assert held - max(item.cost_tokens for item in batch.items) < max(128, sum(left) / free)
        taken += [item.payload for item in batch.items]
    taken += [item for batch in drain(batcher, limits()) for item in batch]
    assert sorted(taken) == list(range(len(costs)))
