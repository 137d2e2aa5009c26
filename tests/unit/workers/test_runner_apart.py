"""Batches that run apart, on the threads of a crew: when they do, what may run beside them, and whose answers come."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cortex_tasks.errors import CortexError, InferenceFailed, InvalidInput
from cortex_tasks.payloads import Params
from tests.support.stub_models import PATIENCE_S, Listener, StubAdapter, fleet_of, job, ready, registry_of, started
from tests.support.worker_process import poll_until
from workers.adapters import Crew, Item
from workers.admission import Slot
from workers.batching import BRIEF_AFTER, Batch
from workers.budget import BudgetLearner
from workers.runner import Runner
from workers.runtime import Job

#: Four texts of ten characters fill a batch, two of them a part of it.
BATCHING = {"max_items": 8, "max_padded_tokens": 40}


class Pass:
    def __init__(self, model: str, texts: list[str]) -> None:
        self.model, self.texts, self.thread = model, texts, threading.current_thread().name
        self.may_end = threading.Event()


class Passes:
    """The forward passes that run at the moment, of all models."""

    def __init__(self) -> None:
        self.running: list[Pass] = []
        #: Each with those that ran when it began.
        self.began: list[tuple[Pass, list[Pass]]] = []
        self.held = True
        self._changed = threading.Condition()

    def run(self, one: Pass) -> None:
        with self._changed:
            self.began.append((one, list(self.running)))
            self.running.append(one)
            self._changed.notify_all()
        if self.held:
            assert one.may_end.wait(PATIENCE_S), "nobody let the pass end"
        with self._changed:
            self.running.remove(one)
            self._changed.notify_all()

    def wait_for(self, *texts: Sequence[str]) -> list[Pass]:
        """The passes that run once they are these, in this order."""
        expected = sorted(map(list, texts))
        with self._changed:
            there = self._changed.wait_for(lambda: sorted(one.texts for one in self.running) == expected, PATIENCE_S)
            assert there, f"{[one.texts for one in self.running]} run, not {expected}"
            return [next(one for one in self.running if one.texts == list(part)) for part in texts]

    def let_all_end(self) -> None:
        self.held = False
        for one in list(self.running):
            one.may_end.set()


class WithPasses(StubAdapter):
    def __init__(self, model: str, passes: Passes, crew: Crew | None) -> None:
        super().__init__()
        self.model, self.all_passes, self.crew = model, passes, crew

    def forward(self, task: str, items: Sequence[Item], params: Params) -> Sequence[Any]:
        texts = [item.data for item in items]
        self.all_passes.run(Pass(self.model, texts))
        if any("breaks" in text for text in texts):
            raise RuntimeError("cannot take it")
        return [InvalidInput(text) if "fails" in text else {"said": text} for text in texts]


class Bench:
    """Model m has a crew, model n has none."""

    def __init__(self, executor: ThreadPoolExecutor, threads: int = 2) -> None:
        self.registry = registry_of(fleet_of(m={"batching": BATCHING}, n={"batching": BATCHING}))
        self.passes, self.events = Passes(), Listener()
        self.adapter = WithPasses("m", self.passes, Crew(threads, executor))
        ready(self.registry, "m", self.adapter)
        ready(self.registry, "n", WithPasses("n", self.passes, None))
        self.runner = Runner("test", self.registry, self.events)

    def submit(self, *jobs: Job) -> None:
        for one in jobs:
            self.runner.submit(one)

    def running(self) -> AbstractContextManager[None]:
        return started(self.runner, self.passes.let_all_end)


@pytest.fixture
def bench() -> Iterator[Bench]:
    with ThreadPoolExecutor(2, thread_name_prefix="part") as executor:
        yield Bench(executor)


def texts(*numbers: int) -> list[str]:
    return [f"{number:010}" for number in numbers]


def test_little_runs_on_the_runners_thread_with_the_whole_budget(bench: Bench) -> None:
    bench.submit(job("all", *texts(0, 1, 2, 3)))
    with bench.running():
        [one] = bench.passes.wait_for(texts(0, 1, 2, 3))
    assert one.thread == "runner-test"


def test_where_more_than_a_batch_waits_parts_of_it_run_apart(bench: Bench) -> None:
    many = job("many", *texts(0, 1, 2, 3, 4, 5, 6))
    bench.submit(many)
    with bench.running():
        first, second = bench.passes.wait_for(texts(0, 1), texts(2, 3))
        assert {first.thread, second.thread} == {"part_0", "part_1"}
        assert [running.model for running in bench.runner.running] == ["m", "m"]
        # Who is through takes the next one; the other still runs.
        second.may_end.set()
        _, third = bench.passes.wait_for(texts(0, 1), texts(4, 5))
        assert third.thread == second.thread
        third.may_end.set()
        _, last = bench.passes.wait_for(texts(0, 1), texts(6))
        last.may_end.set()
        bench.passes.wait_for(texts(0, 1))
        first.may_end.set()
        bench.events.wait("finished", "many")
    assert [outcome["said"] for outcome in many.outcomes] == texts(0, 1, 2, 3, 4, 5, 6)
    assert bench.events.told == [("started", "many"), ("finished", "many")]
    model = bench.registry.model("m")
    assert (model.jobs, model.items, model.batches) == (1, 7, 4)
    assert many.watch.batch_items == 2
    assert 0 < many.watch.forward_ms / 1e3 < model.forward_s
    assert bench.runner.running == ()


def test_passes_that_begin_together_look_at_their_job_one_after_the_other(bench: Bench) -> None:
    """Each of them asks first whether the job is still wanted, and says that it starts if the other has not."""
    both, met = threading.Barrier(2), []

    def unwanted(job: Job) -> bool:
        with suppress(threading.BrokenBarrierError):
            both.wait(0.2)
            met.append(job.id)
        return False

    many = job("many", *texts(*range(8)))
    bench.submit(many)
    bench.runner._admission.admit()
    bench.events.unwanted = unwanted  # type: ignore[method-assign]
    bench.passes.held = False
    with bench.running():
        bench.events.wait("finished", "many")
    assert met == []
    assert bench.events.told == [("started", "many"), ("finished", "many")]


def test_what_comes_while_a_pass_runs_apart_takes_the_thread_that_is_free(bench: Bench) -> None:
    bench.submit(job("many", *texts(0, 1, 2, 3, 4)))
    with bench.running():
        first, second = bench.passes.wait_for(texts(0, 1), texts(2, 3))
        second.may_end.set()
        _, third = bench.passes.wait_for(texts(0, 1), texts(4))
        third.may_end.set()
        bench.passes.wait_for(texts(0, 1))
        bench.submit(job("late", *texts(5)))
        _, late = bench.passes.wait_for(texts(0, 1), texts(5))
        late.may_end.set()
        bench.events.wait("finished", "late")
        first.may_end.set()
        bench.events.wait("finished", "many")
        # Nothing runs any more: the next text gets all cores.
        poll_until(lambda: bench.runner._apart == 0, "both threads of the crew are free")
        bench.submit(job("idle", *texts(6)))
        [alone] = bench.passes.wait_for(texts(6))
        assert alone.thread == "runner-test"


def test_others_who_need_the_threads_get_them_while_more_batches_wait(bench: Bench) -> None:
    """A model that is being loaded warms up on them, and its first job waits for that."""
    assert bench.adapter.crew is not None
    bench.submit(job("many", *texts(*range(12))))
    with bench.running():
        first, second = bench.passes.wait_for(texts(0, 1), texts(2, 3))
        parts = [bench.adapter.crew.executor.submit(threading.get_ident) for _ in range(2)]
        first.may_end.set()
        second.may_end.set()
        for part in parts:
            part.result(PATIENCE_S)
        # They came before the next batches, of which there are two more after these.
        bench.passes.wait_for(texts(4, 5), texts(6, 7))


@pytest.mark.parametrize("kind", ["a suspect", "a model without a crew"])
def test_what_must_run_by_itself_waits_for_the_passes_apart_and_none_joins_it(bench: Bench, kind: str) -> None:
    more = {"suspect": True} if kind == "a suspect" else {"model": "n"}
    bench.submit(job("many", *texts(0, 1, 2, 3, 4)))
    with bench.running():
        first, second = bench.passes.wait_for(texts(0, 1), texts(2, 3))
        # Its deadline is the earliest.
        bench.submit(job("by itself", *texts(9), deadline_s=1.0, **more))
        poll_until(lambda: not bench.runner._admission.has_incoming, "it is in line")
        second.may_end.set()
        bench.passes.wait_for(texts(0, 1))
        first.may_end.set()
        [alone] = bench.passes.wait_for(texts(9))
        assert alone.thread == "runner-test"
        alone.may_end.set()
        bench.passes.wait_for(texts(4))
    assert next(beside for one, beside in bench.passes.began if one is alone) == []


def test_a_suspect_that_lines_up_while_a_crew_takes_its_next_batch_runs_by_itself(bench: Bench) -> None:
    admission, take = bench.runner._admission, bench.runner._admission.take
    bench.submit(job("many", *texts(*range(8))))

    def slowly(parts: int = 1, sharers: int = 1) -> Batch[Slot] | None:
        if bench.passes.running and not lines_up.ident:
            admission.put(job("suspect", *texts(9), suspect=True, deadline_s=1.0))
            lines_up.start()
            lines_up.join(0.2)
        return take(parts, sharers)

    with bench.running():
        first, second = bench.passes.wait_for(texts(0, 1), texts(2, 3))
        lines_up = threading.Thread(target=admission.admit)
        admission.take = slowly  # type: ignore[method-assign]
        second.may_end.set()
        _, third = bench.passes.wait_for(texts(0, 1), texts(4, 5))
        lines_up.join(PATIENCE_S)
        first.may_end.set()
        third.may_end.set()
        [alone] = bench.passes.wait_for(texts(9))
        assert alone.thread == "runner-test"


def test_texts_that_the_inference_buffer_holds_one_at_a_time_run_by_themselves(bench: Bench) -> None:
    bench.registry.model("m").buffer_tokens = 20
    bench.submit(job("two fit", *texts(*range(4))))
    with bench.running():
        for one in bench.passes.wait_for(texts(0), texts(1)):
            one.may_end.set()
        for one in bench.passes.wait_for(texts(2), texts(3)):
            one.may_end.set()
        bench.events.wait("finished", "two fit")
        long = [f"{text}+" for text in texts(0, 1, 2)]
        bench.submit(job("one fits", *long))
        for text in long:
            [one] = bench.passes.wait_for([text])
            assert one.thread == "runner-test"
            one.may_end.set()
        bench.events.wait("finished", "one fits")


def test_bulk_in_a_hurry_runs_by_itself(bench: Bench) -> None:
    """Interactive texts come, and each waits for the pass that runs: it had better be over soon."""
    bench.passes.held = False
    bench.submit(job("interactive", *texts(99)))
    with bench.running():
        bench.events.wait("finished", "interactive")
        count = 4 * BRIEF_AFTER + 5
        bench.submit(job("bulk", *texts(*range(count)), lane="bulk"))
        bench.events.wait("finished", "bulk")
    threads = [one.thread for one, _ in bench.passes.began]
    assert threads[: BRIEF_AFTER + 1] == ["runner-test"] * (BRIEF_AFTER + 1)
    # Five are left, and no interactive text has come for long.
    assert threads[BRIEF_AFTER + 1].startswith("part_")


def test_a_batch_that_breaks_fails_its_own_items_only(bench: Bench) -> None:
    bench.passes.held = False
    mixed = job("mixed", *texts(0, 1), "breaks-001", *texts(2, 3), "fails-0001", *texts(4, 5))
    bench.submit(mixed)
    with bench.running():
        bench.events.wait("finished", "mixed")
    kinds = [type(outcome) for outcome in mixed.outcomes]
    assert kinds == [dict, dict, InferenceFailed, dict, dict, InvalidInput, dict, dict]


def test_a_defect_on_a_crews_thread_gives_an_answer_and_the_runner_lives_on(bench: Bench) -> None:
    bench.passes.held = False
    many, later = job("many", *texts(*range(9))), job("later", *texts(0))
    answers = bench.adapter.finish
    told = iter([LookupError("a defect")])

    def failing(*given: Any) -> Any:
        if error := next(told, None):
            bench.registry.model("m").adapter = None
            raise error
        return answers(*given)

    bench.adapter.finish = failing  # type: ignore[method-assign]
    bench.submit(many)
    with bench.running():
        bench.events.wait("finished", "many")
        bench.registry.model("m").adapter = bench.adapter
        bench.submit(later)
        bench.events.wait("finished", "later")
    assert bench.events.ids("finished") == ["many", "later"]
    assert many.failure is not None or any(isinstance(outcome, CortexError) for outcome in many.outcomes)
    assert later.outcomes == [{"said": text} for text in texts(0)]


def test_a_stop_lets_both_passes_end_and_begins_no_third(bench: Bench) -> None:
    bench.submit(job("first", *texts(0, 1)), job("second", *texts(2, 3)), job("third", *texts(4, 5)))
    with bench.running():
        first, second = bench.passes.wait_for(texts(0, 1), texts(2, 3))
        bench.runner.stop()
        second.may_end.set()
        bench.events.wait("finished", "second")
        assert bench.runner.is_alive()
        first.may_end.set()
        bench.runner.join(PATIENCE_S)
    assert sorted(bench.events.ids("finished")) == ["first", "second"]
    assert bench.events.ids("dropped") == ["third"]
    assert len(bench.passes.began) == 2


def test_only_batches_apart_teach_the_budget_and_count_as_one_of_several(bench: Bench) -> None:
    seen: list[tuple[int, int]] = []

    class Noting(BudgetLearner):
        def observe(self, budget_tokens: int, tokens: int, seconds: float) -> None:
            seen.append((budget_tokens, tokens))

    model = bench.registry.model("m")
    model.learners = {"embed": Noting(40)}
    bench.submit(job("little", *texts(9)))
    with bench.running():
        bench.passes.wait_for(texts(9))[0].may_end.set()
        bench.events.wait("finished", "little")
        bench.submit(job("many", *texts(*range(7))))
        first, second = bench.passes.wait_for(texts(0, 1), texts(2, 3))
        second.may_end.set()
        bench.passes.wait_for(texts(0, 1), texts(4, 5))[1].may_end.set()
        # The last one is not full.
        bench.passes.wait_for(texts(0, 1), texts(6))[1].may_end.set()
        first.may_end.set()
        poll_until(lambda: many_done(bench), "all is learned")
    assert seen == [(40, 40)] * 3


def many_done(bench: Bench) -> bool:
    return "many" in bench.events.ids("finished") and bench.runner._apart == 0


jobs_of_any_kind = st.lists(
    st.tuples(
        st.sampled_from(["m", "m", "m", "n"]),
        st.sampled_from(["interactive", "bulk"]),
        st.integers(1, 30),
        st.booleans(),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(jobs_of_any_kind, st.integers(2, 4))
def test_every_job_starts_and_finishes_once_with_its_own_answers(
    kinds: list[tuple[str, Any, int, bool]], threads: int
) -> None:
    with ThreadPoolExecutor(threads) as executor:
        bench = Bench(executor, threads)
        bench.passes.held = False
        jobs = [
            job(str(at), *(f"{at}-{n:07}" for n in range(count)), model=model, lane=lane, suspect=suspect)
            for at, (model, lane, count, suspect) in enumerate(kinds)
        ]
        with bench.running():
            bench.submit(*jobs)
            bench.events.wait("finished", *(one.id for one in jobs))
        assert sorted(bench.events.ids("started")) == sorted(one.id for one in jobs)
        assert sorted(bench.events.ids("finished")) == sorted(one.id for one in jobs)
        for one in jobs:
            assert one.outcomes == [{"said": text} for text in one.inputs]
        for one, beside in bench.passes.began:
            suspects = [it for it in (one, *beside) if kinds[int(it.texts[0].split("-")[0])][3]]
            by_itself = suspects or any(it.model == "n" for it in (one, *beside))
            assert len(beside) < (1 if by_itself else threads)
        assert bench.registry.model("m").items == sum(count for model, _, count, _ in kinds if model == "m")
