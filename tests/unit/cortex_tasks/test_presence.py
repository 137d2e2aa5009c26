"""When a worker's card no longer speaks for the worker."""

from __future__ import annotations

import pytest

from cortex_tasks.presence import PRESENCE_TTL_S, SILENT_AFTER_S, WorkerCard
from workers import health

NOW_S = 1_000.0


@pytest.mark.parametrize(("seen_at_s", "silent"), [(NOW_S, False), (NOW_S - 6, False), (NOW_S - 6.1, True)])
def test_a_card_that_is_not_renewed_is_silent(seen_at_s: float, silent: bool) -> None:
    card = WorkerCard(
        node="a@h", image="nlp", host="h", pid=1, state="ready", queues=(), models=(), started_at=0, seen_at=seen_at_s
    )
    assert card.is_silent(NOW_S) is silent


def test_a_late_card_is_not_a_silent_worker() -> None:
    assert 2 * health._INTERVAL_S < SILENT_AFTER_S < PRESENCE_TTL_S
