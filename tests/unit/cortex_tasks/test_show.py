"""Answers for people (``cortex run`` shows them; see test_cli_run) and as records."""

from __future__ import annotations

from datetime import date, timedelta

from cortex_tasks import payloads as p
from cortex_tasks.echo import DIMENSIONS
from cortex_tasks.errors import InvalidInput
from cortex_tasks.show import as_record, highlighted, show, timings_line
from cortex_tasks.terminal import Style

HEAD = {"model": "m", "revision": "0123456789", "timings": p.Timings(queue_ms=1.25, forward_ms=8, batch_items=4)}


def test_a_record_of_an_error_is_its_wire_form() -> None:
    assert as_record("a", InvalidInput("too long", {"limit": 5})) == {
        "id": "a", "error": {"code": "invalid_input", "message": "too long", "details": {"limit": 5}},
    }  # fmt: skip


def test_a_record_holds_no_bytes() -> None:
    features = p.Features(**HEAD, data=bytes(8 * DIMENSIONS), shape=(2, DIMENSIONS))
    record = as_record(3, features)
    assert record["value"] == {"shape": [2, DIMENSIONS], "truncated": False, "values": [0.0] * 2 * DIMENSIONS}


def test_timings_name_the_stages_and_the_batch() -> None:
    assert timings_line(HEAD["timings"]) == "queue 1.2 · prepare 0.0 · forward 8.0 · finish 0.0 ms, batch of 4"
    assert timings_line(p.Timings(cached="l2")).endswith("ms, from the l2 cache")


def test_overlapping_entities_are_marked_once() -> None:
    entities = [
        p.Entity(text="New York", label="GPE", start=0, end=8),
        p.Entity(text="York", label="GPE", start=4, end=8),
        p.Entity(text="May", label="DATE", start=12, end=15),
    ]
    assert highlighted("New York in May.", entities, Style()) == "[New York GPE] in [May DATE]."
    assert "\033[" in highlighted("New York in May.", entities, Style(coloured=True))


def test_a_week_is_shown_by_its_days() -> None:
    days = [date(2024, 1, 1) + timedelta(days=n) for n in range(28)]
    answer = p.Decomposition(
        **HEAD,
        ds=tuple(f"{day.isoformat()}T00:00:00" for day in days),
        y=(1.0,) * 28,
        trend=(1.0,) * 28,
        seasonalities={"weekly": tuple(float(day.weekday() == 6) for day in days)},
        residual=(0.0,) * 28,
    )
    weekly = next(line for line in show(None, answer, Style()) if line.startswith("weekly"))
    assert "Mo ▁  Tu ▁  We ▁  Th ▁  Fr ▁  Sa ▁  Su █" in weekly
    assert weekly.endswith("0.00 … 1.00")
