"""Sizes tried in turns: the fastest is found though the machine's speed varies by more than they differ."""

from __future__ import annotations

from collections import Counter

from benchmarks.trials import shares_of_fastest

RATES = {512: 300.0, 1_024: 400.0, 2_048: 430.0, 4_096: 452.0, 8_192: 464.0}


class Machine:
    """A trial takes a second. Its speed: the size's own times that of the round."""

    def __init__(self, *, speeds: tuple[float, ...] = (1.0,), disturbed: tuple[int, int] | None = None) -> None:
        self.now_s = 0.0
        self.tried: Counter[int] = Counter()
        self._speeds, self._disturbed = speeds, disturbed

    def clock(self) -> float:
        return self.now_s

    def rate(self, size: int, turn: int) -> float:
        self.now_s += 1.0
        self.tried[size] += 1
        speed = self._speeds[turn % len(self._speeds)]
        return RATES[size] * speed * (0.5 if (size, turn) == self._disturbed else 1.0)

    def fastest(self, seconds: float) -> int:
        shares = shares_of_fastest(self.rate, list(RATES), seconds, self.clock)
        assert max(shares.values()) == 1.0
        assert set(shares) == set(RATES)
        return max(shares, key=shares.__getitem__)


def test_the_largest_is_chosen_where_larger_is_faster() -> None:
    assert Machine().fastest(30.0) == 8_192


def test_a_machine_that_is_slower_by_the_round_does_not_matter() -> None:
    assert Machine(speeds=(1.0, 0.7, 1.2, 0.5)).fastest(40.0) == 8_192


def test_one_disturbed_trial_does_not_matter() -> None:
    assert Machine(disturbed=(8_192, 0)).fastest(30.0) == 8_192


def test_the_time_goes_to_those_that_may_win() -> None:
    machine = Machine()
    machine.fastest(60.0)
    assert machine.tried[512] == machine.tried[1_024] == 3
    assert machine.tried[4_096] == machine.tried[8_192] > 12


def test_each_is_tried_once_however_short_the_time() -> None:
    machine = Machine()
    machine.fastest(0.0)
    assert machine.tried == Counter(list(RATES))
