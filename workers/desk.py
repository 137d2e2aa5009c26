"""Between a job's arrival and the runners: what is known is answered, what is being computed is awaited.

Each input of a job that may be cached has a *seat* at the flight of its key. A flight is computed once, as part of an
inner job that a runner gets in the outer job's place; its outcome settles every seat. Before that, the desk's own
thread asks Redis in one round trip for what arrived: an answer settles the seats, a claim of another worker is waited
for, anything else is computed here. When the cache fails, all is computed here.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Any, Final

from cortex_tasks.cache.counters import Counters
from cortex_tasks.cache.frame import opened, sealed
from cortex_tasks.cache.shelf import tokens_of
from cortex_tasks.catalog import TASKS
from cortex_tasks.errors import CortexError
from cortex_tasks.payloads import Lane
from workers.admission import Events
from workers.flights import FLIGHT_S, MINE, Entry, FlightTower
from workers.herald import Herald
from workers.ledger import Ledger
from workers.registry import Registry
from workers.runtime import Job
from workers.seats import LONGEST_POLL_S, NAP_S, Addresses, Flight, Passage, Waiting

__all__ = ["CacheDesk"]

logger = logging.getLogger(__name__)

#: Entries that no result took along are sent by themselves after this.
_LEFT_S: Final = 0.1
_TRIM_EVERY_S: Final = 1.0


class CacheDesk(threading.Thread):
    """``run_job`` hands a job to its runner; ``events`` is whom the runners would tell without a desk.

    ``entry_max_bytes``: larger answers are not stored. ``clock``: monotonic seconds.
    """

    def __init__(
        self,
        tower: FlightTower,
        registry: Registry,
        events: Events,
        herald: Herald,
        run_job: Callable[[Job], None],
        *,
        counters: Counters,
        entry_max_bytes: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(name="cache-desk", daemon=True)
        self._tower, self._registry, self._events, self._run_job = tower, registry, events, run_job
        self._herald = herald
        self._entry_max_bytes = entry_max_bytes
        self._clock = clock
        self.counters = counters
        self._inbox: list[Job] = []
        #: Of the turn that is under way: jobs without seats, and flights of which it is open what becomes of them.
        self._unseated: deque[Job] = deque()
        self._undecided: set[Flight] = set()
        self._waiting = Waiting()
        #: The flights that jobs may still join.
        self._flights: dict[bytes, Flight] = {}
        self._addresses = Addresses()
        #: Answers to be stored.
        self.ledger = Ledger(tower, clock)
        self._trimmed_s = clock()
        self._stopping = False
        #: Guards everything above, and the outcomes of jobs that have seats.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)

    # --------------------------------------------------------------------- called by other threads

    def submit(self, job: Job) -> None:
        """Take a job. Never blocks on Redis or a model."""
        if not self._concerned(job):
            self._run_job(job)
            return
        with self._changed:
            self._inbox.append(job)
            self._changed.notify()

    def _concerned(self, job: Job) -> bool:
        # A suspect runs alone, input by input. A model that is not loaded has no revision yet.
        return (
            job.cache != "off"
            and not job.suspect
            and job.open_items > 0
            and TASKS[job.task].cacheable
            and self._registry.model(job.model).state == "ready"
        )

    def stop(self) -> None:
        """Begin nothing new. What waits stays unanswered, for its owner to give back."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def close(self) -> None:
        """End the thread and give up every claim."""
        self.stop()
        if self.ident is not None:
            self.join(5.0)
        self.ledger.store_left(0.0)
        self._tower.tell(self.counters)
        self._tower.land()

    # ----------------------------------------------------------------------------- on its own thread

    def run(self) -> None:
        while True:
            with self._changed:
                if not self._inbox and not self._stopping:
                    self._changed.wait(max(0.0, min(NAP_S, self._waiting.next_s(self._clock()))))
                if self._stopping:
                    return
                jobs, self._inbox = self._inbox, []
            try:
                self.turn(jobs)
            except Exception:
                logger.exception("the cache's desk failed; its jobs are computed without it")
                self._let_through()

    def turn(self, jobs: Sequence[Job]) -> None:
        """Deal with what arrived and with what is waited for."""
        self._unseated.extend(jobs)
        to_look: list[Flight] = []
        while self._unseated:
            new = self._seat(self._unseated[0])
            self._undecided.update(new)
            if self._unseated.popleft().cache == "refresh":
                self._fly(new)
            else:
                to_look += new
        with self._lock:
            due = self._waiting.take_due(self._clock())
            self._undecided.update(due)
        self._look([*to_look, *due])
        self._tend()

    def _let_through(self) -> None:
        """After a defect: whatever the turn has left undone is computed here."""
        flights, self._undecided = self._undecided, set()
        jobs, self._unseated = self._unseated, deque()
        self._fly(list(flights))
        for job in jobs:
            self._run_job(job)

    def _seat(self, job: Job) -> list[Flight]:
        """Give each input a seat, or none of them when it raises; returns the flights that are new."""
        revision = self._registry.model(job.model).revision
        address = self._addresses.of(job, revision)
        keyed = [(index, value, address.key(value)) for index, value in job.good_inputs()]
        new: dict[bytes, Flight] = {}
        with self._lock:
            for index, value, key in keyed:
                flight = new.get(key) or (self._flights.get(key) if job.cache == "use" else None)
                # Interactive work does not wait in bulk's line.
                if flight is not None and (flight.lane == "interactive" or job.lane == "bulk"):
                    flight.seats.append((job, index))
                    continue
                new[key] = Flight(key, job.model, revision, job.lane, value, [(job, index)], self._clock())
            if job.cache == "use":
                self._flights.update(new)
        return list(new.values())

    def _look(self, flights: Sequence[Flight]) -> None:
        """Ask Redis for flights that are not computed here yet, and do what it says."""
        kinds: dict[tuple[str, Lane], list[Flight]] = defaultdict(list)
        for flight in flights:
            kinds[flight.alias, flight.lane].append(flight)
        for (alias, lane), members in kinds.items():
            replies = self._tower.look(alias, [flight.key for flight in members], lane)
            if replies is None:
                self.counters.add(alias, skipped=1)
                replies = [MINE] * len(members)
            mine: list[Flight] = []
            known: list[tuple[Flight, Any]] = []
            for flight, reply in zip(members, replies, strict=True):
                value = opened(flight.key, reply) if isinstance(reply, bytes) else None
                if value is not None:
                    known.append((flight, value))
                elif reply == 0 and self._clock() - flight.since_s < FLIGHT_S:
                    self._wait(flight)
                else:
                    mine.append(flight)
            self._arrive_known(known)
            self._fly(mine)

    def _wait(self, flight: Flight) -> None:
        with self._lock:
            unwanted = [job for job in dict.fromkeys(job for job, _ in flight.seats) if self._events.unwanted(job)]
            flight.seats = [seat for seat in flight.seats if seat[0] not in unwanted]
            if flight.seats:
                flight.poll_at_s = self._clock() + flight.poll_s
                flight.poll_s = min(flight.poll_s * 2, LONGEST_POLL_S)
                self._waiting.flights.append(flight)
            else:
                self._forget(flight)
            self._undecided.discard(flight)
        if unwanted:
            self._events.dropped(unwanted)

    def _arrive_known(self, known: Sequence[tuple[Flight, Any]]) -> None:
        """Seats whose answer was found in Redis."""
        done: list[Job] = []
        with self._lock:
            for flight, value in known:
                self._undecided.discard(flight)
                self._forget(flight)
                for job, index in flight.seats:
                    job.known_items += 1
                    self._note_queue(job)
                    done += self._settle(job, index, value)
                tokens = tokens_of([flight.value]) * len(flight.seats)
                self.counters.add(flight.alias, l2_hits=len(flight.seats), saved_tokens=tokens)
        if done:
            self._events.finished(done)

    def _note_queue(self, job: Job) -> None:
        if job.sent_at_s is not None and not job.started:
            job.watch.queue_ms = max(0.0, (time.time() - job.sent_at_s) * 1e3)

    def _fly(self, flights: Sequence[Flight]) -> None:
        """Compute these here: an inner job for each job that has the first seats."""
        by_outer: dict[Job, list[Flight]] = defaultdict(list)
        for flight in flights:
            by_outer[flight.seats[0][0]].append(flight)
        for outer, members in by_outer.items():
            self._undecided.difference_update(members)
            self._run_job(Passage(outer, members).job())

    def _tend(self) -> None:
        """What is to be done now and then: signs of life, entries that no result took along, the limit in bytes."""
        now_s = self._clock()
        self._tower.renew()
        self._herald.turn()
        if self.counters.due:
            self._tower.tell(self.counters)
        self.ledger.store_left(_LEFT_S)
        if now_s - self._trimmed_s > _TRIM_EVERY_S:
            self._trimmed_s = now_s
            dropped = self._tower.trim()
            if dropped:
                self.counters.add("*", evicted=dropped)

    # ------------------------------------------------------- what runners tell, on the runners' threads

    def started(self, jobs: Sequence[Job]) -> None:
        outers: list[Job] = []
        for job in jobs:
            if isinstance(job.ticket, Passage):
                with self._lock:
                    for outer in job.ticket.outers():
                        outer.started = True
                        outer.watch.queue_ms = outer.watch.queue_ms or job.watch.queue_ms
                        outers.append(outer)
            else:
                outers.append(job)
        self._events.started(outers)

    def finished(self, jobs: Sequence[Job]) -> None:
        done: list[Job] = []
        for job in jobs:
            if isinstance(job.ticket, Passage):
                done += self._land(job, job.ticket)
            else:
                self._store_direct(job)
                done.append(job)
        if done:
            self._events.finished(list(dict.fromkeys(done)))

    def _land(self, inner: Job, passage: Passage) -> list[Job]:
        """Settle every seat of an inner job; returns the outer jobs that are through."""
        done: list[Job] = []
        entries: list[Entry] = []
        with self._lock:
            for flight in passage.flights:
                self._forget(flight)
            if inner.failure is not None:
                return self._fail(inner, passage)
            for flight, outcome in zip(passage.flights, inner.outcomes, strict=True):
                for job, index in flight.seats:
                    done += self._settle(job, index, outcome, inner)
                entries.append(self._entry(flight, outcome))
            spared = [flight.value for flight in passage.flights for _ in flight.seats[1:]]
            computed = len(passage.flights)
            self.counters.add(inner.model, computed=computed, shared=len(spared), saved_tokens=tokens_of(spared))
            self.ledger.keep(entries)
        return done

    def _store_direct(self, job: Job) -> None:
        """Store what was computed without a flight: by a suspect, or while the model was being loaded."""
        if job.cache == "off" or job.failure is not None or not TASKS[job.task].cacheable:
            return
        revision, now_s = self._registry.model(job.model).revision, self._clock()
        with self._lock:
            address = self._addresses.of(job, self._registry.model(job.model).revision)
            flights = [
                (Flight(address.key(value), job.model, revision, job.lane, value, [], now_s), job.outcomes[index])
                for index, value in job.good_inputs()
            ]
            entries = [self._entry(flight, outcome) for flight, outcome in flights]
        self.ledger.keep([entry for entry in entries if entry.frame])

    def _fail(self, inner: Job, passage: Passage) -> list[Job]:
        """The whole inner job failed (its model cannot be had): so does its outer job; others try for themselves."""
        self.ledger.keep([Entry(flight.alias, flight.key, b"", 1) for flight in passage.flights])
        passage.outer.failure = inner.failure
        self._again(passage)
        return [passage.outer]

    def _again(self, passage: Passage) -> None:
        """Those who only shared a flight that came to nothing get one of their own."""
        for flight in passage.flights:
            others = [(job, index) for job, index in flight.seats if job is not passage.outer and job.open_items > 0]
            if others:
                fresh = Flight(
                    flight.key, flight.alias, flight.revision, others[0][0].lane, flight.value, others, self._clock()
                )
                self._flights.setdefault(flight.key, fresh)
                self._waiting.flights.append(fresh)
                self._changed.notify()

    def dropped(self, jobs: Sequence[Job]) -> None:
        outers: list[Job] = [job for job in jobs if not isinstance(job.ticket, Passage)]
        with self._lock:
            for job in jobs:
                if not isinstance(job.ticket, Passage):
                    continue
                for flight in job.ticket.flights:
                    self._forget(flight)
                if self._stopping:
                    outers += job.ticket.outers()
                else:
                    outers.append(job.ticket.outer)
                    self._again(job.ticket)
                self.ledger.keep([Entry(flight.alias, flight.key, b"", 1) for flight in job.ticket.flights])
        self._events.dropped(list(dict.fromkeys(outers)))

    def unwanted(self, job: Job) -> bool:
        if not isinstance(job.ticket, Passage):
            return self._events.unwanted(job)
        with self._lock:
            outers = job.ticket.outers()
        return all(self._events.unwanted(outer) for outer in outers)

    def may_run(self, job: Job, index: int) -> CortexError | None:
        return self._events.may_run(job, index)

    def survived(self, job: Job, index: int) -> None:
        self._events.survived(job, index)

    # ------------------------------------------------------------------------- with the lock in hand

    def _forget(self, flight: Flight) -> None:
        """Nobody may join it any more."""
        if self._flights.get(flight.key) is flight:
            del self._flights[flight.key]

    def _settle(self, job: Job, index: int, outcome: Any, inner: Job | None = None) -> list[Job]:
        if job.failure is not None or job.open_items == 0:
            return []
        if inner is not None:
            watch = job.watch
            watch.prepare_ms = max(watch.prepare_ms, inner.watch.prepare_ms)
            watch.forward_ms = max(watch.forward_ms, inner.watch.forward_ms)
            watch.finish_ms = max(watch.finish_ms, inner.watch.finish_ms)
            watch.batch_items = max(watch.batch_items, inner.watch.batch_items)
        return [job] if job.settle(index, outcome) else []

    def _entry(self, flight: Flight, outcome: Any) -> Entry:
        """What to store of an outcome, and the flight to give up."""
        nothing = Entry(flight.alias, flight.key, b"", 1)
        model = self._registry.model(flight.alias)
        if not isinstance(outcome, dict) or model.revision != flight.revision:
            return nothing
        try:
            frame = sealed(flight.key, outcome)
        except (TypeError, ValueError) as error:
            logger.warning("an answer of %s cannot be stored: %s", flight.alias, error)
            return nothing
        if len(frame) > self._entry_max_bytes:
            self.counters.add(flight.alias, too_large=1)
            return nothing
        self.counters.add(flight.alias, stored=1, stored_bytes=len(frame))
        return Entry(flight.alias, flight.key, frame, model.config.cache_ttl_s)
