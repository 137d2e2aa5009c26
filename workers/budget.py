"""How many padded tokens a batch should hold: learned for each task of a model on each machine.

Throughput over the budget has a hump: small batches pay the overhead of a pass, large ones leave the caches of a CPU
or pad more. Where the hump lies differs by machine, engine and traffic, so it is measured: at warm-up over powers of
two, and online, where now and then a full batch tries the neighbouring budget. What counts is tokens of texts a
second, padding excluded. Of budgets that are about equally good the smallest wins: it keeps others waiting less.

Budgets lie within a few percent of each other, and a machine that others use changes its speed by more than that from
one minute to the next. So online only *ratios* are learned: a trial is compared with the batches just before it, as
paired measurements are; what slows the whole machine, or texts of another length, for longer than a few batches then
counts for neither side. A process that stood still for a moment (a quota of CPU time, a machine that was moved) says
nothing: of the batches before, and of a budget's first trials, the median counts, and a later trial moves little.

While every bulk batch is brief, because interactive texts keep coming, the best budget is not run and nothing is
learned: what was known stays.
Pure: no clock, no randomness.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

__all__ = ["BudgetLearner", "candidates"]

_SMALLEST_TOKENS: Final = 128
#: A larger budget must be this much better than a smaller one.
_MARGIN: Final = 1.03
#: A brief batch may be this much slower, by the token.
_BRIEF_MARGIN: Final = 1.25
#: Batches of the best budget whose median is its present speed.
_RECENT: Final = 9
#: First trials of a budget, whose median is what is known of it.
_FIRST: Final = 9
#: Weight of a later trial in what is known of its budget: that of some twenty.
_WEIGHT: Final = 0.1
#: A later trial counts as at most this far off (a tenth faster or slower).
_FARTHEST: Final = 0.1
#: One full batch in so many tries a neighbour.
_EXPLORE_EVERY: Final = 16
#: The same while a neighbour was not seen often enough.
_EXPLORE_NEW: Final = 4
#: Batches up to here cost little: warm-up measures all of them, and twice, if its time lets it.
_CHEAP_TOKENS: Final = 1_024
#: Times that the best budget and its neighbours are measured again at warm-up.
_CALIBRATE_ROUNDS: Final = 2
#: Trials before a neighbour is believed.
_BELIEVE: Final = 4
#: A trial is compared with the best budget's speed while no more batches than this ran under others.
_FRESH: Final = 16
#: A pass that is said to take less was not measured.
_SHORTEST_S: Final = 1e-6


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
    """What is known of a budget."""

    #: Logarithm of its tokens a second; None: not known. Only differences between budgets mean anything.
    log_rate: float | None = None
    #: The same by each of its first trials, which replace what warm-up found.
    first: list[float] = field(default_factory=list)
    #: Batches of jobs.
    count: int = 0

    def add(self, log_rate: float) -> None:
        self.count += 1
        if self.log_rate is None or len(self.first) < _FIRST:
            self.first.append(log_rate)
            self.log_rate = statistics.median(self.first)
        else:
            off = max(-_FARTHEST, min(_FARTHEST, log_rate - self.log_rate))
            self.log_rate += _WEIGHT * off

    def move(self, by: float) -> None:
        if self.log_rate is not None:
            self.log_rate += by
            self.first = [trial + by for trial in self.first]


@dataclass(slots=True)
class BudgetLearner:
    """The budget of one task of a model. ``ceiling_tokens``: never more padded tokens than this."""

    ceiling_tokens: int
    _steps: list[int] = field(init=False)
    _seen: dict[int, _Seen] = field(init=False)
    _best: int = field(init=False)
    #: Logarithms of the tokens a second that the best budget has reached of late; empty: not seen since it is the best.
    _recent: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT))
    #: Batches under other budgets since then.
    _others: int = 0
    _turn: int = 0
    _trying: int | None = None
    #: The last trial that found too little to take: its other neighbour goes first.
    _unfilled: int | None = None

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
        """Tokens a second by budget, of the budgets measured so far; the fastest is 1."""
        logs = {step: seen.log_rate for step, seen in self._seen.items() if seen.log_rate is not None}
        fastest = max(logs.values(), default=0.0)
        return {step: math.exp(log_rate - fastest) for step, log_rate in logs.items()}

    def next_tokens(self) -> int:
        """The budget for the next batch: the best, or now and then a neighbour."""
        trying = self._trying  # read once: another thread may learn meanwhile
        return self.best_tokens if trying is None else self._steps[trying]

    def calibrate(
        self, run: Callable[[int], float], budget_s: float, clock: Callable[[], float], *, most_tokens: float = math.inf
    ) -> None:
        """Measure budgets from small to large until it gets no better, then the best and its neighbours again, until
        ``budget_s`` is spent. Of several rates (above 0) of a budget the best counts: what else runs here only slows.

        ``run(tokens)`` runs a full batch of about so many tokens and returns tokens of texts a second. ``most_tokens``:
        its batches grow no larger.
        """
        until_s = clock() + budget_s
        growing = sum(step < most_tokens for step in self._steps) + 1
        cheap = [step for step in self._steps[:growing] if step <= _CHEAP_TOKENS]
        for step in (*cheap, *cheap, *self._steps[len(cheap) : growing]):
            self._try(run, step)
            if clock() > until_s:
                return
            # One slow measurement may be chance.
            if step > _CHEAP_TOKENS and self._steps.index(step) >= self._best + 2:
                break
        for _ in range(_CALIBRATE_ROUNDS):
            for step in self._steps[max(0, self._best - 1) : min(self._best + 2, growing)]:
                if clock() > until_s:
                    return
                self._try(run, step)

    def _try(self, run: Callable[[int], float], step: int) -> None:
        log_rate, seen = math.log(run(step)), self._seen[step]
        seen.log_rate = log_rate if seen.log_rate is None else max(seen.log_rate, log_rate)
        self._choose(0)

    def observe(self, budget_tokens: int, tokens: int, seconds: float) -> None:
        """A batch ran that only its budget kept from growing: the tokens of its texts, its time.

        One that found no more to take says nothing of the budget, and is none of the learner's business.
        """
        if self._trying is not None and self._steps[self._trying] == budget_tokens:
            self._trying = None
        seen = self._seen.get(budget_tokens)
        if seen is None or seconds < _SHORTEST_S or tokens < 1:
            return
        log_rate = math.log(tokens / seconds)
        best = self._seen[self.best_tokens]
        if best.log_rate is None:
            best.log_rate = log_rate
        if seen is best:
            # What the others are compared with: its own place stays.
            best.count += 1
            self._recent.append(log_rate)
            self._others = 0
        elif self._recent and self._others < _FRESH:
            self._others += 1
            ratio = log_rate - statistics.median(self._recent)
            self._place(seen, budget_tokens, best.log_rate + ratio)
            self._choose(_BELIEVE)
        self._turn += 1
        if self._trying is None and self._recent:
            self._trying = self._neighbour()

    def pass_over(self, budget_tokens: int) -> None:
        """A batch ran that says nothing of its budget: if that was a trial, it is over. A budget that takes all there
        is would be tried for good otherwise."""
        if self._trying is not None and self._steps[self._trying] == budget_tokens:
            self._trying, self._unfilled = None, self._trying

    def _place(self, seen: _Seen, budget_tokens: int, log_rate: float) -> None:
        """Place a budget anew, and those beyond it along with it: their ratios to it are what is known of them."""
        before, best_tokens = seen.log_rate, self.best_tokens
        seen.add(log_rate)
        if before is None or seen.log_rate is None:
            return
        for step, other in self._seen.items():
            if step > budget_tokens > best_tokens or step < budget_tokens < best_tokens:
                other.move(seen.log_rate - before)

    def _neighbour(self) -> int | None:
        """What the next full batch tries, if anything: often a neighbour of the best that is not believed yet, else,
        now and then, one above and one below in turns."""
        sides = [side for side in (self._best + 1, self._best - 1) if 0 <= side < len(self._steps)]
        new = [side for side in sides if self._seen[self._steps[side]].count < _BELIEVE]
        if new:
            first = next((side for side in new if side != self._unfilled), new[0])
            return first if self._turn % _EXPLORE_NEW == 0 else None
        if not sides or self._turn % _EXPLORE_EVERY:
            return None
        return sides[self._turn // _EXPLORE_EVERY % len(sides)]

    def _choose(self, enough: int) -> None:
        """The smallest of the budgets that are about as good as the best, of those seen often enough."""
        rates = self.rates()
        believed = [step for step in rates if step == self.best_tokens or self._seen[step].count >= enough]
        good_enough = max((rates[step] for step in believed), default=0.0) / _MARGIN
        best = min((step for step in believed if rates[step] >= good_enough), default=self.best_tokens)
        if best != self.best_tokens:
            self._best, self._trying = self._steps.index(best), None
            self._recent.clear()
