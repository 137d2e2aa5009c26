"""The desk: who is answered at once, who joins whom, who computes. Its thread and its Redis are played by the test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from cortex_tasks.cache.counters import Counters
from cortex_tasks.cache.frame import opened, sealed
from cortex_tasks.errors import InferenceFailed, ModelUnavailable
from cortex_tasks.payloads import Lane
from tests.support.stub_models import Listener, StubAdapter, fleet_of, job, ready, registry_of
from tests.support.worker_process import poll_until
from workers.desk import CacheDesk
from workers.flights import FLIGHT_S, MINE, Entry
from workers.herald import Herald
from workers.runtime import Job


class Tower:
    """Redis' part: ``known`` holds frames, ``elsewhere`` keys that another worker computes."""

    def __init__(self) -> None:
        self.known: dict[bytes, bytes] = {}
        self.elsewhere: set[bytes] = set()
        self.down = False
        self.looks: list[tuple[int, Lane]] = []
        self.stored: list[Entry] = []

    def look(self, alias: str, keys: Sequence[bytes], lane: Lane) -> list[Any] | None:
        self.looks.append((len(keys), lane))
        if self.down:
            return None
        return [self.known.get(key, 0 if key in self.elsewhere else MINE) for key in keys]

    def store(self, entries: Sequence[Entry]) -> int:
        self.stored += entries
        return len(entries)

    def store_command(self, pipe: Any, entries: Sequence[Entry]) -> None:
        self.stored += entries

    def renew(self) -> None: ...
    def tell(self, counters: Counters) -> None: ...
    def land(self) -> None: ...
    def trim(self) -> int:
        return 0


class Bench:
    """A desk; ``inner`` are the jobs that its runner got, which ``compute`` answers."""

    def __init__(self, entry_max_bytes: int = 10_000) -> None:
        self.now_s = 100.0
        self.registry = registry_of(fleet_of(m={}, lazy={}))
        ready(self.registry, "m", StubAdapter())
        self.tower, self.listener, self.inner = Tower(), Listener(), list[Job]()
        self.desk = CacheDesk(
            self.tower,  # type: ignore[arg-type]
            self.registry,
            self.listener,
            Herald(self.registry, lambda alias, revision, loaded: True, lambda: self.now_s),
            self.inner.append,
            counters=Counters(lambda: self.now_s),
            entry_max_bytes=entry_max_bytes,
            clock=lambda: self.now_s,
        )

    def arrive(self, *jobs: Job) -> None:
        """As ``submit`` and one turn of the thread."""
        for each in jobs:
            self.desk.submit(each)
        arrived, self.desk._inbox = self.desk._inbox, []
        self.desk.turn(arrived)

    def break_down(self, *jobs: Job) -> None:
        """A turn that a defect ends, and what the thread does then."""
        with pytest.raises(RuntimeError, match="a defect"):
            self.arrive(*jobs)
        self.desk._let_through()

    def later(self, seconds: float) -> None:
        self.now_s += seconds
        self.desk.turn([])

    def inputs(self) -> list[list[Any]]:
        return [list(inner.inputs) for inner in self.inner]

    def compute(self) -> None:
        """Answer what the runner got."""
        jobs, self.inner[:] = list(self.inner), []
        for inner in jobs:
            self.desk.started([inner])
            for index, value in inner.good_inputs():
                inner.settle(index, value if isinstance(value, Exception) else {"said": value})
        self.desk.finished(jobs)

    def said(self, done: Job) -> list[Any]:
        return [outcome.get("said") if isinstance(outcome, dict) else outcome for outcome in done.outcomes]

    def remember(self) -> None:
        """What was computed is in Redis now."""
        self.tower.known |= {entry.key: entry.frame for entry in self.flushed() if entry.frame}

    def flushed(self) -> list[Entry]:
        self.desk.ledger.board(None)
        return self.tower.stored


@pytest.fixture
def bench() -> Bench:
    return Bench()


def broken(*_: Any) -> Any:
    raise RuntimeError("a defect")


def test_an_unknown_job_is_computed_stored_and_answered(bench: Bench) -> None:
    one = job("1", "a", "b")
    bench.arrive(one)
    assert bench.inputs() == [["a", "b"]]
    bench.compute()
    assert bench.said(one) == ["a", "b"]
    assert bench.listener.told == [("started", "1"), ("finished", "1")]
    entries = bench.flushed()
    assert [opened(entry.key, entry.frame) for entry in entries] == [{"said": "a"}, {"said": "b"}]
    assert {entry.ttl_s for entry in entries} == {3_600}


def test_a_job_tells_what_the_stages_of_its_computation_took() -> None:
    bench = Bench()
    outer = job("outer", "a")
    bench.arrive(outer)
    watch = bench.inner[0].watch
    watch.prepare_ms, watch.finish_ms = 2.0, 4.0
    watch.add_pass(1.0, 1.5, items=3)
    bench.compute()
    told = outer.watch
    assert (told.prepare_ms, told.forward_ms, told.finish_ms, told.batch_items) == (2.0, 500.0, 4.0, 3)


def test_what_is_known_is_not_computed(bench: Bench) -> None:
    bench.arrive(job("1", "a"))
    bench.compute()
    bench.remember()
    again, partly = job("2", "a"), job("3", "a", "new")
    bench.arrive(again, partly)
    assert bench.said(again) == ["a"]
    assert again.known_items == 1
    assert bench.inputs() == [["new"]]
    bench.compute()
    assert bench.said(partly) == ["a", "new"]


def test_twins_within_a_job_and_across_jobs_are_computed_once(bench: Bench) -> None:
    one, other = job("1", "a", "a", "b"), job("2", "b", "c", "a")
    bench.arrive(one, other)
    assert bench.inputs() == [["a", "b"], ["c"]]
    bench.compute()
    assert bench.said(one) == ["a", "a", "b"]
    assert bench.said(other) == ["b", "c", "a"]
    assert bench.listener.ids("finished") == ["1", "2"]


def test_a_job_that_comes_while_its_twin_is_computed_joins_it(bench: Bench) -> None:
    one, late = job("1", "a"), job("2", "a")
    bench.arrive(one)
    bench.arrive(late)
    assert bench.inputs() == [["a"]]
    bench.compute()
    assert bench.said(late) == ["a"]
    assert bench.desk.counters.take()["m"] == {"shared": 1, "saved_tokens": 1, "computed": 1, "stored": 1,
                                               "stored_bytes": len(sealed(b"k" * 16, {"said": "a"}))}  # fmt: skip


def test_twins_whose_answer_is_found_are_counted_once_each(bench: Bench) -> None:
    bench.arrive(job("1", "a"))
    bench.compute()
    bench.remember()
    bench.desk.counters.take()
    bench.arrive(job("2", "a"), job("3", "a", "a"))
    assert bench.listener.ids("finished") == ["1", "2", "3"]
    assert bench.desk.counters.take()["m"] == {"l2_hits": 3, "saved_tokens": 3}


def test_an_interactive_job_does_not_wait_in_bulks_line_but_bulk_may_join_it(bench: Bench) -> None:
    bench.arrive(job("bulk", "a", lane="bulk"))
    bench.arrive(job("quick", "a"))
    bench.arrive(job("more bulk", "a", lane="bulk"))
    assert [(inner.id, inner.lane) for inner in bench.inner] == [("bulk", "bulk"), ("quick", "interactive")]
    bench.compute()
    assert sorted(bench.listener.ids("finished")) == ["bulk", "more bulk", "quick"]


def test_what_another_worker_computes_is_waited_for_and_taken_when_it_comes(bench: Bench) -> None:
    bench.arrive(job("0", "a"))
    key = bench.inner[0].ticket.flights[0].key
    bench.inner.clear()
    bench.desk._flights.clear()
    bench.tower.elsewhere.add(key)
    waits = job("1", "a")
    bench.arrive(waits)
    assert bench.inner == []
    bench.later(0.006)
    assert bench.inner == []
    bench.tower.known[key] = sealed(key, {"said": "a"})
    bench.later(0.06)
    assert bench.said(waits) == ["a"]
    assert bench.desk._waiting.flights == []


@pytest.mark.parametrize("how", ["the owner dies", "it takes too long", "the cache fails"])
def test_nobody_waits_for_ever(bench: Bench, how: str) -> None:
    bench.arrive(job("0", "a"))
    key = bench.inner[0].ticket.flights[0].key
    bench.inner.clear()
    bench.desk._flights.clear()
    bench.tower.elsewhere.add(key)
    waits = job("1", "a")
    bench.arrive(waits)
    assert bench.inner == []
    if how == "the owner dies":
        bench.tower.elsewhere.clear()
    bench.tower.down = how == "the cache fails"
    bench.later(FLIGHT_S + 1 if how == "it takes too long" else 1)
    assert bench.inputs() == [["a"]]
    bench.compute()
    assert bench.said(waits) == ["a"]


def test_without_a_cache_everything_is_computed(bench: Bench) -> None:
    bench.tower.down = True
    one = job("1", "a", "b")
    bench.arrive(one)
    bench.compute()
    assert bench.said(one) == ["a", "b"]


def test_a_corrupt_entry_is_computed(bench: Bench) -> None:
    bench.arrive(job("0", "a"))
    bench.compute()
    bench.remember()
    bench.tower.known = dict.fromkeys(bench.tower.known, b"noise")
    again = job("1", "a")
    bench.arrive(again)
    bench.compute()
    assert bench.said(again) == ["a"]


def test_refresh_computes_what_is_known_and_off_passes_by(bench: Bench) -> None:
    bench.arrive(job("1", "a"))
    bench.compute()
    bench.remember()
    bench.tower.stored.clear()
    refresh, off = job("2", "a", "a", cache="refresh"), job("3", "a", cache="off")
    bench.arrive(refresh, off)
    assert [inner.id for inner in bench.inner] == ["3", "2"]
    assert bench.inner[0] is off
    assert list(bench.inner[1].inputs) == ["a"]
    bench.compute()
    assert bench.said(refresh) == ["a", "a"]
    assert len(bench.flushed()) == 1


def test_a_suspect_passes_by_and_its_answer_is_stored(bench: Bench) -> None:
    suspect = job("1", "a", suspect=True)
    bench.arrive(suspect)
    assert bench.inner == [suspect]
    bench.compute()
    assert [opened(entry.key, entry.frame) for entry in bench.flushed()] == [{"said": "a"}]


def test_a_job_of_a_model_that_is_not_loaded_passes_by(bench: Bench) -> None:
    lazy = job("1", "a", model="lazy")
    bench.arrive(lazy)
    assert bench.inner == [lazy]


def test_an_error_is_given_to_all_its_twins_and_not_stored(bench: Bench) -> None:
    one, other = job("1", "a", "good"), job("2", "a")
    bench.arrive(one, other)
    [inner] = bench.inner
    inner.settle(0, InferenceFailed("no"))
    inner.settle(1, {"said": "good"})
    bench.desk.finished([inner])
    assert isinstance(one.outcomes[0], InferenceFailed)
    assert isinstance(other.outcomes[0], InferenceFailed)
    assert [bool(entry.frame) for entry in bench.flushed()] == [False, True]


def test_a_job_that_fails_as_a_whole_leaves_its_twins_to_try_for_themselves(bench: Bench) -> None:
    one, other = job("1", "a"), job("2", "a")
    bench.arrive(one, other)
    [inner] = bench.inner
    bench.inner.clear()
    inner.failure = ModelUnavailable("gone")
    bench.desk.finished([inner])
    assert isinstance(one.failure, ModelUnavailable)
    assert bench.listener.ids("finished") == ["1"]
    bench.later(0.01)
    assert bench.inputs() == [["a"]]
    bench.compute()
    assert bench.said(other) == ["a"]


def test_a_cancelled_job_is_dropped_and_its_twin_is_answered(bench: Bench) -> None:
    one, other = job("1", "a"), job("2", "a")
    bench.arrive(one, other)
    bench.listener.unwanted_ids.add("1")
    [inner] = bench.inner
    assert not bench.desk.unwanted(inner), "the twin wants it"
    bench.compute()
    assert bench.said(other) == ["a"]


def test_a_flight_that_nobody_wants_is_dropped(bench: Bench) -> None:
    bench.arrive(job("1", "a"))
    bench.listener.unwanted_ids.add("1")
    [inner] = bench.inner
    assert bench.desk.unwanted(inner)
    bench.desk.dropped([inner])
    assert bench.listener.told == [("dropped", "1")]
    assert [entry.frame for entry in bench.flushed()] == [b""]


def test_a_job_cancelled_while_another_worker_computes_is_dropped(bench: Bench) -> None:
    bench.arrive(job("0", "a"))
    bench.tower.elsewhere.add(bench.inner[0].ticket.flights[0].key)
    bench.inner.clear()
    bench.desk._flights.clear()
    bench.arrive(job("1", "a"))
    bench.listener.unwanted_ids.add("1")
    bench.later(0.1)
    assert bench.listener.told == [("dropped", "1")]
    assert bench.desk._waiting.flights == []


def test_an_answer_of_a_revision_that_changed_meanwhile_is_not_stored(bench: Bench) -> None:
    one = job("1", "a")
    bench.arrive(one)
    bench.registry.model("m").revision = "another"
    bench.compute()
    assert bench.said(one) == ["a"]
    assert [entry.frame for entry in bench.flushed()] == [b""]


def test_an_answer_over_the_limit_is_not_stored() -> None:
    bench = Bench(entry_max_bytes=20)
    bench.arrive(job("1", "a"))
    bench.compute()
    assert [entry.frame for entry in bench.flushed()] == [b""]
    assert bench.desk.counters.take()["m"]["too_large"] == 1


def test_entries_that_no_result_took_along_are_sent_by_themselves(bench: Bench) -> None:
    bench.arrive(job("1", "a"))
    bench.compute()
    bench.later(0.05)
    assert bench.tower.stored == []
    bench.later(0.1)
    assert len(bench.tower.stored) == 1


def test_entries_whose_pipeline_was_not_sent_go_with_the_next(bench: Bench) -> None:
    bench.arrive(job("1", "a"))
    bench.compute()
    assert bench.desk.ledger.board(None) == 1
    bench.desk.ledger.turned_back()
    bench.tower.stored.clear()
    assert bench.desk.ledger.board(None) == 1
    assert len(bench.tower.stored) == 1
    assert bench.desk.ledger.board(None) == 0


def test_a_stop_gives_back_what_has_not_started(bench: Bench) -> None:
    bench.arrive(job("1", "a"), job("2", "a"))
    bench.desk.stop()
    bench.desk.dropped(list(bench.inner))
    assert bench.listener.ids("dropped") == ["1", "2"]


def test_a_defect_leaves_no_job_without_a_runner(bench: Bench) -> None:
    bench.tower.look = broken  # type: ignore[method-assign]
    one = job("1", "a")
    bench.desk.start()
    bench.desk.submit(one)
    poll_until(lambda: bench.inner, "the runner has the job", 10)
    bench.desk.close()
    assert bench.inputs() == [["a"]]


def test_what_is_computed_already_is_not_computed_again_after_a_defect(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(bench.tower, "renew", broken)
        bench.break_down(job("0", "b"), one := job("1", "a", "b"))
    assert bench.inputs() == [["b"], ["a"]]
    bench.compute()
    assert bench.said(one) == ["a", "b"]
    assert sorted(bench.listener.ids("finished")) == ["0", "1"]


def test_what_was_waited_for_is_computed_after_a_defect(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.tower, "look", lambda alias, keys, lane: [0] * len(keys))
    bench.arrive(waits := job("1", "a"))
    assert bench.inner == []
    bench.now_s += 1.0
    monkeypatch.setattr(bench.tower, "look", broken)
    bench.break_down()
    assert bench.inputs() == [["a"]]
    bench.compute()
    assert bench.said(waits) == ["a"]
    assert bench.desk._waiting.flights == []


def test_what_another_worker_computes_is_still_waited_for_after_a_defect(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.tower, "look", lambda alias, keys, lane: [0] * len(keys))
    with monkeypatch.context() as patched:
        patched.setattr(bench.tower, "renew", broken)
        bench.break_down(waits := job("1", "a", "b"))
    assert bench.inner == []
    bench.tower.known = {
        flight.key: sealed(flight.key, {"said": flight.value}) for flight in bench.desk._flights.values()
    }
    monkeypatch.undo()
    bench.later(1.0)
    assert bench.said(waits) == ["a", "b"]
    assert bench.inner == []


def test_a_defect_in_one_jobs_seats_holds_up_no_other(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    of = bench.desk._addresses.of
    monkeypatch.setattr(
        bench.desk._addresses, "of", lambda job, revision: broken() if job.id == "2" else of(job, revision)
    )
    jobs = [job("1", "a"), job("2", "b"), job("3", "c", cache="refresh")]
    bench.break_down(*jobs)
    assert bench.inputs() == [["a"], ["b"], ["c"]]
    assert bench.inner[1:] == jobs[1:], "they have no seats"


def test_a_job_that_gets_no_seats_is_run_as_it_is(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.desk._addresses, "of", broken)
    one = job("1", "a")
    bench.desk.start()
    bench.desk.submit(one)
    poll_until(lambda: bench.inner, "the runner has the job", 10)
    bench.desk.close()
    assert bench.inner == [one]
