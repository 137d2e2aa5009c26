"""Entries are whole or absent, built once by many processes, rebuilt when damaged, and bounded."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cortex_tasks.errors import ModelUnavailable
from workers.engines.cache_store import CacheStore, writable_root

KEY = {"model": "m", "engine": "e"}


class Builder:
    """Writes one file and counts how often it was asked."""

    def __init__(self, content: bytes = b"weights" * 100) -> None:
        self.content = content
        self.calls = 0

    def __call__(self, directory: Path) -> Mapping[str, Any]:
        self.calls += 1
        assert list(directory.iterdir()) == []
        (directory / "model.blob").write_bytes(self.content)
        return {"mean_cosine": 0.5}


def _store(root: Path, **limits: Any) -> CacheStore:
    return CacheStore(root, **{"max_bytes": 10**9, "ttl_s": 3600.0, **limits})


def test_an_entry_is_built_once_and_read_afterwards(tmp_path: Path) -> None:
    build = Builder()
    for _ in range(3):
        entry = _store(tmp_path).get(KEY, build)
        assert entry.facts == {"mean_cosine": 0.5}
        assert (entry.path / "model.blob").read_bytes() == build.content
    assert build.calls == 1
    assert _store(tmp_path).get({**KEY, "engine": "other"}, build).path != entry.path
    assert build.calls == 2


@pytest.mark.parametrize("damage", ["torn", "flipped", "gone", "manifest torn", "manifest foreign"])
def test_a_damaged_entry_is_built_again(tmp_path: Path, damage: str) -> None:
    build = Builder()
    path = _store(tmp_path).get(KEY, build).path
    blob, manifest = path / "model.blob", path / "entry.json"
    if damage == "torn":
        blob.write_bytes(build.content[:-1])
    elif damage == "flipped":
        blob.write_bytes(b"X" + build.content[1:])
    elif damage == "gone":
        blob.unlink()
    elif damage == "manifest torn":
        manifest.write_bytes(manifest.read_bytes()[:-20])
    else:
        manifest.write_text(json.dumps([1, 2]))
    entry = _store(tmp_path).get(KEY, build)
    assert build.calls == 2
    assert (entry.path / "model.blob").read_bytes() == build.content


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fail(directory: Path) -> Mapping[str, Any]:
        (directory / "half").write_bytes(b"half")
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        _store(tmp_path).get(KEY, fail)
    assert [path for path in (tmp_path / "engines").iterdir() if path.is_dir()] == []
    assert _store(tmp_path).get(KEY, Builder()).facts


def _build_slowly(root: Path, barrier: Any, log: Path) -> None:
    def build(directory: Path) -> Mapping[str, Any]:
        with log.open("a") as stream:
            stream.write(f"{os.getpid()}\n")
        (directory / "model.blob").write_bytes(os.urandom(3_000_000))
        return {}

    barrier.wait(30)
    _store(root).get(KEY, build)


def test_many_processes_and_threads_build_once(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("spawn")
    barrier, log = fork.Barrier(3), tmp_path / "log"
    processes = [fork.Process(target=_build_slowly, args=(tmp_path, barrier, log)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len(log.read_text().splitlines()) == 1

    build = Builder()
    store = _store(tmp_path)
    threads = [threading.Thread(target=store.get, args=({"other": "key"}, build)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert build.calls == 1


def test_it_forgets_what_is_unused_and_what_is_too_much(tmp_path: Path) -> None:
    now_s = [1_000_000.0]
    store = CacheStore(tmp_path, max_bytes=2_600, ttl_s=100, clock=lambda: now_s[0])
    builders = {name: Builder(b"x" * 1_000) for name in "abc"}
    paths = {}
    for name, build in builders.items():
        now_s[0] += 10
        paths[name] = store.get({"name": name}, build).path
        store.get({"name": "a"}, builders["a"])  # a stays in use
    assert [name for name, path in paths.items() if path.exists()] == ["a", "c"]
    now_s[0] += 200
    last = store.get({"name": "d"}, Builder()).path
    assert [path for path in (tmp_path / "engines").iterdir() if path.is_dir()] == [last]


def test_the_users_own_directory_stands_in_for_one_that_cannot_be_written(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    home = {"HOME": str(tmp_path / "home")}
    assert writable_root(tmp_path / "cache", home) == tmp_path / "cache"
    assert writable_root(blocked, home) == tmp_path / "home/.cache/cortex"
    assert writable_root(blocked, {"XDG_CACHE_HOME": str(tmp_path / "xdg")}) == tmp_path / "xdg/cortex"
    with pytest.raises(ModelUnavailable, match="CORTEX_CACHE_DIR"):
        writable_root(blocked, {"HOME": str(blocked)})
