"""Schedules: what they stand for, and what is none."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from celery.schedules import crontab_parser
from hypothesis import given
from hypothesis import strategies as st

from cortex_tasks.cron import Cron


def at(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


@pytest.mark.parametrize(
    ("schedule", "fits", "does_not"),
    [
        ("0 * * * *", "2026-03-01T07:00:59", "2026-03-01T07:01:00"),
        ("*/15 6-8 * * *", "2026-03-01T08:45", "2026-03-01T09:45"),
        ("5,10-12 * * * *", "2026-03-01T00:11", "2026-03-01T00:06"),
        ("30 2 * * mon-fri", "2026-03-02T02:30", "2026-03-01T02:30"),
        ("0 0 * * 7", "2026-03-01T00:00", "2026-03-02T00:00"),
        ("0 0 1 JAN,jul *", "2026-07-01T00:00", "2026-06-01T00:00"),
        ("50/5 * * * *", "2026-03-01T00:55", "2026-03-01T00:45"),
        # Both days restricted: either of them.
        ("0 0 13 * fri", "2026-03-13T00:00", "2026-03-14T00:00"),
        ("0 0 13 * fri", "2026-03-06T00:00", "2026-03-05T00:00"),
        ("0 0 13 * fri", "2026-05-13T00:00", "2026-05-14T00:00"),
        ("0 0 */2 * fri", "2026-03-13T00:00", "2026-03-06T00:00"),
    ],
)
def test_a_schedule_fits_its_minutes(schedule: str, fits: str, does_not: str) -> None:
    cron = Cron.parse(schedule)
    assert cron.matches(at(fits))
    assert not cron.matches(at(does_not))


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        ("", "has 0 fields"),
        ("* * * *", "has 4 fields"),
        ("@hourly", "has 1 fields"),
        ("60 * * * *", "minute '60' is not within 0 to 59"),
        ("* 24 * * *", "hour '24' is not within 0 to 23"),
        ("* * 0 * *", "day of the month '0'"),
        ("* * * mon *", "month 'mon' is not within"),
        ("* * * * 8", "day of the week '8'"),
        ("jan * * * *", "minute 'jan'"),
        ("*/0 * * * *", "'*/0' is an empty range"),
        ("9-5 * * * *", "'9-5' is an empty range"),
        ("1-5x * * * *", "minute '5x'"),
        ("-5 * * * *", "is none of"),
        ("1,, * * * *", "is none of"),
        ("*/5/5 * * * *", "is none of"),
        ("٣ * * * *", "minute"),
    ],
)
def test_what_is_no_schedule_is_named(schedule: str, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        Cron.parse(schedule)
    assert said in str(caught.value)


numbers = st.integers(0, 59)
parts = st.one_of(
    st.just("*"),
    numbers.map(str),
    st.tuples(numbers, numbers).map(lambda pair: f"{min(pair)}-{max(pair)}"),
    st.integers(1, 59).map(lambda step: f"*/{step}"),
    st.tuples(numbers, numbers, st.integers(1, 59)).map(lambda t: f"{min(t[:2])}-{max(t[:2])}/{t[2]}"),
)


@given(st.lists(parts, min_size=1, max_size=4).map(",".join))
def test_fields_are_read_as_celery_reads_them(field: str) -> None:
    assert Cron.parse(f"{field} * * * *").minutes == crontab_parser(60).parse(field)


def test_the_last_scheduled_moment_within_a_time_is_found_once() -> None:
    cron, start = Cron.parse("0 * * * *"), at("2026-03-01T07:00:00")
    assert cron.latest(start - 1, start) == start
    assert cron.latest(start, start + 3_599) is None
    assert cron.latest(start + 59, start + 3_600) == start + 3_600
    # The worker slept through two of them: it warms once.
    assert cron.latest(start - 10, start + 7_300) == start + 7_200
    assert cron.latest(0.0, start) == start
    assert Cron.parse("0 0 30 2 *").latest(0.0, start) is None
