"""``forge:<name>``: a model from Forge's registry, which is a place that fsspec reads and writes.

=========================== =====================================================================
``<name>/<digest>/<file>``  the files of a revision, never changed
``<name>/<digest>.json``    its manifest, written after the files
``<name>/current``          the digest of the revision to serve, written last
=========================== =====================================================================

``CORTEX_FORGE_URL`` names the place: ``s3://bucket/registry``, ``file:///srv/forge``, whatever fsspec has a client for.
Whoever reads sees a whole revision or none, and what came is compared with its manifest.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any, Final

from cortex_tasks.errors import ConfigError, ModelUnavailable
from workers.store import sources
from workers.store.manifest import digest_of, entries_from_json, entries_to_json, manifest, refuse_pickle
from workers.store.remotes import Remote, RemoteFile
from workers.store.sources import within

__all__ = ["describe", "publish"]

_NAME: Final = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)*")
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
#: A manifest of thousands of files stays below it.
_MANIFEST_MAX_BYTES: Final = 4 * 2**20


def describe(url: str | None, source: str, revision: str | None) -> Remote:
    """What the registry has under a name; ``revision``: a digest, or the beginning of one (at least 8 hex digits).

    Raises ModelUnavailable: no registry is named, it does not answer, it has no such model, its manifest is damaged.
    """
    name = _checked_name(source)
    if not url:
        raise ModelUnavailable(
            f"model source {source!r}: no registry is named; set CORTEX_FORGE_URL, such as s3://bucket/registry",
            {"source": source},
        )
    try:
        return within(sources.HUB_PROBE_S, lambda: _read(url, source, name, revision))
    except ModelUnavailable:
        raise
    except ImportError as error:
        raise ModelUnavailable(
            f"model source {source!r}: a client for the registry's address is not installed: {error}; for s3:// "
            "pip install 'datapunk-cortex[s3]'",
            {"source": source},
        ) from error
    except FileNotFoundError as error:
        raise ModelUnavailable(
            f"model source {source!r}: the registry has no {revision or 'current revision'} of it; publish it first",
            {"source": source},
        ) from error
    except Exception as error:
        # Their text may hold the address, and with it a password.
        raise ModelUnavailable(
            f"model source {source!r}: the registry could not be read ({type(error).__name__}); check CORTEX_FORGE_URL",
            {"source": source, "reason": type(error).__name__, "transient": True},
        ) from error


def _read(url: str, source: str, name: str, revision: str | None) -> Remote:
    filesystem, root = _place(url, name)
    digest = _digest(filesystem, root, revision)
    text = filesystem.cat_file(f"{root}/{digest}.json", start=0, end=_MANIFEST_MAX_BYTES)
    try:
        entries = entries_from_json(text)
    except ValueError as error:
        raise ModelUnavailable(f"model source {source!r}: {digest[:12]} has {error}", {"source": source}) from error
    if digest_of(entries) != digest:
        raise ModelUnavailable(
            f"model source {source!r}: the manifest of {digest[:12]} is not its own; publish the revision again",
            {"source": source, "revision": digest},
        )

    def bring(file: RemoteFile, directory: Path) -> None:
        filesystem.get_file(f"{root}/{digest}/{file.name}", str(directory / file.name))

    return Remote(source, tuple(RemoteFile(one.name, one.size_bytes, one.sha256) for one in entries), bring)


def _digest(filesystem: Any, root: str, revision: str | None) -> str:
    """The revision's digest. Raises FileNotFoundError."""
    if revision is None:
        wanted = filesystem.cat_file(f"{root}/current", start=0, end=80).decode("ascii", "replace").strip()
        if _DIGEST.fullmatch(wanted) is None:
            raise FileNotFoundError("current")
        return str(wanted)
    wanted = revision.lower()
    if _DIGEST.fullmatch(wanted):
        return wanted
    found = {PurePosixPath(str(path)).stem for path in filesystem.ls(root, detail=False) if str(path).endswith(".json")}
    matching = [digest for digest in found if len(wanted) >= 8 and digest.startswith(wanted)]
    if len(matching) != 1:
        raise FileNotFoundError(revision)
    return matching[0]


def publish(url: str | None, name: str, directory: Path) -> str:
    """Put a directory's model into the registry and make it the current revision; returns its digest.

    A reader meanwhile gets the revision before. Files that are there already are not sent again. Raises ConfigError
    without a registry, ModelUnavailable for a directory that is no model, and what fsspec raises.
    """
    source = f"forge:{name}"
    _checked_name(source)
    if not url:
        raise ConfigError("CORTEX_FORGE_URL: names no registry, such as s3://bucket/registry or file:///srv/forge")
    refuse_pickle(directory, source)
    entries = manifest(directory)
    if not entries:
        raise ModelUnavailable(f"{directory} holds no model files", {"source": source})
    digest = digest_of(entries)
    filesystem, root = _place(url, name)
    if not filesystem.exists(f"{root}/{digest}.json"):
        for entry in entries:
            there = f"{root}/{digest}/{entry.name}"
            filesystem.makedirs(there.rpartition("/")[0], exist_ok=True)
            filesystem.put_file(str(directory / entry.name), there)
        _write(filesystem, f"{root}/{digest}.json", entries_to_json(entries))
    _write(filesystem, f"{root}/current", digest.encode())
    return digest


def _write(filesystem: Any, path: str, data: bytes) -> None:
    """Whole or not at all, also where files grow while they are written."""
    with filesystem.transaction, filesystem.open(path, "wb") as stream:
        stream.write(data)


def _place(url: str, name: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    filesystem, root = url_to_fs(url)
    return filesystem, f"{str(root).rstrip('/')}/{name}"


def _checked_name(source: str) -> str:
    name = source.partition(":")[2]
    if _NAME.fullmatch(name) is None:
        raise ModelUnavailable(f"model source {source!r} is not of the form forge:<name>", {"source": source})
    return name
