"""What is reckoned from a worker's cards and the timings in answers."""

from __future__ import annotations

import pytest

from benchmarks.latency import Seen, TimedAnswer, bulk_batch_ms, slowest


def answer(
    latency_ms: float, *, at: float = 0.0, queue_ms: float = 0.0, forward_ms: float = 8.0, batch_items: int = 1
) -> TimedAnswer:
    return {
        "latency_ms": latency_ms,
        "answered_at": at,
        "queue_ms": queue_ms,
        "prepare_ms": 0.5,
        "forward_ms": forward_ms,
        "finish_ms": 0.0,
        "batch_items": batch_items,
    }


def test_a_bulk_batch_is_what_is_left_of_the_passes_without_the_interactive_ones() -> None:
    # 10 of bulk at 20 ms, one of a lone text, one of two texts together; another text came before.
    before, after = Seen(100.0, 50, 4.0), Seen(102.0, 62, 4.0 + 0.200 + 0.008 + 0.012)
    texts = [
        answer(30.0, at=99.9),
        answer(30.0, at=101.0),
        answer(40.0, at=101.5, forward_ms=12.0, batch_items=2),
        answer(41.0, at=101.5, forward_ms=12.0, batch_items=2),
    ]
    assert bulk_batch_ms(before, after, texts) == pytest.approx(20.0)
    assert bulk_batch_ms(before, after, []) == pytest.approx(220 / 12)


def test_the_slowest_twentieth_is_taken_apart() -> None:
    answers = [answer(10.0, queue_ms=1.0) for _ in range(38)]
    answers += [answer(80.0, queue_ms=60.0), answer(100.0, queue_ms=70.0, forward_ms=20.0)]
    assert slowest(answers) == pytest.approx(
        {"whole": 90.0, "queue": 65.0, "prepare": 0.5, "forward": 14.0, "finish": 0.0, "rest": 10.5}
    )
    assert slowest(answers[:1])["whole"] == 10.0
