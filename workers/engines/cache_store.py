"""Built engines on disk: built once a host, kept whole or not at all, rebuilt when damaged.

An entry is a directory ``<root>/engines/<digest of its key>`` with the engine's files and ``entry.json``, which holds
their sizes and sha256. It appears by one rename, when everything is on disk. No file is ever unpickled.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cortex_tasks.errors import ModelUnavailable

__all__ = ["CacheStore", "Entry", "writable_root"]

logger = logging.getLogger(__name__)

_MANIFEST: Final = "entry.json"
_PARTIAL: Final = ".partial-"


@dataclass(frozen=True, slots=True)
class Entry:
    """A whole entry: its directory, and what its builder said about it (JSON types)."""

    path: Path
    facts: dict[str, Any]


def writable_root(configured: Path | None = None, environ: Mapping[str, str] = os.environ) -> Path:
    """The configured directory, made if need be; the user's own cache directory without one that can be written.

    Raises ModelUnavailable when neither can.
    """
    own = Path(environ.get("XDG_CACHE_HOME") or Path(environ.get("HOME") or "/nonexistent") / ".cache") / "cortex"
    for root in filter(None, (configured, own)):
        with contextlib.suppress(OSError):
            (root / "engines").mkdir(parents=True, exist_ok=True)
            if os.access(root / "engines", os.W_OK | os.X_OK):
                return root
    raise ModelUnavailable(
        f"built engines can be kept neither in {configured or own} nor in {own}; "
        "name a writable directory in CORTEX_CACHE_DIR"
    )


class CacheStore:
    """Entries below ``root``. Any number of processes and threads may use one directory."""

    def __init__(self, root: Path, *, max_bytes: int, ttl_s: float, clock: Callable[[], float] = time.time) -> None:
        self._directory = root / "engines"
        self._directory.mkdir(parents=True, exist_ok=True)
        self._max_bytes = max_bytes
        self._ttl_s = ttl_s
        self._clock = clock

    def get(self, key: Mapping[str, str], build: Callable[[Path], Mapping[str, Any]]) -> Entry:
        """The entry of a key; the first to ask builds it, the others wait.

        ``build`` fills an empty directory and returns facts to keep; what it raises is passed on, and nothing is kept.
        """
        path = self._directory / hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()
        entry = self._read(path)
        if entry is None:
            with _locked(path.with_suffix(".lock")):
                entry = self._read(path) or self._build(path, key, build)
            self._prune(keep=path)
        return entry

    def _read(self, path: Path) -> Entry | None:
        """None when the entry is absent or damaged. Reading counts as use."""
        try:
            manifest = json.loads((path / _MANIFEST).read_bytes())
            for name, (size, digest) in manifest["files"].items():
                if (path / name).stat().st_size != size or _sha256(path / name) != digest:
                    raise ValueError(f"{name} is damaged")
            now_s = self._clock()
            os.utime(path / _MANIFEST, (now_s, now_s))
            return Entry(path, dict(manifest["facts"]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("the built engine in %s cannot be used (%s); it is built again", path, error)
            return None

    def _build(self, path: Path, key: Mapping[str, str], build: Callable[[Path], Mapping[str, Any]]) -> Entry:
        partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=self._directory))
        try:
            facts = dict(build(partial))
            files = {file.name: [file.stat().st_size, _sha256(file)] for file in sorted(partial.iterdir())}
            manifest = {"key": dict(key), "facts": facts, "files": files}
            (partial / _MANIFEST).write_text(json.dumps(manifest, indent=1))
            for file in (*partial.iterdir(), partial):
                _sync(file)
            if path.exists():  # damaged: _read did not take it
                shutil.rmtree(path)
            partial.rename(path)
            _sync(self._directory)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        now_s = self._clock()
        os.utime(path / _MANIFEST, (now_s, now_s))
        return Entry(path, facts)

    def _prune(self, keep: Path) -> None:
        """Remove what nobody used for ``ttl_s``, what a dead builder left, and the longest unused beyond the size.

        A process that has an engine's file open goes on reading it.
        """
        now_s, used = self._clock(), []
        for path in self._directory.iterdir():
            with contextlib.suppress(OSError):
                if not path.is_dir() or path == keep:
                    continue
                marker = path / _MANIFEST
                age_s = now_s - (marker if marker.exists() else path).stat().st_mtime
                if age_s > self._ttl_s:
                    shutil.rmtree(path)
                elif not path.name.startswith(_PARTIAL):
                    used.append((age_s, path))
        total = _size(keep)
        for _, path in sorted(used):
            total += _size(path)
            if total > self._max_bytes:
                shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock among all processes of the host; it ends with its holder, however that ends."""
    with path.open("wb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _size(path: Path) -> int:
    with contextlib.suppress(OSError):
        return sum(file.stat().st_size for file in path.iterdir())
    return 0
