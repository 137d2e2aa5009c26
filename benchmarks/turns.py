"""Two sides of a comparison in turns of a second or so, each as if it had the machine to itself.

The speed of a shared machine differs from one half minute to the next by more than the two sides do; from one second to
the next it differs far less. The side whose turn it is not is halted, in the middle of whatever it does.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from benchmarks.processes import Peer
from cortex_tasks.local_fleet import session_members

__all__ = ["SHORTEST_TURN_S", "Side", "in_turns", "running_s"]

#: Shorter ones would measure how long the caches take to fill.
SHORTEST_TURN_S: Final = 0.25


@dataclass(frozen=True, slots=True)
class Side:
    """Peers that were told what to do, and the sessions that work for them."""

    peers: Sequence[Peer]
    #: How long it runs at a time, in seconds.
    turn_s: float
    sessions: Sequence[int] = ()

    def processes(self) -> set[int]:
        return session_members({*self.sessions, *(peer.pid for peer in self.peers)})


def in_turns(first: Side, second: Side) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The answers of both sides' peers, each with ``running_s``: of the time from its ``began_s`` to its ``ended_s``
    (``time.perf_counter``, the same clock in all processes) what its side was not halted.

    The first side begins. When one is through, the other has the machine for the rest.
    """
    sides = (first, second)
    # Once: to look for them takes longer than to halt them.
    processes = [side.processes() for side in sides]
    halts: tuple[list[tuple[float, float]], ...] = ([], [])
    waiting = [set(side.peers) for side in sides]
    answers: tuple[dict[Peer, dict[str, Any]], ...] = ({}, {})
    try:
        _signal(processes[1], signal.SIGSTOP)
        turn, since_s = 0, time.perf_counter()
        while any(waiting):
            until_s = time.monotonic() + sides[turn].turn_s
            while waiting[turn] and (left_s := until_s - time.monotonic()) > 0:
                for peer in select.select(list(waiting[turn]), [], [], left_s)[0]:
                    answers[turn][peer] = peer.answer()
                    waiting[turn].remove(peer)
            if waiting[1 - turn]:
                _signal(processes[turn], signal.SIGSTOP)
                halts[1 - turn].append((since_s, time.perf_counter()))
                turn, since_s = 1 - turn, time.perf_counter()
                _signal(processes[turn], signal.SIGCONT)
    finally:
        # A halted process would not even end.
        _signal(set().union(*processes), signal.SIGCONT)
    found = [
        [answers[at][peer] | {"running_s": running_s(answers[at][peer], halts[at])} for peer in side.peers]
        for at, side in enumerate(sides)
    ]
    return found[0], found[1]


def _signal(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def running_s(answer: dict[str, Any], halts: Sequence[tuple[float, float]]) -> float:
    """Seconds from ``began_s`` to ``ended_s``, less what of them lies within the halts."""
    began_s, ended_s = answer["began_s"], answer["ended_s"]
    halted_s = sum(max(0.0, min(ended_s, until_s) - max(began_s, since_s)) for since_s, until_s in halts)
    return float(ended_s - began_s - halted_s)
