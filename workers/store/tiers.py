"""From a model's source to its files on this machine: down the tiers until one has them, filling them on the way up.

==========  ====================================================================================
``local``   the source itself lies here (a package, a directory, Hugging Face's own cache)
``disk``    a revision in the models directory; in shared memory where that cannot be written
``l2``      the fleet's cache in Redis; what comes from it is kept on disk
``origin``  hub or object store; what comes from it is kept on disk, and in Redis
==========  ====================================================================================

What a tier gives is compared with its manifest; what is damaged is dropped, counted, and taken from the next. One
process of a host fetches a source at a time, the others wait and find it on disk.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import redis

from cortex_tasks.errors import ModelUnavailable
from workers.store import forge, remotes
from workers.store.counters import Counters, Tier
from workers.store.disk import Disk, Held
from workers.store.l2 import L2, Corrupt
from workers.store.manifest import FileEntry, digest_of, manifest, refuse_pickle
from workers.store.sources import Snapshot, check_pinned, local, resolve

__all__ = ["Opened", "Progress", "Store", "key_of"]

logger = logging.getLogger(__name__)

#: How long a process waits for another of the host that fetches the same model.
WAIT_S: Final = 900.0

#: Told the tier, the bytes that are there and the bytes there will be (0: not known).
Progress = Callable[[Tier, int, int], None]


@dataclass(slots=True)
class Opened:
    """A model's files, which stay where they are until ``release``."""

    snapshot: Snapshot
    #: "" for a source without files.
    tier: Tier | None = None
    #: Their size as far as it is known without looking at a local directory again.
    size_bytes: int = 0
    _held: Held | None = None

    def release(self) -> None:
        """May be repeated."""
        if self._held is not None:
            self._held.release()


def key_of(source: str, revision: str | None) -> str:
    """The name of a source and revision in all tiers (32 hex digits)."""
    return hashlib.sha256(f"{source}\0{revision or ''}".encode()).hexdigest()[:32]


def _silent(tier: Tier, done_bytes: int, total_bytes: int) -> None:
    """Nobody watches."""


class Store:
    """The tiers of one worker. Any thread may ask."""

    def __init__(
        self,
        *,
        models_dir: Path | None = None,
        forge_url: str | None = None,
        disks: Sequence[Disk] = (),
        l2: L2 | None = None,
        counters: Counters | None = None,
        wait_s: float = WAIT_S,
        clock: Callable[[], float] = time.monotonic,
        background: Callable[[Callable[[], None]], None] | None = None,
    ) -> None:
        """``disks``: the first that can be written takes what is fetched; without any, the hub's own cache does.
        ``forge_url``: Forge's registry, see ``forge``."""
        self.disks = tuple(disks)
        self.l2 = l2
        self.counters = counters or Counters()
        self._models_dir, self._forge_url = models_dir, forge_url
        self._wait_s = wait_s
        self._clock = clock
        self._background = background or self._start
        self._uploads: list[threading.Thread] = []

    def open(
        self,
        source: str,
        revision: str | None = None,
        *,
        mirrors: Sequence[str] = (),
        share: bool = True,
        progress: Progress = _silent,
        again: bool = False,
    ) -> Opened:
        """The files of a model, from the nearest tier that has them whole.

        ``mirrors`` are asked in order when the source fails. ``share``: keep a copy in Redis for the fleet.
        ``again``: ask the origin for what it holds now; what is here already serves only if it does not answer.
        Raises ModelUnavailable with the reason and the remedy of the first source.
        """
        failures: list[ModelUnavailable] = []
        for candidate in (source, *mirrors):
            try:
                return self._open(candidate, revision, share, progress, again)
            except ModelUnavailable as error:
                failures.append(error)
                if mirrors:
                    logger.warning("model source %r failed: %s", candidate, error)
        if again:
            return self.open(source, revision, mirrors=mirrors, share=share, progress=progress)
        first, *others = failures
        if others:
            tried = "; ".join(f"its mirror too: {error}" for error in others)
            raise ModelUnavailable(f"{first}; {tried}", first.details) from first
        raise first

    def finish(self) -> None:
        """Wait for what goes to Redis in the background: for programs that are about to end."""
        for upload in self._uploads:
            upload.join()

    def _start(self, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, name="share-model", daemon=True)
        self._uploads = [*(upload for upload in self._uploads if upload.is_alive()), thread]
        thread.start()

    # ----------------------------------------------------------------------------------------- the walk

    def _open(self, source: str, revision: str | None, share: bool, progress: Progress, again: bool) -> Opened:
        if source.startswith("builtin:"):
            return Opened(Snapshot(None, "", source))
        began_s = self._clock()
        key = key_of(source, revision)
        absent: ModelUnavailable | None = None
        try:
            found = local(source, revision, models_dir=self._models_dir)
        except ModelUnavailable as error:
            # A directory or package that other hosts have may still be in a tier.
            found, absent = None, error
        if found is not None and found.path is not None and not (again and source.startswith("hub:")):
            opened = Opened(found, "local", _size(found.path))
            self._share(found.digest, found.path, key, share)
        else:
            opened = self._nearest(_Wanted(source, revision, key, absent, share, progress, again))
        if opened.tier is not None:
            self.counters.hit(opened.tier, opened.size_bytes, (self._clock() - began_s) * 1e3)
        return opened

    def _nearest(self, wanted: _Wanted) -> Opened:
        if not wanted.again and (held := self._on_disk(wanted.key)):
            return _opened(held, wanted.source, "disk")
        self.counters.miss("disk")
        reasons: list[Exception] = []
        for disk in self.disks:
            try:
                with disk.fetching(wanted.key, self._wait_s) as partial:
                    return self._fill(disk, partial, wanted)
            except OSError as error:
                self._note_disk_fault(disk, error)
                reasons.append(_unwritable(wanted.source, disk, error))
            except ModelUnavailable as error:
                if "needed_bytes" not in error.details:
                    raise
                self._note_disk_fault(disk, error)
                reasons.append(error)
        if reasons:
            raise reasons[0]
        if wanted.absent is not None:
            raise wanted.absent
        found = resolve(wanted.source, wanted.revision, models_dir=self._models_dir)
        return Opened(found, "origin", _size(found.path) if found.path else 0)

    def _on_disk(self, key: str) -> Held | None:
        for disk in self.disks:
            digest = disk.digest_for(key)
            held = disk.open(digest) if digest is not None else None
            if held is not None:
                return held
        return None

    def _note_disk_fault(self, disk: Disk, error: Exception) -> None:
        self.counters.fault("disk")
        logger.warning("the models directory %s cannot take a model: %s", disk.root, error)

    def _fill(self, disk: Disk, partial: Path, wanted: _Wanted) -> Opened:
        """With the key's lock: another process may have been faster, else Redis, else the origin."""
        if not wanted.again and (held := self._on_disk(wanted.key)):
            return _opened(held, wanted.source, "disk")
        if not wanted.again and (held := self._from_l2(disk, partial, wanted)):
            return _opened(held, wanted.source, "l2")
        if wanted.absent is not None:
            raise wanted.absent
        return _opened(self._from_origin(disk, partial, wanted), wanted.source, "origin")

    def _from_l2(self, disk: Disk, partial: Path, wanted: _Wanted) -> Held | None:
        """None when Redis has it not, or not whole, or does not answer."""
        if self.l2 is None:
            return None
        digest = ""
        try:
            digest = self.l2.digest_for(wanted.key) or ""
            entries = self.l2.manifest(digest) if digest else None
            if entries is None:
                self.counters.miss("l2")
                return None
            total = sum(entry.size_bytes for entry in entries)
            disk.make_room(total, f"model source {wanted.source!r}")
            self.l2.fetch(digest, entries, partial, wanted.counting("l2", total))
            return disk.publish(partial, entries, wanted.source, wanted.key)
        except Corrupt as error:
            self.counters.fault("l2")
            logger.warning("snapshot %s in Redis is damaged (%s); it is dropped", digest[:12], error)
            self._drop(digest)
        except redis.RedisError as error:
            self.counters.fault("l2")
            logger.warning("Redis could not give snapshot %s: %s", digest[:12], type(error).__name__)
        return None

    def _from_origin(self, disk: Disk, partial: Path, wanted: _Wanted) -> Held:
        try:
            remote = self._describe(wanted)
            total = remote.size_bytes
            disk.make_room(total, f"model source {wanted.source!r}")
            fresh = partial / "origin"
            # What a torn transfer from Redis left.
            for torn in partial.iterdir():
                shutil.rmtree(torn) if torn.is_dir() else torn.unlink()
            fresh.mkdir()
            remotes.fetch(remote, fresh, lambda done: wanted.progress("origin", done, total))
            entries = self._checked(remote, fresh, wanted)
        except ModelUnavailable as error:
            if "needed_bytes" not in error.details:
                self.counters.fault("origin")
            raise
        held = disk.publish(fresh, entries, wanted.source, wanted.key)
        self._share(held.digest, held.path, wanted.key, wanted.share, held)
        return held

    def _describe(self, wanted: _Wanted) -> remotes.Remote:
        if wanted.source.startswith("forge:"):
            return forge.describe(self._forge_url, wanted.source, wanted.revision)
        return remotes.describe(wanted.source, wanted.revision, self._models_dir)

    def _checked(self, remote: remotes.Remote, fresh: Path, wanted: _Wanted) -> tuple[FileEntry, ...]:
        """The manifest of what came. Raises ModelUnavailable when it is not what the source promised."""
        refuse_pickle(fresh, wanted.source)
        entries = manifest(fresh)
        came = {entry.name: entry for entry in entries}
        for file in remote.files:
            entry = came.get(file.name)
            short = entry is not None and file.size_bytes not in (None, entry.size_bytes)
            other = entry is not None and file.sha256 not in (None, entry.sha256)
            if short or other:
                raise ModelUnavailable(
                    f"model source {wanted.source!r}: {file.name} did not arrive whole; it is tried again by the next "
                    "job",
                    {"source": wanted.source, "file": file.name, "transient": True},
                )
        if not wanted.source.startswith("hub:"):
            check_pinned(wanted.source, wanted.revision, digest_of(entries))
        return entries

    # ------------------------------------------------------------------------------------------- Redis

    def _share(self, digest: str, path: Path, key: str, wanted: bool, held: Held | None = None) -> None:
        """Keep a copy in Redis, in the background: the model is not kept waiting for that."""
        l2 = self.l2
        if l2 is None or not wanted:
            return
        # The files must outlast the upload; whoever opened them may release them before it ends.
        own = self._hold_again(held)

        def upload() -> None:
            try:
                if not l2.put(digest, held.entries if held else manifest(path), path, key):
                    logger.info("snapshot %s is not kept in Redis: no room for it", digest[:12])
            except (redis.RedisError, OSError) as error:
                self.counters.fault("l2")
                logger.warning("snapshot %s is not kept in Redis: %s", digest[:12], error)
            finally:
                if own is not None:
                    own.release()

        self._background(upload)

    def _hold_again(self, held: Held | None) -> Held | None:
        if held is not None:
            for disk in self.disks:
                if (own := disk.open(held.digest)) is not None:
                    return own
        return None

    def _drop(self, digest: str) -> None:
        try:
            if self.l2 is not None and digest:
                self.l2.drop(digest)
        except redis.RedisError as error:
            logger.debug("it is found damaged again until it expires: %s", type(error).__name__)


@dataclass(frozen=True, slots=True)
class _Wanted:
    source: str
    revision: str | None
    key: str
    #: Why it is not where it should be on this machine; only Redis can help then.
    absent: ModelUnavailable | None
    share: bool
    progress: Progress
    again: bool

    def counting(self, tier: Tier, total_bytes: int) -> Callable[[int], None]:
        done = 0

        def add(size_bytes: int) -> None:
            nonlocal done
            done += size_bytes
            self.progress(tier, done, total_bytes)

        return add


def _opened(held: Held, source: str, tier: Tier) -> Opened:
    return Opened(Snapshot(held.path, held.digest, source), tier, held.size_bytes, held)


def _size(path: Path) -> int:
    return sum(entry.size_bytes for entry in manifest(path))


def _unwritable(source: str, disk: Disk, error: OSError) -> ModelUnavailable:
    return ModelUnavailable(
        f"model source {source!r} cannot be kept in {disk.root}: {error.strerror or error}; free some space there, or "
        "name a writable directory in CORTEX_MODELS_DIR",
        {"source": source, "transient": True},
    )
