"""Flights and who sits in them: what ``workers.desk`` keeps of each computation. No locks, no IO, no clock."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from cortex_tasks.keys import Address
from cortex_tasks.payloads import Lane
from workers.runtime import Job

__all__ = ["FIRST_POLL_S", "LONGEST_POLL_S", "NAP_S", "Addresses", "Flight", "Passage", "Waiting"]

FIRST_POLL_S: Final = 0.005
LONGEST_POLL_S: Final = 0.05
#: The desk looks around this often when nothing happens.
NAP_S: Final = 0.5


@dataclass(slots=True, eq=False)
class Flight:
    """One computation of one key, here or elsewhere, and who sits in it."""

    key: bytes
    alias: str
    revision: str
    lane: Lane
    value: Any
    seats: list[tuple[Job, int]]
    #: Monotonic seconds.
    since_s: float
    poll_s: float = FIRST_POLL_S
    poll_at_s: float = 0.0


@dataclass(slots=True, eq=False)
class Passage:
    """What an inner job is for: the job whose place it takes, and a flight an input."""

    outer: Job
    flights: list[Flight]

    def outers(self) -> list[Job]:
        """Every job that sits in it, each once."""
        return list(dict.fromkeys([self.outer, *(job for flight in self.flights for job, _ in flight.seats)]))

    def job(self) -> Job:
        """The inner job."""
        return Job(
            id=self.outer.id,
            model=self.outer.model,
            task=self.outer.task,
            params=self.outer.params,
            inputs=[flight.value for flight in self.flights],
            lane=self.outer.lane,
            deadline_s=self.outer.deadline_s,
            sent_at_s=self.outer.sent_at_s,
            ticket=self,
            canonical=self.outer.group.params,
        )


@dataclass(slots=True)
class Waiting:
    """Flights that other workers compute, and when to look for them."""

    flights: list[Flight] = field(default_factory=list)

    def take_due(self, now_s: float) -> list[Flight]:
        due = [flight for flight in self.flights if flight.poll_at_s <= now_s]
        if due:
            self.flights = [flight for flight in self.flights if flight.poll_at_s > now_s]
        return due

    def next_s(self, now_s: float) -> float:
        """Seconds until the next one is due."""
        return min((flight.poll_at_s - now_s for flight in self.flights), default=NAP_S)


class Addresses:
    """Where the answers to jobs are stored, for the kinds of jobs seen last."""

    _MOST: Final = 256

    def __init__(self) -> None:
        self._known: dict[tuple[str, str, str, str], Address] = {}

    def of(self, job: Job, revision: str) -> Address:
        kind = (job.task, job.model, revision, job.group.params)
        known = self._known.get(kind)
        if known is None:
            if len(self._known) >= self._MOST:
                self._known.clear()
            known = self._known[kind] = Address(*kind)
        return known
