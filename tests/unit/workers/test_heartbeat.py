"""Heartbeats in files, and what they say of a worker."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from workers import heartbeat
from workers.heartbeat import LATE_S, STALLED_S, Beat, Progress


def mine(**changes: object) -> Beat:
    """A heartbeat of this very process."""
    born = heartbeat.born_ticks(os.getpid())
    assert born is not None
    plain = Beat(os.getpid(), born, "nlp@host", "ready", 100.0, {"minilm": "ready"}, 0.0)
    return replace(plain, **changes)  # type: ignore[arg-type]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    where = tmp_path / "beats"
    heartbeat.write(mine(), where)
    heartbeat.write(mine(state="stopping"), where)
    assert heartbeat.beats(where) == [mine(state="stopping")]
    assert where.stat().st_mode & 0o777 == 0o700
    assert [file.name for file in where.iterdir()] == [f"worker-{os.getpid()}.json"]
    heartbeat.erase(os.getpid(), where)
    assert heartbeat.beats(where) == []


def test_no_directory_is_no_worker(tmp_path: Path) -> None:
    assert heartbeat.beats(tmp_path / "nothing") == []


def test_a_process_that_got_the_pid_of_a_dead_one_does_not_inherit_its_heartbeat(tmp_path: Path) -> None:
    """A container that is started again gives its worker the same pid, and /tmp has survived."""
    heartbeat.write(mine(born_ticks=mine().born_ticks - 1), tmp_path)
    assert heartbeat.beats(tmp_path) == []
    assert list(tmp_path.glob("worker-*")) == []


def test_a_heartbeat_of_a_process_that_ended_is_taken_away(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        born = heartbeat.born_ticks(other.pid)
        assert born is not None
        heartbeat.write(mine(pid=other.pid, born_ticks=born), tmp_path)
        assert len(heartbeat.beats(tmp_path)) == 1
    assert heartbeat.beats(tmp_path) == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}', "\udcff"])
def test_a_file_that_cannot_be_read_is_nobodys(tmp_path: Path, text: str) -> None:
    (tmp_path / "worker-1.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert heartbeat.beats(tmp_path) == []


def test_a_directory_of_somebody_else_is_not_written(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(PermissionError):
        heartbeat.write(mine(), tmp_path / "link")
    assert list(target.iterdir()) == []


def test_a_program_with_odd_brackets_in_its_name_has_a_birth(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = " ".join(str(number) for number in range(3, 53))
    monkeypatch.setattr(Path, "read_text", lambda self, **_: f"7 (odd) name) {fields}")
    assert heartbeat.born_ticks(7) == 22


def test_the_dead_have_no_birth() -> None:
    assert heartbeat.born_ticks(2**22 + 1) is None


# ----------------------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    ("changes", "now_s", "started", "ready", "live"),
    [
        ({}, 101.0, True, True, True),
        ({"state": "starting", "pinned": {"minilm": "loading"}}, 101.0, False, False, True),
        ({"state": "starting", "pinned": {"minilm": "idle"}}, 101.0, False, False, True),
        ({"state": "starting"}, 101.0, True, False, True),
        ({"state": "stopping"}, 101.0, True, False, True),
        ({"pinned": {"minilm": "unavailable"}}, 101.0, True, False, True),
        ({"pinned": {}}, 101.0, True, True, True),
        ({}, 100.0 + LATE_S + 1, True, False, False),
        ({"stalled_s": STALLED_S + 1}, 101.0, True, False, False),
        ({"stalled_s": STALLED_S - 1}, 101.0, True, True, True),
    ],
)
def test_verdicts(changes: dict[str, object], now_s: float, started: bool, ready: bool, live: bool) -> None:
    beat = mine(**changes)
    verdicts = (beat.why_not_started(), beat.why_not_ready(now_s), beat.why_dead(now_s))
    assert tuple(not why for why in verdicts) == (started, ready, live), verdicts


def test_a_reason_names_the_model() -> None:
    assert mine(pinned={"a": "ready", "b": "unavailable"}).why_not_ready(101.0) == "b is unavailable"


# ----------------------------------------------------------------------------------------------- progress


def test_time_counts_only_while_there_is_something_to_do() -> None:
    progress = Progress()
    assert progress.update(0.0, (1,), busy=True) == 0.0
    assert progress.update(10.0, (1,), busy=True) == 10.0
    assert progress.update(11.0, (2,), busy=True) == 0.0
    assert progress.update(15.0, (2,), busy=True) == 4.0
    assert progress.update(20.0, (2,), busy=False) == 0.0
    assert progress.update(23.0, (2,), busy=True) == 3.0
