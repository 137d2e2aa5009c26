"""A look takes a bounded part of the awaited jobs, and everybody has a turn."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cortex_tasks.polling import LOOK_KEYS, Round


def test_few_are_looked_for_together() -> None:
    jobs = [str(n) for n in range(LOOK_KEYS)]
    assert Round().pick(jobs, len(jobs)) == jobs


@given(st.integers(LOOK_KEYS + 1, 20 * LOOK_KEYS))
def test_of_many_the_longest_awaited_and_a_turn_of_the_others(count: int) -> None:
    jobs = [str(n) for n in range(count)]
    turns, seen = Round(), set()
    half = LOOK_KEYS // 2
    for _ in range(-(-(count - half) // half)):
        picked = turns.pick(jobs, count)
        assert picked[:half] == jobs[:half]
        assert len(set(picked)) == len(picked) <= LOOK_KEYS
        seen |= set(picked)
    assert seen == set(jobs)


@given(st.lists(st.integers(0, 5 * LOOK_KEYS), min_size=1, max_size=30))
def test_jobs_that_come_and_go_meanwhile_do_not_disturb_it(counts: list[int]) -> None:
    turns = Round()
    for count in counts:
        jobs = [str(n) for n in range(count)]
        picked = turns.pick(jobs, count)
        assert len(set(picked)) == len(picked) <= LOOK_KEYS
        assert set(picked) <= set(jobs)
        assert bool(picked) == bool(jobs)
