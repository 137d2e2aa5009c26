"""The content of a snapshot: which files matter, their digest, and whether its weights are safe to read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path, PurePosixPath

from cortex_tasks.errors import ModelUnavailable

__all__ = [
    "FileEntry",
    "bad_files",
    "digest_of",
    "entries_from_json",
    "entries_to_json",
    "manifest",
    "matters",
    "refuse_pickle",
    "refuse_pickled_names",
]

#: Never read by a model, so a change in them makes no new revision.
_IGNORED = ("*.md", "*.py", "*.pyc", "LICENSE*", "LICENCE*", "NOTICE*", ".*")
#: Weights that are, or may hold, pickled code. (``lookups.bin`` of spaCy and the like are not weights.)
_PICKLED = ("*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*model*.bin")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a snapshot; ``name`` is relative, with forward slashes."""

    name: str
    size_bytes: int
    sha256: str


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _files(root: Path) -> Iterator[Path]:
    """Every file below ``root`` that matters, in no order. Follows links to files, as the hub's cache uses."""
    for path in root.rglob("*"):
        if path.is_file() and matters(path.relative_to(root).as_posix()):
            yield path


@lru_cache(maxsize=4096)
def _sha256(path: str, size_bytes: int, mtime_ns: int) -> str:
    """Keyed by size and modification time as well, so that an unchanged file is read once a process."""
    return _hash(Path(path))


def _hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def manifest(root: Path) -> tuple[FileEntry, ...]:
    """The files of a snapshot that decide its answers (weights, tokenizer, configuration), sorted by name."""
    entries = []
    for path in _files(root):
        stat = path.stat()
        sha256 = _sha256(str(path.resolve()), stat.st_size, stat.st_mtime_ns)
        entries.append(FileEntry(path.relative_to(root).as_posix(), stat.st_size, sha256))
    return tuple(sorted(entries, key=lambda entry: entry.name))


def digest_of(entries: tuple[FileEntry, ...]) -> str:
    """One sha256 (hex) over names, sizes and contents; where the files lie does not matter."""
    total = hashlib.sha256()
    for entry in entries:
        total.update(f"{entry.name}\0{entry.size_bytes}\0{entry.sha256}\n".encode())
    return total.hexdigest()


def bad_files(root: Path, entries: tuple[FileEntry, ...], checked: Path | None) -> list[str]:
    """The names of entries whose file below ``root`` is absent or other than it should be.

    ``checked``: a file written after all of them were checked; what was not modified since is only measured.
    """
    bad = []
    checked_ns = checked.stat().st_mtime_ns if checked is not None else -1
    for entry in entries:
        try:
            stat = (root / entry.name).stat()
            whole = stat.st_size == entry.size_bytes and (
                stat.st_mtime_ns <= checked_ns or _hash(root / entry.name) == entry.sha256
            )
        except OSError:
            whole = False
        if not whole:
            bad.append(entry.name)
    return bad


def entries_to_json(entries: tuple[FileEntry, ...]) -> bytes:
    return json.dumps({"files": [[entry.name, entry.size_bytes, entry.sha256] for entry in entries]}).encode()


def entries_from_json(text: bytes) -> tuple[FileEntry, ...]:
    """Raises ValueError for anything but what ``entries_to_json`` wrote, and for names that lead elsewhere."""
    try:
        rows = json.loads(text)["files"]
        entries = tuple(FileEntry(str(name), int(size), str(sha256)) for name, size, sha256 in rows)
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a manifest: {error!r}") from error
    for entry in entries:
        path = PurePosixPath(entry.name)
        if path.is_absolute() or ".." in path.parts or not path.parts or entry.size_bytes < 0:
            raise ValueError(f"not a manifest: the name {entry.name!r} is not one of a snapshot's files")
    return entries


def matters(name: str) -> bool:
    """Whether a file of a snapshot, by its relative name, decides its answers."""
    *folders, last = name.split("/")
    hidden = any(folder.startswith(".") or folder == "__pycache__" for folder in folders)
    return not hidden and not _matches(last, (*_IGNORED, *_PICKLED))


def refuse_pickle(root: Path, source: str) -> None:
    """Raise ModelUnavailable when a directory of the snapshot has pickled weights and no safetensors beside them."""
    refuse_pickled_names([path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()], source)


def refuse_pickled_names(names: Iterable[str], source: str) -> None:
    """The same for a snapshot whose files are known by name.

    Directory by directory, because each module of a model has one of its own and a library that finds no
    safetensors in it would read the pickle.
    """
    paths = sorted(PurePosixPath(name) for name in names)
    safe = {path.parent for path in paths if path.suffix == ".safetensors"}
    for path in paths:
        if _matches(path.name, _PICKLED) and path.parent not in safe:
            raise ModelUnavailable(
                f"model source {source!r} has only pickled weights ({path}), and reading pickle "
                "runs code; convert it (model.save_pretrained(..., safe_serialization=True)) or take a source "
                "with *.safetensors",
                {"source": source, "file": str(path)},
            )
