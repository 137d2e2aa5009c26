"""Objects move to huge pages: which stretches, that it happens, and what keeps it from happening."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
from pathlib import Path

import pytest

from workers import huge_pages

_MIB = 2**20


def kernel(folder: Path, enabled: str = "always [madvise] never", size: str = "2097152") -> Path:
    (folder / "enabled").write_text(enabled + "\n")
    (folder / "hpage_pmd_size").write_text(size + "\n")
    return folder


def test_the_size_is_what_the_kernel_says(tmp_path: Path) -> None:
    assert huge_pages.page_bytes(kernel(tmp_path, size="33554432")) == 32 * _MIB


def test_none_where_the_owner_wants_none_or_the_kernel_has_none(tmp_path: Path) -> None:
    assert huge_pages.page_bytes(kernel(tmp_path, "always madvise [never]")) == 0
    assert huge_pages.page_bytes(kernel(tmp_path, size="")) == 0
    assert huge_pages.page_bytes(kernel(tmp_path, size=str(512 * _MIB))) == 0
    assert huge_pages.page_bytes(tmp_path / "absent") == 0
    assert huge_pages.gather(kernel=tmp_path / "absent", advise=lambda *_: pytest.fail("asked")) is None


def test_every_object_begins_in_one_of_the_stretches() -> None:
    objects = [[number] for number in range(100_000)]
    found = huge_pages.stretches(objects, 2 * _MIB)
    assert len(set(found)) == len(found) <= 100
    assert all(address % (2 * _MIB) == 0 for address in found)
    assert {id(one) // (2 * _MIB) * 2 * _MIB for one in objects} == set(found)


def test_one_that_cannot_be_moved_costs_the_others_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(huge_pages, "stretches", lambda _, size: [0, size, 2 * size])
    asked = []

    def advise(address: int, size: int, advice: int) -> int:
        asked.append((address, size, advice))
        return -1 if address == 2 * _MIB else 0

    caplog.set_level("INFO", logger=huge_pages.__name__)
    thread = huge_pages.gather(kernel=kernel(tmp_path), advise=advise)
    assert thread is not None
    thread.join()
    assert asked == [(number * 2 * _MIB, 2 * _MIB, 25) for number in range(3)]
    assert "4 MB" in caplog.text


_PROCESS = """
import re
from pathlib import Path
from workers import huge_pages

def huge_kb():
    return int(re.search(r"AnonHugePages: +(\\d+)", Path("/proc/self/smaps_rollup").read_text())[1])

kept = [[number] for number in range(1_000_000)]
before = huge_kb()
thread = huge_pages.gather()
if thread:
    thread.join()
assert all(entry == [number] for number, entry in enumerate(kept))
print(bool(thread), before, huge_kb())
"""


def test_a_process_keeps_its_objects_and_has_them_on_huge_pages() -> None:
    """The kernel's own book of a process says so."""
    done = subprocess.run([sys.executable, "-c", _PROCESS], capture_output=True, text=True, check=True, timeout=60)
    began, before_kb, after_kb = done.stdout.split()
    if began == "False":
        pytest.skip("this kernel has no huge pages for a process's memory, or its owner wants none")
    if not _collapses():
        pytest.skip("this kernel moves no memory to huge pages when asked (MADV_COLLAPSE: Linux 6.1)")
    # Where every process has huge pages unasked, all may have been there before.
    unasked = "[always]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    assert int(after_kb) > (0 if unasked else int(before_kb))


def _collapses() -> bool:
    memory = mmap.mmap(-1, 8 * _MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.write(b"x" * len(memory))
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    call = ctypes.CDLL(None).madvise
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return bool(call(-(-begin // (2 * _MIB)) * 2 * _MIB, 2 * _MIB, 25) == 0)
