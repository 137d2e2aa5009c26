"""The disk tier: revisions below one directory, each whole or absent, shared by all processes of a host.

::

    <root>/revisions/<digest>/                its modification time is its last use
    <root>/revisions/<digest>/manifest.json   what it holds
    <root>/revisions/<digest>/files/…         the files, never changed in place: they are memory-mapped
    <root>/refs/<key>.json                    which digest a source and revision stand for
    <root>/pins/<digest>                      the clean-up passes it by
    <root>/locks/<name>.lock                  shared by those who use a revision; exclusive to fetch or remove it
    <root>/partial/<key>/                     what is being fetched, by the holder of the key's lock

A revision appears by one rename, when all of it is on disk. It disappears by one rename as well, and only while
nobody holds it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cortex_tasks.errors import ModelUnavailable
from workers.store.locks import FileLock
from workers.store.manifest import FileEntry, bad_files, digest_of, entries_from_json, entries_to_json

__all__ = ["Disk", "Held", "Stored", "no_room"]

logger = logging.getLogger(__name__)

_MANIFEST: Final = "manifest.json"
_FILES: Final = "files"


@dataclass(slots=True)
class Held:
    """A revision in use: it is not removed until ``release``."""

    digest: str
    path: Path
    entries: tuple[FileEntry, ...]
    _lock: FileLock | None = None

    @property
    def size_bytes(self) -> int:
        return sum(entry.size_bytes for entry in self.entries)

    def release(self) -> None:
        """May be repeated."""
        if self._lock is not None:
            self._lock.release()


@dataclass(frozen=True, slots=True)
class Stored:
    """What is known of a revision on disk. ``used_at_s``: epoch seconds."""

    digest: str
    size_bytes: int
    used_at_s: float
    pinned: bool
    held: bool
    sources: tuple[str, ...]


def no_room(what: str, needed_bytes: int, free_bytes: int, where: Path) -> ModelUnavailable:
    return ModelUnavailable(
        f"{what} needs {needed_bytes / 1e6:,.1f} MB in {where}, which has room for {max(free_bytes, 0) / 1e6:,.1f} MB; "
        "free some (`cortex models gc`, `cortex models evict`) or raise storage_config.model_store.max_size",
        {"transient": True, "needed_bytes": needed_bytes, "free_bytes": max(free_bytes, 0)},
    )


class Disk:
    """Revisions below ``root``, at most ``max_bytes`` of them; clean-up begins at ``threshold`` (0..1) of that."""

    def __init__(
        self,
        root: Path,
        *,
        max_bytes: int,
        threshold: float = 0.85,
        clock: Callable[[], float] = time.time,
        on_evicted: Callable[[Stored], None] = lambda _: None,
    ) -> None:
        """Nothing is made before something is written; a directory that can only be read is fine."""
        self.root = root
        self.max_bytes = max_bytes
        self._threshold = threshold
        self._clock = clock
        self._on_evicted = on_evicted

    # -------------------------------------------------------------------------------------------- reading

    def digest_for(self, key: str) -> str | None:
        """The digest that a source's key stands for on this host."""
        try:
            ref = json.loads((self.root / "refs" / f"{key}.json").read_bytes())
            return str(ref["digest"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def open(self, digest: str) -> Held | None:
        """A revision, held; None when it is absent or damaged (it is taken away then)."""
        try:
            # Somebody who only looks whether it is held has it for a moment.
            lock = FileLock.take(self._lock_path(digest), shared=True, wait_s=1.0)
        except OSError:
            # A read-only disk on which nobody held it before: nobody can remove it either.
            lock = None
        else:
            if lock is None:
                return None  # it is being removed
        held = self._read(digest, lock)
        if held is None and lock is not None:
            lock.release()
        return held

    def _read(self, digest: str, lock: FileLock | None) -> Held | None:
        directory = self.root / "revisions" / digest
        try:
            entries = entries_from_json((directory / _MANIFEST).read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            logger.warning("revision %s has no readable manifest (%s); it is fetched again", digest[:12], error)
            self._discard_damaged(digest, lock)
            return None
        # Whole files were checked when they arrived; a file that was touched since is checked again.
        if digest_of(entries) != digest or (bad := bad_files(directory / _FILES, entries, directory / _MANIFEST)):
            bad = bad if digest_of(entries) == digest else [_MANIFEST]
            logger.warning("revision %s is damaged (%s); it is fetched again", digest[:12], ", ".join(bad))
            self._discard_damaged(digest, lock)
            return None
        self._touch(digest)
        return Held(digest, directory / _FILES, entries, lock)

    def _touch(self, digest: str) -> None:
        now_s = self._clock()
        with contextlib.suppress(OSError):  # read-only
            os.utime(self.root / "revisions" / digest, (now_s, now_s))

    def _discard_damaged(self, digest: str, lock: FileLock | None) -> None:
        """Whoever has it mapped keeps what is mapped: the files are unlinked, not changed."""
        with contextlib.suppress(OSError):
            self._take_away(digest)
        if lock is not None:
            lock.release()

    def revisions(self) -> list[Stored]:
        """Every revision, the longest unused first."""
        sources: dict[str, list[str]] = {}
        for file in (self.root / "refs").glob("*.json"):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                ref = json.loads(file.read_bytes())
                sources.setdefault(str(ref["digest"]), []).append(str(ref["source"]))
        found = []
        for directory in (self.root / "revisions").glob("*"):
            with contextlib.suppress(OSError, ValueError):
                entries = entries_from_json((directory / _MANIFEST).read_bytes())
                digest = directory.name
                found.append(
                    Stored(
                        digest=digest,
                        size_bytes=sum(entry.size_bytes for entry in entries),
                        used_at_s=directory.stat().st_mtime,
                        pinned=(self.root / "pins" / digest).exists(),
                        held=self._is_held(digest),
                        sources=tuple(sorted(sources.get(digest, ()))),
                    )
                )
        return sorted(found, key=lambda stored: (stored.used_at_s, stored.digest))

    def verify(self, digest: str) -> list[str]:
        """The names of files that are absent or not what they should be; every byte is read."""
        directory = self.root / "revisions" / digest
        try:
            entries = entries_from_json((directory / _MANIFEST).read_bytes())
        except (OSError, ValueError):
            return [_MANIFEST]
        return bad_files(directory / _FILES, entries, None)

    def _is_held(self, digest: str) -> bool:
        try:
            lock = FileLock.take(self._lock_path(digest))
        except OSError:
            return False
        if lock is not None:
            lock.release()
        return lock is None

    def _lock_path(self, name: str) -> Path:
        return self.root / "locks" / f"{name}.lock"

    # -------------------------------------------------------------------------------------------- writing

    @contextlib.contextmanager
    def fetching(self, key: str, wait_s: float) -> Iterator[Path]:
        """Only one process of the host is in here for a key; yields an empty directory, which is gone afterwards.

        What a killed holder left is wiped. Raises ModelUnavailable when the other does not end within ``wait_s``,
        OSError where nothing can be written.
        """
        self._make_directories()
        lock = FileLock.take(self._lock_path(f"fetch-{key}"), wait_s=wait_s)
        if lock is None:
            raise ModelUnavailable(
                f"another process of this host has been fetching the same model for {wait_s:g} s; see its log",
                {"transient": True},
            )
        partial = self.root / "partial" / key
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            lock.release()

    def _make_directories(self) -> None:
        for name in ("revisions", "refs", "pins", "locks", "partial"):
            (self.root / name).mkdir(parents=True, exist_ok=True)

    def publish(self, partial: Path, entries: tuple[FileEntry, ...], source: str, key: str) -> Held:
        """Make the checked files in ``partial`` a revision, all of it on disk before it can be seen; held."""
        digest = digest_of(entries)
        staged = partial.parent / f"{partial.name}.whole"
        shutil.rmtree(staged, ignore_errors=True)
        try:
            staged.mkdir()
            (staged / _FILES).mkdir()
            for entry in entries:
                target = staged / _FILES / entry.name
                target.parent.mkdir(parents=True, exist_ok=True)
                (partial / entry.name).rename(target)
            (staged / _MANIFEST).write_bytes(entries_to_json(entries))
            for path in (*staged.rglob("*"), staged):
                _sync(path)
            # From here on it is held, so that no clean-up comes between.
            lock = FileLock.take(self._lock_path(digest), shared=True, wait_s=10.0)
            self._appear(staged, digest)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
        self._note_source(source, key, digest)
        self._touch(digest)
        return Held(digest, self.root / "revisions" / digest / _FILES, entries, lock)

    def _appear(self, staged: Path, digest: str) -> None:
        place = self.root / "revisions" / digest
        with contextlib.suppress(OSError):
            staged.rename(place)
            _sync(place.parent)
            return
        # It is there already: another source of the same content was faster, or the files are damaged.
        if not self.verify(digest):
            return
        self._take_away(digest)
        staged.rename(place)
        _sync(place.parent)

    def _note_source(self, source: str, key: str, digest: str) -> None:
        file = self.root / "refs" / f"{key}.json"
        partial = file.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps({"source": source, "digest": digest, "at_s": self._clock()}))
        _sync(partial)
        partial.rename(file)

    def pin(self, digest: str, pinned: bool = True) -> None:
        """Keep a revision out of the clean-up, or let it in again."""
        self._make_directories()
        mark = self.root / "pins" / digest
        if pinned:
            mark.touch()
        else:
            mark.unlink(missing_ok=True)

    # ------------------------------------------------------------------------------------------- clean-up

    @property
    def used_bytes(self) -> int:
        return sum(stored.size_bytes for stored in self.revisions())

    def capacity_bytes(self, used_bytes: int) -> int:
        """What the store may hold: its own limit, or all that the file system has, where that is less."""
        free = shutil.disk_usage(self.root).free
        return min(self.max_bytes, used_bytes + free)

    def make_room(self, incoming_bytes: int, what: str) -> list[Stored]:
        """Remove the longest unused revisions while the store is over the threshold with ``incoming_bytes`` more.

        Held and pinned ones stay. Returns what was removed; raises ModelUnavailable when the newcomer would not fit.
        """
        self.wipe_leftovers()
        stored = self.revisions()
        used = sum(one.size_bytes for one in stored)
        capacity = self.capacity_bytes(used)
        removed = []
        for one in stored:
            if used + incoming_bytes <= self._threshold * capacity:
                break
            if not one.pinned and self.remove(one.digest):
                used -= one.size_bytes
                removed.append(one)
                self._on_evicted(one)
                logger.info("revision %s (%s) was removed from %s: %.0f MB", one.digest[:12], ", ".join(one.sources),
                            self.root, one.size_bytes / 1e6)  # fmt: skip
        if incoming_bytes and used + incoming_bytes > self.capacity_bytes(used):
            raise no_room(what, incoming_bytes, self.capacity_bytes(used) - used, self.root)
        return removed

    def remove(self, digest: str) -> bool:
        """Take a revision away unless somebody holds it."""
        try:
            lock = FileLock.take(self._lock_path(digest))
        except OSError:
            return False
        if lock is None:
            return False
        with lock:
            return self._take_away(digest)

    def discard(self, digest: str) -> bool:
        """Take a damaged revision away though somebody may hold it: what is mapped stays with who mapped it."""
        try:
            return self._take_away(digest)
        except OSError:
            return False

    def _take_away(self, digest: str) -> bool:
        trash = self.root / "partial" / f"{digest}.{os.getpid()}.trash"
        try:
            (self.root / "revisions" / digest).rename(trash)
        except FileNotFoundError:
            return False
        shutil.rmtree(trash, ignore_errors=True)
        return True

    def wipe_leftovers(self) -> None:
        """Remove what killed processes left half done."""
        for path in (self.root / "partial").glob("*"):
            key = path.name.partition(".")[0]
            with contextlib.suppress(OSError):
                lock = FileLock.take(self._lock_path(key if path.suffix == ".trash" else f"fetch-{key}"))
                if lock is not None:
                    with lock:
                        shutil.rmtree(path, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
