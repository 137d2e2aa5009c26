"""The limits of this process's control groups, versions 1 and 2. Reads files, decides nothing.

A limit may stand on any group between the process's own and the topmost one that shows here; the smallest holds. In a
container the kernel shows the group as a path of the host (``/kubepods/…``) or as ``/``, and mounts either the whole
tree or the container's part of it: ``/proc/self/mountinfo`` says which part. What cannot be read or understood counts
as no limit, for a worker must start anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final, NamedTuple

__all__ = ["CgroupLimits", "read_limits"]

#: The kernel's "no limit" of version 1 is the largest whole page; nobody limits a process to an exbibyte.
_UNLIMITED_BYTES: Final = 2**60
_DEFAULT_PERIOD_US: Final = 100_000


@dataclass(frozen=True, slots=True)
class CgroupLimits:
    """What the control groups grant; None: no limit."""

    cpus: float | None = None
    memory_bytes: int | None = None
    #: Where the figures come from: "v1", "v2", "v1 and v2", or "none".
    source: str = "none"

    def __str__(self) -> str:
        cpus = "any number of CPUs" if self.cpus is None else f"{self.cpus:.2f} CPUs"
        memory = "any memory" if self.memory_bytes is None else f"{self.memory_bytes / 1e6:,.0f} MB"
        return "none" if self.source == "none" else f"{self.source}, {cpus}, {memory}"


class _Mount(NamedTuple):
    """A hierarchy that is mounted here."""

    version: str
    controllers: frozenset[str]
    #: The part of the hierarchy that is mounted, and where.
    part: PurePosixPath
    at: Path


def read_limits(root: Path = Path("/")) -> CgroupLimits:
    """The limits of this process. ``root``: the root directory, elsewhere for tests."""
    cpus, memory, sources = [], [], set()
    groups = _own_groups(root)
    for mount in _mounts(root):
        names = [""] if mount.version == "v2" else sorted(mount.controllers & groups.keys())
        own = groups.get(names[0]) if names else None
        for directory in _directories(mount, own):
            found_cpus, found_memory = _CPUS[mount.version](directory), _MEMORY[mount.version](directory)
            cpus += [found_cpus] if found_cpus is not None else []
            memory += [found_memory] if found_memory is not None else []
            if found_cpus is not None or found_memory is not None:
                sources.add(mount.version)
    return CgroupLimits(min(cpus, default=None), min(memory, default=None), " and ".join(sorted(sources)) or "none")


def _own_groups(root: Path) -> dict[str, PurePosixPath]:
    """Controller -> this process's group; version 2 under "". Lines: ``4:cpu,cpuacct:/docker/ab12``."""
    groups: dict[str, PurePosixPath] = {}
    for line in _lines(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        groups |= dict.fromkeys(controllers.split(","), PurePosixPath(path or "/"))
    return groups


def _mounts(root: Path) -> Iterator[_Mount]:
    """The mounted hierarchies; without ``mountinfo`` the usual places. A line's fields: id, parent, device, part,
    mount point, options, optional fields, ``-``, file system, source, its options."""
    found = False
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or len(kind) < 3 or kind[0] not in ("cgroup", "cgroup2"):
            continue
        found = True
        version = "v2" if kind[0] == "cgroup2" else "v1"
        part, at = (_unescaped(field) for field in fields[3:5])
        yield _Mount(version, frozenset(kind[2].split(",")), PurePosixPath(part), root / at.lstrip("/"))
    if not found:
        top, whole = root / "sys/fs/cgroup", PurePosixPath("/")
        yield _Mount("v2", frozenset(), whole, top)
        for controller in ("cpu", "memory"):
            yield _Mount("v1", frozenset({controller}), whole, top / controller)


def _unescaped(field: str) -> str:
    for code, sign in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        field = field.replace(code, sign)
    return field


def _directories(mount: _Mount, own: PurePosixPath | None) -> list[Path]:
    """The group's directory and those above it, as far as they are mounted."""
    inside = PurePosixPath()
    # A group outside of what is mounted ("/..", or another namespace's path): the mounted part is this container's.
    if own is not None and ".." not in own.parts and own.is_relative_to(mount.part):
        inside = own.relative_to(mount.part)
    return [mount.at / path for path in (inside, *inside.parents)]


def _v2_cpus(directory: Path) -> float | None:
    """``cpu.max``: "150000 100000" or "max 100000", microseconds."""
    quota, _, period = _first(directory / "cpu.max").partition(" ")
    return _ratio(quota, period or str(_DEFAULT_PERIOD_US))


def _v1_cpus(directory: Path) -> float | None:
    return _ratio(_first(directory / "cpu.cfs_quota_us"), _first(directory / "cpu.cfs_period_us"))


def _ratio(quota: str, period: str) -> float | None:
    with suppress(ValueError):
        if int(quota) > 0 and int(period) > 0:
            return int(quota) / int(period)
    return None


def _v2_memory(directory: Path) -> int | None:
    """The hard limit, or the one above which the kernel throttles."""
    found = [size for name in ("memory.max", "memory.high") if (size := _size(_first(directory / name))) is not None]
    return min(found, default=None)


def _v1_memory(directory: Path) -> int | None:
    """The group's own limit, and what ``memory.stat`` says of groups above that are not mounted here."""
    stat = dict(line.split(" ", 1) for line in _lines(directory / "memory.stat") if " " in line)
    texts = (_first(directory / "memory.limit_in_bytes"), stat.get("hierarchical_memory_limit", ""))
    return min((size for text in texts if (size := _size(text)) is not None), default=None)


def _size(text: str) -> int | None:
    with suppress(ValueError):
        if 0 < int(text) < _UNLIMITED_BYTES:
            return int(text)
    return None


def _first(file: Path) -> str:
    return next(iter(_lines(file)), "").strip()


def _lines(file: Path) -> list[str]:
    with suppress(OSError, ValueError):
        return file.read_text(encoding="utf-8").splitlines()
    return []


_CPUS: Final[dict[str, Callable[[Path], float | None]]] = {"v1": _v1_cpus, "v2": _v2_cpus}
_MEMORY: Final[dict[str, Callable[[Path], int | None]]] = {"v1": _v1_memory, "v2": _v2_memory}
