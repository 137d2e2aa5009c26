"""CPUs and the device."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cortex_tasks.config import ImageConfig
from workers import resources
from workers.cgroup import CgroupLimits
from workers.resources import available_cpus, available_memory, device, limit_threads, threads_for


def image(cpus: float) -> ImageConfig:
    return ImageConfig.model_validate({"queues": [], "cpus": cpus, "memory": "1GB", "storage": "1GB"})


def test_a_process_has_the_smaller_of_affinity_and_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    for quota, expected in ((None, 4.0), (2.5, 2.5), (16.0, 4.0)):
        monkeypatch.setattr(resources, "read_limits", lambda quota=quota: CgroupLimits(quota))
        assert available_cpus() == available_cpus(CgroupLimits(quota)) == expected


def test_a_process_has_the_smaller_of_the_machines_memory_and_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}.__getitem__)
    for limit, expected in ((None, 4_096_000), (1_000_000, 1_000_000), (10**12, 4_096_000)):
        monkeypatch.setattr(resources, "read_limits", lambda limit=limit: CgroupLimits(None, limit))
        assert available_memory() == available_memory(CgroupLimits(None, limit)) == expected


def test_libraries_are_told_the_threads_unless_the_environment_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources.os, "environ", {"OMP_NUM_THREADS": "7"})
    limit_threads(3)
    told = {"OMP_NUM_THREADS": "7", "MKL_NUM_THREADS": "3", "OPENBLAS_NUM_THREADS": "3", "RAYON_NUM_THREADS": "3"}
    assert resources.os.environ == told


@pytest.mark.parametrize(
    ("machine", "limit", "threads"), [(8.0, 4, 4), (2.0, 4, 2), (2.5, 4, 2), (0.5, 4, 1), (8.0, None, 8)]
)
def test_threads_keep_to_the_image_and_the_machine(
    monkeypatch: pytest.MonkeyPatch, machine: float, limit: float | None, threads: int
) -> None:
    monkeypatch.setattr(resources, "available_cpus", lambda limits: machine)
    assert threads_for(None if limit is None else image(limit)) == threads


@pytest.mark.parametrize("said", [{}, {"MALLOC_ARENA_MAX": "2"}])
def test_freed_memory_is_kept_unless_the_environment_says_otherwise(said: dict[str, str]) -> None:
    """In a process of its own: the setting stays. Whether the pages of a large block come from the kernel each time."""
    script = """
import resource, sys
from workers.resources import keep_memory
asked = keep_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        bytearray(40 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
bytearray(40 * 2**20)
print(asked, faults() < 20 * 100)
"""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run([sys.executable, "-c", script], env=clean | said, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(not said)] * 2


def test_tunables_count_as_a_say_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources.os, "environ", {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"})
    monkeypatch.setattr(resources.ctypes, "CDLL", lambda name: pytest.fail("it was asked"))
    assert not resources.keep_memory()


def test_another_c_library_has_no_such_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources.os, "environ", {})
    monkeypatch.setattr(resources.ctypes, "CDLL", lambda name: SimpleNamespace())
    assert not resources.keep_memory()


@pytest.mark.models
def test_batches_of_many_sizes_leave_few_kernels_in_memory() -> None:
    """In processes of their own: a product over 600 different numbers of tokens, with oneDNN's limit and with ours."""
    script = """
import os, sys
from workers.resources import bound_kernels
if sys.argv[1] == "bound":
    bound_kernels()
import torch
torch.set_num_threads(1)
def memory_mb():
    with open("/proc/self/statm") as pages:
        return int(pages.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
with torch.inference_mode():
    weight = torch.ops.mkldnn._reorder_linear_weight(torch.randn(384, 384), None)
    tokens = torch.randn(1_000, 384)
    torch.ops.mkldnn._linear_pointwise(tokens, weight, None, "none", [], "none")
    before_mb = memory_mb()
    for count in range(1, 601):
        torch.ops.mkldnn._linear_pointwise(tokens[:count], weight, None, "none", [], "none")
    print(memory_mb() - before_mb)
"""
    clean = {k: v for k, v in os.environ.items() if not k.endswith("_CACHE_CAPACITY")}
    ours_mb, theirs_mb = (
        float(subprocess.run([sys.executable, "-c", script, limit], env=clean, capture_output=True, check=True).stdout)
        for limit in ("bound", "default")
    )
    assert ours_mb < max(100.0, theirs_mb / 2), f"{theirs_mb:.0f} MB without a limit"


@pytest.mark.parametrize("said", ["ONEDNN_PRIMITIVE_CACHE_CAPACITY", "DNNL_PRIMITIVE_CACHE_CAPACITY"])
def test_what_the_environment_says_of_kernels_wins(monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    monkeypatch.setattr(resources.os, "environ", {said: "700"})
    resources.bound_kernels()
    assert resources.os.environ.pop(said) == "700"
    assert resources.os.environ.get("ONEDNN_PRIMITIVE_CACHE_CAPACITY") is None


def test_the_collector_leaves_alone_what_exists() -> None:
    kept = [[]]
    thresholds = gc.get_threshold()
    gc.set_threshold(700)
    try:
        resources.spare_garbage()
        assert gc.get_freeze_count() > 1_000
        assert gc.get_threshold()[0] > 700
        assert not any(entry is kept for entry in gc.get_objects())
    finally:
        gc.unfreeze()
        gc.set_threshold(*thresholds)


def test_the_device_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORTEX_DEVICE", "cuda:1")
    assert device() == "cuda:1"


@pytest.mark.parametrize(
    ("driver", "works", "expected"), [(False, True, "cpu"), (True, False, "cpu"), (True, True, "cuda")]
)
def test_the_device_is_what_works(monkeypatch: pytest.MonkeyPatch, driver: bool, works: bool, expected: str) -> None:
    monkeypatch.delenv("CORTEX_DEVICE", raising=False)
    monkeypatch.setattr(Path, "exists", lambda self: driver)
    torch: Any = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: works))
    monkeypatch.setitem(__import__("sys").modules, "torch", torch)
    assert device() == expected


def test_a_gpu_without_torch_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CORTEX_DEVICE", raising=False)
    monkeypatch.setattr(Path, "exists", lambda self: True)
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    assert device() == "cpu"
