"""How many padded tokens a batch should hold: learned for each model on each machine.

Throughput over the budget has a hump: small batches pay the overhead of a pass, large ones leave the caches of a CPU
or pad more. Where the hump lies differs by machine, engine and traffic, so it is measured: at warm-up over powers of
two, and online, where now and then a full batch tries the neighbouring budget. What counts is tokens of texts a
second, padding excluded. Of budgets that are about equally good the smallest wins: it keeps others waiting less.
Pure: no clock, no randomness.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

__all__ = ["BudgetLearner", "candidates"]

_SMALLEST_TOKENS: Final = 128
#: A larger budget must be this much better than a smaller one.
_MARGIN: Final = 1.03
#: A brief batch may be this much slower, by the token.
_BRIEF_MARGIN: Final = 1.15
#: Weight of a new observation.
_WEIGHT: Final = 0.2
#: One full batch in so many tries a neighbour.
_EXPLORE_EVERY: Final = 16
#: The same while a neighbour was not seen often enough.
_EXPLORE_NEW: Final = 4
#: Times that the best budget and its neighbours are measured again at warm-up.
_CALIBRATE_ROUNDS: Final = 2
#: Observations before a neighbour is believed.
_BELIEVE: Final = 3
#: A pass that is said to take less was not measured.
_SHORTEST_S: Final = 1e-6
#: A batch that fills less of its budget says nothing about it: there was no more to take.
_FULL: Final = 0.7


def candidates(ceiling_tokens: int) -> list[int]:
    """Powers of two up to the ceiling, and the ceiling."""
    steps = []
    step = _SMALLEST_TOKENS
    while step < ceiling_tokens:
        steps.append(step)
        step *= 2
    return [*steps, ceiling_tokens]


@dataclass(slots=True)
class _Seen:
    tokens_per_s: float = 0.0
    count: int = 0

    def add(self, tokens_per_s: float) -> None:
        weight = max(_WEIGHT, 1 / (self.count + 1))
        self.tokens_per_s += weight * (tokens_per_s - self.tokens_per_s)
        self.count += 1


@dataclass(slots=True)
class BudgetLearner:
    """The budget of one model. ``ceiling_tokens``: never more padded tokens than this."""

    ceiling_tokens: int
    _steps: list[int] = field(init=False)
    _seen: dict[int, _Seen] = field(init=False)
    _best: int = field(init=False)
    _turn: int = 0
    _trying: int | None = None

    def __post_init__(self) -> None:
        self._steps = candidates(self.ceiling_tokens)
        self._seen = {step: _Seen() for step in self._steps}
        self._best = len(self._steps) - 1

    @property
    def best_tokens(self) -> int:
        """The best budget known."""
        return self._steps[self._best]

    @property
    def brief_tokens(self) -> int:
        """For a batch that others wait behind: the smallest budget that costs little throughput."""
        rates = {step: rate for step, rate in self.rates().items() if step <= self.best_tokens}
        good_enough = max(rates.values(), default=0.0) / _BRIEF_MARGIN
        return min((step for step, rate in rates.items() if rate >= good_enough), default=self.best_tokens)

    def rates(self) -> dict[int, float]:
        """Tokens a second by budget, of the budgets measured so far."""
        return {step: seen.tokens_per_s for step, seen in self._seen.items() if seen.count}

    def next_tokens(self) -> int:
        """The budget for the next batch: the best, or now and then a neighbour."""
        if self._trying is not None:
            return self._steps[self._trying]
        return self.best_tokens

    def calibrate(
        self, run: Callable[[int], float], budget_s: float, clock: Callable[[], float], *, most_tokens: float = math.inf
    ) -> None:
        """Measure budgets from small to large until it gets no better, then the best and its neighbours again, until
        ``budget_s`` is spent. Of several rates of a budget the best counts: what else runs here only slows.

        ``run(tokens)`` runs a full batch of about so many tokens and returns tokens of texts a second. ``most_tokens``:
        its batches grow no larger.
        """
        until_s = clock() + budget_s
        best, no_better = 0.0, 0
        growing = sum(step < most_tokens for step in self._steps) + 1
        for step in self._steps[:growing]:
            rate = self._try(run, step)
            if rate > best * _MARGIN:
                best, no_better = rate, 0
            else:
                no_better += 1
            # One slow measurement may be chance.
            if no_better == 2 or clock() > until_s:
                break
        self._choose(step for step in self._steps if self._seen[step].count)
        for _ in range(_CALIBRATE_ROUNDS):
            for step in self._steps[max(0, self._best - 1) : min(self._best + 2, growing)]:
                if clock() > until_s:
                    return
                self._try(run, step)
            self._choose(step for step in self._steps if self._seen[step].count)

    def _try(self, run: Callable[[int], float], step: int) -> float:
        rate, seen = run(step), self._seen[step]
        seen.tokens_per_s, seen.count = max(seen.tokens_per_s, rate), 1
        return rate

    def observe(self, budget_tokens: int, padded_tokens: int, tokens: int, seconds: float) -> None:
        """A batch ran under a budget: its padded size, the tokens of its texts, its time."""
        seen = self._seen.get(budget_tokens)
        if seen is None or seconds < _SHORTEST_S or padded_tokens < _FULL * budget_tokens:
            return
        seen.add(tokens / seconds)
        self._trying = None
        self._choose(step for step in self._steps if self._seen[step].count >= _BELIEVE or step == self.best_tokens)
        self._turn += 1
        self._trying = self._neighbour()

    def _neighbour(self) -> int | None:
        """What the next full batch tries, if anything: often a neighbour of the best that is not believed yet, else,
        now and then, one above and one below in turns."""
        sides = [side for side in (self._best + 1, self._best - 1) if 0 <= side < len(self._steps)]
        new = [side for side in sides if self._seen[self._steps[side]].count < _BELIEVE]
        if new:
            return new[0] if self._turn % _EXPLORE_NEW == 0 else None
        if not sides or self._turn % _EXPLORE_EVERY:
            return None
        return sides[self._turn // _EXPLORE_EVERY % len(sides)]

    def _choose(self, believed: Iterable[int]) -> None:
        """The smallest of the budgets that are about as good as the best."""
        rates = {step: self._seen[step].tokens_per_s for step in believed}
        if not rates:
            return
        good_enough = max(rates.values()) / _MARGIN
        self._best = self._steps.index(min(step for step, rate in rates.items() if rate >= good_enough))
