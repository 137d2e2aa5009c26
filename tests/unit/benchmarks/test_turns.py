"""Two sides in turns: neither runs while the other does, and what each is charged is the time in which it ran."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks.processes import Peer
from benchmarks.turns import Side, in_turns, running_s


@pytest.mark.parametrize(
    ("halts", "expected"),
    [
        ([], 10.0),
        ([(0.0, 4.0)], 10.0),
        ([(4.0, 6.0)], 9.0),
        ([(6.0, 8.0), (9.0, 9.5)], 7.5),
        ([(14.0, 20.0)], 9.0),
        ([(0.0, 20.0)], 0.0),
    ],
)
def test_a_halt_counts_as_far_as_it_lies_within(halts: list[tuple[float, float]], expected: float) -> None:
    assert running_s({"began_s": 5.0, "ended_s": 15.0}, halts) == pytest.approx(expected)


@contextlib.contextmanager
def counters(number: int) -> Iterator[list[Peer]]:
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(Peer("tests.support.counter", {})) for _ in range(number)]
        for peer in peers:
            peer.ask("count", cpu_s=0.001)
        yield peers


def test_neither_side_runs_while_the_other_does() -> None:
    with counters(3) as [one, other, alone]:
        for peer, cpu_s in ((one, 0.5), (other, 0.7), (alone, 0.4)):
            peer.tell("count", cpu_s=cpu_s)
        first, [second] = in_turns(Side([one, other], 0.1), Side([alone], 0.05))
        assert len(first) == 2
        states = [Path(f"/proc/{peer.pid}/stat").read_text().rpartition(")")[2].split()[0] for peer in (one, other)]
        assert "T" not in states, "they go on afterwards"
    for answer, cpu_s in ((first[0], 0.5), (first[1], 0.7), (second, 0.4)):
        # One thread uses no more CPU time than there is; some milliseconds pass between the signal and the halt.
        assert answer["running_s"] > 0.95 * cpu_s
    # Each was halted, for as long as the other side's turns.
    assert second["ended_s"] - second["began_s"] - second["running_s"] > 0.3
    # In the moment before the second side is halted for the first time both may run.
    later = sorted(second["seen_s"])[20:]
    gaps = [(since, until) for since, until in pairwise(later) if until - since > 0.08]
    assert len(gaps) >= 3
    during = sum(any(since + 0.02 < seen < until - 0.02 for since, until in gaps) for seen in first[0]["seen_s"])
    assert during > 200, "the first side runs while the second is halted"
    between = sum(any(a + 0.02 < seen < b - 0.02 for a, b in _runs(later)) for seen in first[0]["seen_s"])
    assert between == 0, "and only then"


def _runs(seen_s: list[float]) -> list[tuple[float, float]]:
    """The stretches without a gap, longer than 40 ms."""
    edges = [at for at in range(1, len(seen_s)) if seen_s[at] - seen_s[at - 1] > 0.03]
    starts, ends = [0, *edges], [*edges, len(seen_s)]
    return [(seen_s[a], seen_s[b - 1]) for a, b in zip(starts, ends, strict=True) if seen_s[b - 1] - seen_s[a] > 0.04]


def test_a_peer_that_fails_ends_it_and_nothing_stays_halted() -> None:
    with counters(2) as [one, other]:
        one.tell("dance")
        other.tell("count", cpu_s=0.01)
        with pytest.raises(RuntimeError, match="KeyError: 'dance'"):
            in_turns(Side([one], 0.1), Side([other], 0.1))
        assert other.answer()["seen_s"]
