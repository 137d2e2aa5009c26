"""The budget that is learned: finds the hump, keeps to the ceiling, follows a change, ignores what says nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.budget import BudgetLearner, candidates


def machine(peak_tokens: int, overhead_s: float = 0.002) -> Callable[[int], float]:
    """Tokens a second by size of batch: an overhead a pass, and a slow-down beyond the peak."""

    def rate(tokens: int) -> float:
        seconds = overhead_s + tokens / 7_000 * max(1.0, (tokens / peak_tokens) ** 0.3)
        return tokens / seconds

    return rate


def run(learner: BudgetLearner, rate: Callable[[int], float], batches: int) -> list[int]:
    used = []
    for _ in range(batches):
        budget = learner.next_tokens()
        used.append(budget)
        learner.observe(budget, budget, budget / rate(budget))
    return used


def test_candidates_end_with_the_ceiling() -> None:
    assert candidates(1_000) == [128, 256, 512, 1_000]
    assert candidates(100) == [100]


@pytest.mark.parametrize("peak", [512, 1_024, 2_048])
def test_warm_up_finds_the_hump(peak: int) -> None:
    learner = BudgetLearner(16_384)
    rate = machine(peak)
    learner.calibrate(rate, budget_s=60, clock=lambda: 0.0)
    best = max(rate(step) for step in candidates(16_384))
    assert rate(learner.best_tokens) >= best / 1.03
    assert learner.best_tokens <= 2 * peak


@pytest.mark.parametrize("peak", [512, 2_048])
def test_a_brief_batch_is_smaller_and_nearly_as_good(peak: int) -> None:
    learner = BudgetLearner(16_384)
    rate = machine(peak)
    learner.calibrate(rate, budget_s=60, clock=lambda: 0.0)
    assert learner.brief_tokens < learner.best_tokens
    assert rate(learner.brief_tokens) >= rate(learner.best_tokens) / 1.2


def test_before_anything_is_measured_a_brief_batch_is_like_any_other() -> None:
    assert BudgetLearner(1_000).brief_tokens == 1_000


def test_of_equals_the_smallest_wins() -> None:
    learner = BudgetLearner(8_192)
    learner.calibrate(lambda _: 1_000.0, budget_s=60, clock=lambda: 0.0)
    assert learner.best_tokens == 128


def test_one_slow_measurement_at_warm_up_decides_nothing() -> None:
    rate, calls = machine(1_024), 0

    def disturbed(tokens: int) -> float:
        nonlocal calls
        calls += 1
        return rate(tokens) / (3 if calls in (2, 5) else 1)

    learner = BudgetLearner(16_384)
    learner.calibrate(disturbed, budget_s=60, clock=lambda: 0.0)
    assert rate(learner.best_tokens) >= max(rate(step) for step in candidates(16_384)) / 1.05


def test_from_a_bad_start_it_is_near_the_best_within_a_hundred_batches() -> None:
    learner = BudgetLearner(8_192)
    learner.calibrate(lambda tokens: 1_000.0 if tokens == 128 else 1.0, budget_s=60, clock=lambda: 0.0)
    assert learner.best_tokens == 128
    rate = machine(2_048, overhead_s=0.1)
    run(learner, rate, 100)
    assert rate(learner.best_tokens) >= max(rate(step) for step in candidates(8_192)) / 1.25


def test_warm_up_stops_where_it_gets_no_better_and_spends_its_time_on_the_best() -> None:
    tried: list[int] = []

    def flat(tokens: int) -> float:
        tried.append(tokens)
        return 1_000.0 * min(tokens, 1_024) + tokens

    learner = BudgetLearner(16_384)
    learner.calibrate(flat, budget_s=60, clock=lambda: 0.0)
    assert tried[:10] == [*[128, 256, 512, 1_024] * 2, 2_048, 4_096]
    assert set(tried[10:]) == {512, 1_024, 2_048}
    assert learner.best_tokens == 1_024


def test_warm_up_stops_where_batches_grow_no_more() -> None:
    tried: list[int] = []

    def grow(tokens: int) -> float:
        tried.append(tokens)
        return float(tokens)

    learner = BudgetLearner(16_384)
    learner.calibrate(grow, budget_s=60, clock=lambda: 0.0, most_tokens=1_500)
    assert tried[:9] == [*[128, 256, 512, 1_024] * 2, 2_048]
    assert max(tried) == 2_048
    assert learner.best_tokens == 2_048


def test_warm_up_keeps_to_its_time() -> None:
    now = 0.0

    def run_slowly(tokens: int) -> float:
        nonlocal now
        now += 1.0
        return float(tokens)

    BudgetLearner(2**20).calibrate(run_slowly, budget_s=2.5, clock=lambda: now)
    assert now == 3.0


def test_without_warm_up_it_learns_online_from_the_ceiling_down() -> None:
    learner = BudgetLearner(8_192)
    run(learner, machine(1_024), 2_000)
    assert learner.best_tokens in (512, 1_024, 2_048)


def test_it_follows_a_machine_that_changes() -> None:
    learner = BudgetLearner(8_192)
    learner.calibrate(machine(512), budget_s=60, clock=lambda: 0.0)
    before = learner.best_tokens
    run(learner, machine(8_192, overhead_s=0.2), 4_000)
    assert learner.best_tokens > before


def test_most_batches_use_the_best_budget() -> None:
    learner = BudgetLearner(8_192)
    learner.calibrate(machine(1_024), budget_s=60, clock=lambda: 0.0)
    used = run(learner, machine(1_024), 320)
    assert used.count(learner.best_tokens) >= 0.9 * len(used)


def test_a_batch_that_took_no_time_says_nothing() -> None:
    learner = BudgetLearner(8_192)
    for _ in range(100):
        learner.observe(learner.next_tokens(), 10, 1e-9)
    assert learner.rates() == {}


@pytest.mark.parametrize("standstills", [0.0, 0.1])
@pytest.mark.parametrize("seed", range(20))
def test_a_machine_that_others_use_does_not_mislead_it(seed: int, standstills: float) -> None:
    """Rates of MiniLM on two cores by budget, on a machine whose speed drifts by a tenth from minute to minute, and
    that of each batch by about as much again; some batches take eight times as long, since nothing ran for a moment."""
    per_s = {128: 167, 256: 183, 512: 209, 1_024: 225, 2_048: 237, 4_096: 232, 8_192: 229}
    random, drift = Random(seed), 0.0

    def rate(tokens: int) -> float:
        nonlocal drift
        drift += -drift / 50 + random.gauss(0, 0.02)
        stood_still = random.random() < standstills
        return per_s[tokens] * math.exp(drift + random.gauss(0, 0.08)) / (8 if stood_still else 1)

    learner = BudgetLearner(8_192)
    learner.calibrate(rate, budget_s=60, clock=lambda: 0.0)
    run(learner, rate, 1_000)
    used = run(learner, rate, 1_000)
    assert sum(per_s[budget] for budget in used) >= (0.92 if standstills else 0.95) * 237 * len(used)


def test_a_brief_batch_between_does_not_cancel_a_trial() -> None:
    learner = BudgetLearner(8_192)
    rate = machine(2_048)
    learner.calibrate(rate, budget_s=60, clock=lambda: 0.0)
    while learner.next_tokens() == learner.best_tokens:
        run(learner, rate, 1)
    trial = learner.next_tokens()
    learner.observe(128, 128, 128 / rate(128))
    assert learner.next_tokens() == trial
    learner.observe(trial, trial, trial / rate(trial))
    assert learner.next_tokens() == learner.best_tokens


def test_a_trial_that_takes_all_there_is_ends_and_the_other_neighbour_gets_its_turn() -> None:
    """Loads of a fixed depth: no batch under the larger budget is ever full."""
    learner = BudgetLearner(8_192)
    learner.calibrate(machine(2_048), budget_s=60, clock=lambda: 0.0)
    best, used = learner.best_tokens, []
    for _ in range(1_000):
        budget = learner.next_tokens()
        used.append(budget)
        if budget > best:
            learner.pass_over(budget)
        else:
            learner.observe(budget, budget, budget / machine(2_048)(budget))
    assert sum(budget > best for budget in used) <= 0.3 * len(used)
    assert best // 2 in used


def test_what_is_not_tried_keeps_its_ratio() -> None:
    per_s = {128: 167, 256: 183, 512: 209, 1_024: 225, 2_048: 237, 4_096: 232, 8_192: 229}
    random = Random(0)
    learner = BudgetLearner(8_192)
    learner.calibrate(lambda tokens: per_s[tokens], budget_s=60, clock=lambda: 0.0)
    run(learner, lambda tokens: per_s[tokens] * math.exp(random.gauss(0, 0.08)), 50_000)
    fastest = max(per_s.values())
    assert {step: rate for step, rate in learner.rates().items() if step <= 2_048} == pytest.approx(
        {step: rate / fastest for step, rate in per_s.items() if step <= 2_048}, rel=0.15
    )


def test_texts_that_get_longer_say_nothing_of_the_budget() -> None:
    learner = BudgetLearner(8_192)
    rate = machine(1_024)
    learner.calibrate(rate, budget_s=60, clock=lambda: 0.0)
    best = learner.best_tokens
    for slower in range(200):
        budget = learner.next_tokens()
        learner.observe(budget, budget, budget / rate(budget) * 1.02**slower)
    assert learner.best_tokens == best


@given(st.integers(1, 50_000), st.lists(st.tuples(st.floats(0, 1e6), st.integers(0, 10**9)), max_size=200))
def test_never_over_the_ceiling(ceiling: int, batches: list[tuple[float, int]]) -> None:
    learner = BudgetLearner(ceiling)
    for seconds, tokens in batches:
        budget = learner.next_tokens()
        assert 0 < budget <= ceiling
        learner.observe(budget, tokens, seconds)
        assert 0 < learner.brief_tokens <= learner.best_tokens <= ceiling
        assert all(0 <= rate <= 1 for rate in learner.rates().values())
