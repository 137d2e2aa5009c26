"""Cards: read one by one, and when they no longer speak for their worker."""

from __future__ import annotations

import pytest

from cortex_tasks.presence import PRESENCE_TTL_S, SILENT_AFTER_S, WorkerCard, parse_cards
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


def test_a_card_that_cannot_be_read_hides_no_other() -> None:
    card = WorkerCard(
        node="a@h", image="nlp", host="h", pid=1, state="ready", queues=(), models=(), started_at=0, seen_at=0
    )
    good = card.model_dump_json()
    newer = good.replace('"ready"', '"a state of a newer version"')
    more = good.removesuffix("}") + ',"colour":"blue"}'
    assert parse_cards([None, "not json", b"\xff", "[]", newer, good, more.encode()]) == [card, card]
