"""A cache that fails is skipped, tried now and then by one caller, and used again when it answers."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest

from cortex_tasks.cache.breaker import LONGEST_PAUSE_S, TELL_EVERY_S, Breaker


class FilterOf(logging.Filter):
    def __init__(self, hear: Callable[[logging.LogRecord], bool]) -> None:
        super().__init__()
        self._hear = hear

    def filter(self, record: logging.LogRecord) -> bool:
        return self._hear(record)


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_after_a_failure_nobody_asks_until_the_pause_is_over_and_then_one_does() -> None:
    clock = Clock()
    breaker = Breaker("redis", clock)
    assert breaker.allows()
    breaker.failed(OSError("down"))
    assert not breaker.allows()
    assert breaker.open
    clock.now_s += 0.11
    assert breaker.allows()
    assert not breaker.allows()
    breaker.succeeded()
    assert breaker.allows()
    assert not breaker.open


def test_pauses_grow_to_a_limit_and_begin_anew_after_a_success() -> None:
    clock = Clock()
    breaker = Breaker("redis", clock)
    for _ in range(20):
        breaker.failed(OSError())
    clock.now_s += LONGEST_PAUSE_S - 0.01
    assert not breaker.allows()
    clock.now_s += 0.02
    assert breaker.allows()
    breaker.succeeded()
    breaker.failed(OSError())
    clock.now_s += 0.11
    assert breaker.allows()


def test_one_line_says_that_it_fails_and_one_that_it_is_back(caplog: pytest.LogCaptureFixture) -> None:
    breaker = Breaker("redis://host", Clock())
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            breaker.failed(OSError("no route"))
        breaker.succeeded()
        breaker.succeeded()
    assert [record.message.split(" ")[4:6] for record in caplog.records] == [["is", "skipped"], ["answers", "again"]]
    assert breaker.failures == 5


def test_who_hears_of_the_failure_and_asks_again_finds_the_cache_skipped(caplog: pytest.LogCaptureFixture) -> None:
    """A handler of the log that uses the client."""
    breaker = Breaker("redis://host", Clock())
    heard: list[bool] = []

    def hear(record: logging.LogRecord) -> bool:
        heard.append(breaker.allows())
        return True

    with caplog.filtering(FilterOf(hear)):
        breaker.failed(OSError("no route"))
    assert heard == [False]


def test_a_cache_that_comes_and_goes_is_not_spoken_of_each_time(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    breaker = Breaker("redis", clock)
    with caplog.at_level(logging.WARNING):
        for _ in range(4):
            breaker.failed(OSError("slow"))
            breaker.succeeded()
        assert len(caplog.records) == 2
        clock.now_s += TELL_EVERY_S
        breaker.failed(OSError("slow"))
    assert len(caplog.records) == 3
    assert "and 3 times since this was last said" in caplog.text
    assert breaker.failures == 5


def test_an_outage_that_outlasts_a_quiet_failure_is_told(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    breaker = Breaker("redis", clock)
    breaker.failed(OSError("slow"))
    breaker.succeeded()
    breaker.failed(OSError("down"))
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(20):
            clock.now_s += LONGEST_PAUSE_S
            breaker.failed(OSError("down"))
    assert [record.message.split(" ")[4:6] for record in caplog.records] == [["is", "skipped"]]
