"""The limits of control groups, from trees of files as kernels and container engines make them."""

from __future__ import annotations

from pathlib import Path

import pytest

from workers.cgroup import CgroupLimits, read_limits

GB = 10**9
#: What version 1 says where there is no limit.
V1_NONE = "9223372036854771712\n"

V2_MOUNT = "30 23 0:26 {part} /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNT = "{number} 23 0:27 {part} /sys/fs/cgroup/{name} rw,nosuid shared:9 - cgroup cgroup rw,{name}\n"
OTHER_MOUNTS = "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/root rw\n23 22 0:21 / /sys rw - sysfs sysfs rw\n"


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return root


def v1_mounts(cpu: str = "/", memory: str = "/") -> str:
    named = (("cpu,cpuacct", cpu), ("memory", memory), ("freezer", "/"))
    return OTHER_MOUNTS + "".join(
        V1_MOUNT.format(number=40 + at, name=name, part=part) for at, (name, part) in enumerate(named)
    )


# ---------------------------------------------------------------------------------------------- version 2


def test_v2_in_a_container_with_a_namespace_of_its_own(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/\n",
        "proc/self/mountinfo": OTHER_MOUNTS + V2_MOUNT.format(part="/"),
        "sys/fs/cgroup/cpu.max": "150000 100000\n",
        "sys/fs/cgroup/memory.max": f"{4 * GB}\n",
        "sys/fs/cgroup/memory.high": "max\n",
    }
    assert read_limits(tree(tmp_path, files)) == CgroupLimits(1.5, 4 * GB, "v2")


def test_v2_on_a_host_the_smallest_of_nested_limits_holds(tmp_path: Path) -> None:
    """A worker as a systemd service: the slice above it has limits as well."""
    files = {
        "proc/self/cgroup": "0::/fleet.slice/cortex.slice/nlp.service\n",
        "proc/self/mountinfo": OTHER_MOUNTS + V2_MOUNT.format(part="/"),
        "sys/fs/cgroup/fleet.slice/cpu.max": "400000 100000\n",
        "sys/fs/cgroup/fleet.slice/memory.max": f"{3 * GB}\n",
        "sys/fs/cgroup/fleet.slice/cortex.slice/cpu.max": "max 100000\n",
        "sys/fs/cgroup/fleet.slice/cortex.slice/memory.high": f"{2 * GB}\n",
        "sys/fs/cgroup/fleet.slice/cortex.slice/nlp.service/cpu.max": "200000 50000\n",
        "sys/fs/cgroup/fleet.slice/cortex.slice/nlp.service/memory.max": f"{8 * GB}\n",
    }
    assert read_limits(tree(tmp_path, files)) == CgroupLimits(4.0, 2 * GB, "v2")


def test_v2_with_the_hosts_namespace_and_only_the_containers_part_mounted(tmp_path: Path) -> None:
    pod = "/kubepods.slice/kubepods-burstable.slice/kubepods-pod1.slice/cri-containerd-ab12.scope"
    files = {
        "proc/self/cgroup": f"0::{pod}\n",
        "proc/self/mountinfo": OTHER_MOUNTS + V2_MOUNT.format(part=pod),
        "sys/fs/cgroup/cpu.max": "50000 100000\n",
        "sys/fs/cgroup/memory.max": f"{GB}\n",
    }
    assert read_limits(tree(tmp_path, files)) == CgroupLimits(0.5, GB, "v2")


def test_v2_seen_from_another_namespace(tmp_path: Path) -> None:
    """The group lies outside of what is mounted: its path goes up."""
    files = {
        "proc/self/cgroup": "0::/../../other\n",
        "proc/self/mountinfo": OTHER_MOUNTS + V2_MOUNT.format(part="/.."),
        "sys/fs/cgroup/cpu.max": "300000 100000\n",
        "sys/fs/other/cpu.max": "1 100000\n",
    }
    assert read_limits(tree(tmp_path, files)) == CgroupLimits(3.0, None, "v2")


@pytest.mark.parametrize(
    ("text", "cpus"),
    [
        ("200000 100000\n", 2.0), ("50000 100000", 0.5), ("150000", 1.5), ("max 100000", None), ("max", None),
        ("odd", None), ("", None), ("-1 100000", None), ("100000 0", None), ("100000 odd", None), ("0 100000", None),
    ],
)  # fmt: skip
def test_the_quota_of_v2(tmp_path: Path, text: str, cpus: float | None) -> None:
    files = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": text}
    assert read_limits(tree(tmp_path, files)).cpus == cpus


# ---------------------------------------------------------------------------------------------- version 1


def test_v1_in_a_container_that_sees_the_hosts_paths(tmp_path: Path) -> None:
    """Docker before cgroup namespaces: the paths are the host's, the mounts the container's."""
    own = "/docker/0123abcd"
    files = {
        "proc/self/cgroup": f"5:freezer:{own}\n4:memory:{own}\n3:cpu,cpuacct:{own}\n1:name=systemd:{own}\n",
        "proc/self/mountinfo": v1_mounts(cpu=own, memory=own),
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "300000\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{6 * GB}\n",
    }
    assert read_limits(tree(tmp_path, files)) == CgroupLimits(3.0, 6 * GB, "v1")


def test_v1_with_the_whole_tree_mounted(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "4:memory:/kubepods/pod1/ab12\n3:cpu,cpuacct:/kubepods/pod1/ab12\n",
        "proc/self/mountinfo": v1_mounts(),
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/cpu,cpuacct/kubepods/pod1/cpu.cfs_quota_us": "250000\n",
        "sys/fs/cgroup/cpu,cpuacct/kubepods/pod1/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": V1_NONE,
        "sys/fs/cgroup/memory/kubepods/pod1/memory.limit_in_bytes": f"{5 * GB}\n",
        "sys/fs/cgroup/memory/kubepods/pod1/ab12/memory.limit_in_bytes": f"{7 * GB}\n",
    }
    assert read_limits(tree(tmp_path, files)) == CgroupLimits(2.5, 5 * GB, "v1")


def test_v1_a_limit_of_a_group_that_does_not_show(tmp_path: Path) -> None:
    """Only ``memory.stat`` knows the pod's limit when the container's own group is all that is mounted."""
    files = {
        "proc/self/cgroup": "4:memory:/pod/ab12\n",
        "proc/self/mountinfo": v1_mounts(memory="/pod/ab12"),
        "sys/fs/cgroup/memory/memory.limit_in_bytes": V1_NONE,
        "sys/fs/cgroup/memory/memory.stat": f"cache 12\nhierarchical_memory_limit {2 * GB}\ntotal_rss 3\n",
    }
    assert read_limits(tree(tmp_path, files)) == CgroupLimits(None, 2 * GB, "v1")


# -------------------------------------------------------------------------------------- both, none, broken


def test_both_versions_side_by_side(tmp_path: Path) -> None:
    """The controllers are of version 1 and an empty tree of version 2 is mounted beside them; or half and half."""
    files = {
        "proc/self/cgroup": "4:memory:/job\n1:cpu,cpuacct:/\n0::/init.scope\n",
        "proc/self/mountinfo": v1_mounts() + V2_MOUNT.format(part="/").replace("fs/cgroup", "fs/cgroup/unified"),
        "sys/fs/cgroup/memory/job/memory.limit_in_bytes": f"{GB}\n",
        "sys/fs/cgroup/unified/init.scope/cgroup.procs": "1\n",
    }
    assert read_limits(tree(tmp_path, files)) == CgroupLimits(None, GB, "v1")
    tree(tmp_path, {"sys/fs/cgroup/unified/init.scope/cpu.max": "100000 100000\n"})
    assert read_limits(tmp_path) == CgroupLimits(1.0, GB, "v1 and v2")


def test_without_mountinfo_the_usual_places_are_looked_at(tmp_path: Path) -> None:
    v1 = {
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000\n",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{GB}\n",
    }
    assert read_limits(tree(tmp_path / "v1", v1)) == CgroupLimits(2.0, GB, "v1")
    v2 = {"sys/fs/cgroup/cpu.max": "200000 100000\n", "sys/fs/cgroup/memory.max": f"{GB}\n"}
    assert read_limits(tree(tmp_path / "v2", v2)) == CgroupLimits(2.0, GB, "v2")


def test_no_cgroups_are_no_limits(tmp_path: Path) -> None:
    assert read_limits(tmp_path) == CgroupLimits(None, None, "none")
    assert str(read_limits(tmp_path)) == "none"


def test_no_limits_are_no_limits(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "4:memory:/\n3:cpu,cpuacct:/\n0::/\n",
        "proc/self/mountinfo": v1_mounts() + V2_MOUNT.format(part="/").replace("fs/cgroup", "fs/cgroup/unified"),
        "sys/fs/cgroup/unified/cpu.max": "max 100000\n",
        "sys/fs/cgroup/unified/memory.max": "max\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": V1_NONE,
        "sys/fs/cgroup/memory/memory.stat": f"hierarchical_memory_limit {V1_NONE}",
    }
    assert read_limits(tree(tmp_path, files)) == CgroupLimits(None, None, "none")


@pytest.mark.parametrize("cgroup", ["", "odd\n", "0::\n", "::\n", "0:memory\n"])
@pytest.mark.parametrize("mounts", ["", "1 2 3\n", "1 2 3 / /x rw - cgroup2\n", " - cgroup cgroup rw,memory\n"])
def test_broken_files_are_no_limits(tmp_path: Path, cgroup: str, mounts: str) -> None:
    files = {
        "proc/self/cgroup": cgroup,
        "proc/self/mountinfo": mounts,
        "sys/fs/cgroup/cpu.max": "\n",
        "sys/fs/cgroup/memory.max": "lots\n",
        "sys/fs/cgroup/memory/memory.stat": "hierarchical_memory_limit\nodd\n",
    }
    assert read_limits(tree(tmp_path, files)) == CgroupLimits(None, None, "none")


def test_bytes_that_are_no_text_are_no_limits(tmp_path: Path) -> None:
    tree(tmp_path, {"sys/fs/cgroup/x": "", "proc/self/cgroup": "0::/\n"})
    (tmp_path / "sys/fs/cgroup/memory.max").write_bytes(b"\xff\xfe")
    (tmp_path / "sys/fs/cgroup/cpu.max").mkdir()
    assert read_limits(tmp_path) == CgroupLimits(None, None, "none")


def test_a_mount_point_with_a_blank_in_its_name(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/\n",
        "proc/self/mountinfo": V2_MOUNT.format(part="/").replace("/sys/fs/cgroup", "/sys/fs/c\\040group"),
        "sys/fs/c group/memory.max": f"{GB}\n",
    }
    assert read_limits(tree(tmp_path, files)).memory_bytes == GB


def test_it_reads_for_people() -> None:
    assert str(CgroupLimits(1.5, 4 * GB, "v2")) == "v2, 1.50 CPUs, 4,000 MB"
    assert str(CgroupLimits(None, GB, "v1")) == "v1, any number of CPUs, 1,000 MB"
    assert str(CgroupLimits(2.0, None, "v1")) == "v1, 2.00 CPUs, any memory"


def test_this_machines_own_can_be_read() -> None:
    limits = read_limits()
    assert limits.cpus is None or limits.cpus > 0
    assert limits.memory_bytes is None or limits.memory_bytes > 0
