"""A worker that takes and does not finish is told from one that has nothing to do."""

from __future__ import annotations

from workers.progress import Progress


def test_nothing_finished_while_jobs_are_in_hand_is_a_standstill() -> None:
    progress = Progress()
    assert progress.update(10.0, done=5, in_hand=2, excused=False) == 0.0
    assert progress.update(30.0, done=5, in_hand=2, excused=False) == 20.0
    assert progress.update(31.0, done=6, in_hand=2, excused=False) == 0.0
    assert progress.update(41.0, done=6, in_hand=9, excused=False) == 10.0


def test_an_idle_worker_does_not_stand_still() -> None:
    progress = Progress()
    for now_s in range(0, 500, 50):
        assert progress.update(float(now_s), done=5, in_hand=0, excused=False) == 0.0
    # Nor is the time before a job came counted against it.
    assert progress.update(452.0, done=5, in_hand=1, excused=False) == 2.0


def test_a_long_pass_a_load_and_a_redis_that_is_away_are_excused() -> None:
    progress = Progress()
    progress.update(0.0, done=5, in_hand=2, excused=False)
    assert progress.update(300.0, done=5, in_hand=2, excused=True) == 0.0
    assert progress.update(310.0, done=5, in_hand=2, excused=False) == 10.0
