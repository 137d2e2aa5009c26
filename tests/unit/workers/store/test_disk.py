"""Revisions on disk: whole or absent, held or removable, within their budget, whoever is killed."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cortex_tasks.errors import ModelUnavailable
from tests.support.snapshots import put, snapshot
from workers.store.disk import Disk
from workers.store.locks import FileLock
from workers.store.manifest import digest_of


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_000_000.0

    def __call__(self) -> float:
        self.now_s += 1.0
        return self.now_s


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path / "models", max_bytes=10**9, clock=Clock())


def small(root: Path, max_bytes: int = 100_000) -> Disk:
    return Disk(root / "models", max_bytes=max_bytes, clock=Clock())


def digests(disk: Disk) -> list[str]:
    return [stored.digest for stored in disk.revisions()]


# ------------------------------------------------------------------------------------- whole or absent


def test_a_published_revision_is_found_by_its_source_and_holds_its_files(disk: Disk, tmp_path: Path) -> None:
    entries = snapshot(tmp_path / "origin")
    published = put(disk)
    assert published.digest == digest_of(entries)
    assert disk.digest_for("key-0") == published.digest
    held = disk.open(published.digest)
    assert held is not None
    assert held.entries == entries
    assert (held.path / "model.safetensors").read_bytes() == (tmp_path / "origin/model.safetensors").read_bytes()
    assert held.size_bytes == sum(entry.size_bytes for entry in entries)


def test_what_was_never_fetched_is_absent(disk: Disk) -> None:
    assert disk.digest_for("unheard") is None
    assert disk.open("0" * 64) is None
    assert disk.revisions() == []


def test_a_fetch_that_fails_leaves_nothing(disk: Disk) -> None:
    def fetch() -> None:
        with disk.fetching("key", 1.0) as partial:
            snapshot(partial)
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        fetch()
    assert disk.revisions() == []
    assert list((disk.root / "partial").iterdir()) == []


def test_one_content_of_two_sources_is_one_revision(disk: Disk) -> None:
    first = put(disk, 1)
    with disk.fetching("mirror", 1.0) as partial:
        second = disk.publish(partial, snapshot(partial, 1), "s3:bucket/model", "mirror")
    assert first.digest == second.digest
    [stored] = disk.revisions()
    assert stored.sources == ("hub:org/model-1", "s3:bucket/model")


@pytest.mark.parametrize("damage", ["torn", "flipped", "gone", "no manifest", "foreign manifest", "escaping manifest"])
def test_a_damaged_revision_is_not_served_and_can_be_fetched_again(disk: Disk, damage: str) -> None:
    held = put(disk)
    held.release()
    weights, manifest = held.path / "model.safetensors", held.path.parent / "manifest.json"
    content = weights.read_bytes()
    match damage:
        case "torn":
            weights.write_bytes(content[:-1])
        case "flipped":
            weights.write_bytes(b"X" + content[1:])
            later = manifest.stat().st_mtime + 10
            os.utime(weights, (later, later))
        case "gone":
            weights.unlink()
        case "no manifest":
            manifest.write_bytes(b"{}")
        case "foreign manifest":
            manifest.write_text(json.dumps({"files": [["config.json", 2, "0" * 64]]}))
        case "escaping manifest":
            manifest.write_text(json.dumps({"files": [["../../escaped", 2, "0" * 64]]}))
    assert disk.open(held.digest) is None
    assert disk.revisions() == []
    again = put(disk)
    assert again.digest == held.digest
    assert (again.path / "model.safetensors").read_bytes() == content


def test_verify_reads_every_byte(disk: Disk) -> None:
    held = put(disk)
    assert disk.verify(held.digest) == []
    stat = (held.path / "model.safetensors").stat()
    content = (held.path / "model.safetensors").read_bytes()
    (held.path / "model.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(held.path / "model.safetensors", ns=(stat.st_mtime_ns, stat.st_mtime_ns))
    assert disk.verify(held.digest) == ["model.safetensors"]


def test_a_damaged_revision_is_replaced_by_a_whole_one_though_it_is_held(disk: Disk) -> None:
    held = put(disk)
    (held.path / "config.json").unlink()
    again = put(disk)
    assert disk.verify(again.digest) == []


# ------------------------------------------------------------------------------------------- clean-up


def test_the_clean_up_begins_at_its_threshold_and_takes_the_longest_unused(tmp_path: Path) -> None:
    disk = small(tmp_path)
    for seed in range(8):
        put(disk, seed).release()
    oldest, second, *others = digests(disk)
    opened = disk.open(oldest)  # now the latest used
    assert opened is not None
    opened.release()
    assert disk.make_room(4_000, "m") == []
    [gone] = disk.make_room(10_000, "m")
    assert gone.digest == second
    assert digests(disk) == [*others, oldest]


def test_the_clean_up_passes_by_what_is_held_or_pinned(tmp_path: Path) -> None:
    evicted: list[str] = []
    disk = Disk(tmp_path, max_bytes=60_000, clock=Clock(), on_evicted=lambda one: evicted.append(one.digest))
    held = put(disk, 0)
    pinned, loose, latest = (put(disk, seed) for seed in (1, 2, 3))
    for one in (pinned, loose, latest):
        one.release()
    disk.pin(pinned.digest)
    disk.make_room(20_000, "m")
    assert evicted == [loose.digest]
    assert not disk.remove(held.digest)
    assert disk.remove(pinned.digest), "whoever asks for it by name may remove a pinned one"
    held.release()
    disk.pin(latest.digest)
    disk.pin(latest.digest, pinned=False)
    disk.make_room(45_000, "m")
    assert set(evicted) == {loose.digest, held.digest, latest.digest}


def test_a_newcomer_that_cannot_fit_says_what_it_needs_and_what_there_is(tmp_path: Path) -> None:
    disk = small(tmp_path)
    put(disk, 0, 50_000)
    with pytest.raises(ModelUnavailable, match=r"model x needs 0\.1 MB in .*, which has room for 0\.0 MB") as caught:
        disk.make_room(60_000, "model x")
    assert caught.value.details["transient"]
    assert caught.value.details["needed_bytes"] == 60_000


def test_a_file_system_smaller_than_the_budget_is_the_budget(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 2_000

    monkeypatch.setattr("workers.store.disk.shutil.disk_usage", lambda _: Usage)
    put(disk, 0).release()
    kept = put(disk, 1)
    assert len(disk.make_room(1, "m")) == 1
    assert digests(disk) == [kept.digest]


# ------------------------------------------------------------------------------ several processes of a host

_PULLER = """
import sys, time
from pathlib import Path
from tests.support.snapshots import snapshot
from workers.store.disk import Disk
disk = Disk(Path(sys.argv[1]), max_bytes=10**9)
with disk.fetching("key-0", 1.0) as partial:
    snapshot(partial)
    print("fetching", flush=True)
    time.sleep(600)
"""

_HOLDER = """
import sys, time
from pathlib import Path
from workers.store.disk import Disk
held = Disk(Path(sys.argv[1]), max_bytes=10**9).open(sys.argv[2])
print(held is not None, flush=True)
time.sleep(600)
"""


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def start(processes: list[subprocess.Popen[str]], code: str, *arguments: str) -> tuple[subprocess.Popen[str], str]:
    root = Path(__file__).resolve().parents[4]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE, text=True, cwd=root, env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    processes.append(process)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def test_a_puller_that_is_killed_leaves_no_torn_revision_and_no_lock(
    disk: Disk, processes: list[subprocess.Popen[str]]
) -> None:
    puller, said = start(processes, _PULLER, str(disk.root))
    assert said == "fetching"
    with pytest.raises(ModelUnavailable, match="another process"), disk.fetching("key-0", 0.0):
        pass
    os.kill(puller.pid, signal.SIGKILL)
    puller.wait()
    assert list((disk.root / "partial").iterdir()), "it was killed in the middle"
    assert disk.revisions() == []
    held = put(disk)
    assert disk.verify(held.digest) == []
    assert list((disk.root / "partial").iterdir()) == []


def test_what_a_killed_puller_left_is_wiped_by_the_next_clean_up(
    disk: Disk, processes: list[subprocess.Popen[str]]
) -> None:
    puller, _ = start(processes, _PULLER, str(disk.root))
    disk.wipe_leftovers()
    assert list((disk.root / "partial").iterdir()), "it is still at work"
    os.kill(puller.pid, signal.SIGKILL)
    puller.wait()
    disk.make_room(0, "m")
    assert list((disk.root / "partial").iterdir()) == []


def test_a_revision_that_another_process_holds_stays_until_that_is_killed(
    disk: Disk, processes: list[subprocess.Popen[str]]
) -> None:
    held = put(disk)
    held.release()
    holder, said = start(processes, _HOLDER, str(disk.root), held.digest)
    assert said == "True"
    assert [stored.held for stored in disk.revisions()] == [True]
    assert not disk.remove(held.digest)
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert disk.remove(held.digest)


def test_a_lock_waits_for_its_holder_and_no_longer_than_it_may(tmp_path: Path) -> None:
    first = FileLock.take(tmp_path / "lock")
    assert first is not None
    now_s = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now_s
        now_s += seconds
        if now_s > 1.0:
            first.release()

    assert FileLock.take(tmp_path / "lock", wait_s=0.5, clock=lambda: now_s, sleep=sleep) is None
    assert FileLock.take(tmp_path / "lock", wait_s=5.0, clock=lambda: now_s, sleep=sleep) is not None
    assert 1.0 < now_s < 1.2


def test_shared_locks_live_side_by_side(tmp_path: Path) -> None:
    first, second = (FileLock.take(tmp_path / "lock", shared=True) for _ in range(2))
    assert first is not None
    assert second is not None
    assert FileLock.take(tmp_path / "lock") is None
    first.release()
    first.release()
    assert FileLock.take(tmp_path / "lock") is None
    second.release()
    assert FileLock.take(tmp_path / "lock") is not None
