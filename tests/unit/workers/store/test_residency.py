"""Who stays in memory: by worth, never in use, pinned always; and how often that means loading again."""

from __future__ import annotations

import pytest

from cortex_tasks.errors import ModelUnavailable
from tests.support.residency_trace import cyclic, loads_by_lru, loads_by_worth, zipf
from workers.store.residency import Residency, Resident


def holding(budget_bytes: int, *residents: Resident) -> Residency:
    return Residency(budget_bytes, 1_800.0, {one.alias: one for one in residents})


def going(residency: Residency, newcomer: Resident, *, patient: bool = True) -> list[str] | None:
    found = residency.room_for(newcomer, patient=patient)
    return None if found is None else [one.alias for one in found]


def test_nobody_goes_while_there_is_room() -> None:
    residency = holding(100, Resident("a", 50))
    assert going(residency, Resident("new", 50)) == []
    assert residency.used_bytes == 50


def test_of_equals_the_longest_unused_goes_and_no_more_than_need_be() -> None:
    residency = holding(100, *(Resident(alias, 30, used_at_s=at) for alias, at in (("a", 3), ("b", 1), ("c", 2))))
    assert going(residency, Resident("new", 20)) == ["b"]
    assert going(residency, Resident("new", 60)) == ["b", "c"]


def test_a_model_with_waiting_jobs_is_not_thrown_out_for_one_that_is_worth_less() -> None:
    busy = Resident("busy", 50, reload_s=2.0, used_at_s=0.0, waiting=40)
    quiet = Resident("quiet", 50, reload_s=2.0, used_at_s=9.0)
    assert going(holding(100, busy, quiet), Resident("new", 50, waiting=1)) == ["quiet"]
    assert going(holding(50, busy), Resident("new", 50, waiting=1)) is None
    assert going(holding(50, busy), Resident("new", 50, reload_s=2.0, waiting=41)) == ["busy"]


def test_worth_is_reload_cost_times_demand_over_bytes() -> None:
    cheap = Resident("cheap", 40, reload_s=1.0, waiting=5, used_at_s=9.0)
    dear = Resident("dear", 40, reload_s=9.0, waiting=5, used_at_s=1.0)
    large = Resident("large", 400, reload_s=9.0, waiting=5, used_at_s=9.0)
    assert sorted((cheap, dear, large), key=lambda one: one.worth) == [large, cheap, dear]
    assert going(holding(480, cheap, dear, large), Resident("new", 10, reload_s=99, waiting=99)) == ["large"]


def test_a_model_in_use_waits_for_its_end_and_goes_only_when_the_newcomer_has_waited() -> None:
    residency = holding(50, Resident("held", 50, holds=1))
    assert going(residency, Resident("new", 50, waiting=9)) is None
    assert going(residency, Resident("new", 50, waiting=9), patient=False) == ["held"]


def test_a_model_that_arrives_stays_however_long_the_newcomer_has_waited() -> None:
    residency = holding(100, Resident("arrives", 60, arriving=True, holds=1), Resident("loose", 40))
    assert going(residency, Resident("new", 40), patient=False) == ["loose"]
    assert going(residency, Resident("new", 50), patient=False) is None


def test_pinned_models_stay_and_count() -> None:
    residency = holding(100, Resident("pinned", 60, pinned=True), Resident("loose", 40))
    assert going(residency, Resident("new", 40)) == ["loose"]
    with pytest.raises(ModelUnavailable, match=r"model 'new' needs .* of which pinned models \(pinned\) take") as told:
        residency.room_for(Resident("new", 41), patient=False)
    assert told.value.details == {"model": "new", "needed_bytes": 41, "limit_bytes": 100}


def test_who_is_idle_goes_but_for_the_pinned_the_used_and_the_wanted() -> None:
    residency = holding(
        100,
        Resident("idle", 1),
        Resident("pinned", 1, pinned=True),
        Resident("held", 1, holds=1),
        Resident("wanted", 1, waiting=1),
        Resident("fresh", 1, used_at_s=1_000.0),
    )
    assert [one.alias for one in residency.idle(1_800.0)] == ["idle"]
    assert residency.idle(1_799.0) == []


@pytest.mark.parametrize(("trace", "lru", "worth"), [(zipf(12, 6_000), 1_014, 301), (cyclic(12, 6_000), 6_000, 306)])
def test_twelve_models_through_room_for_eight(trace: list[int], lru: int, worth: int) -> None:
    """The figures of docs/models.md: with 64 visible jobs, and plain LRU over the same trace."""
    assert loads_by_lru(trace, 8) == lru
    loads, longest_wait = loads_by_worth(trace, 8, 64)
    assert loads == worth
    assert longest_wait < 300, "no job waits for ever because its model is wanted less"
