"""What is fetched from object stores, on a make-believe one in memory."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from cortex_tasks.errors import ModelUnavailable
from workers.store import remotes
from workers.store.disk import Disk
from workers.store.tiers import Store

fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed")


@pytest.fixture
def bucket() -> Iterator[Callable[[str, bytes], None]]:
    """An S3 in memory; puts an object into it."""
    from fsspec.implementations.memory import MemoryFileSystem

    class MemoryS3(MemoryFileSystem):  # type: ignore[misc]
        protocol = "s3"
        store: ClassVar[dict[str, object]] = {}
        pseudo_dirs: ClassVar[list[str]] = [""]
        cachable = False

    fsspec.register_implementation("s3", MemoryS3, clobber=True)
    filesystem = fsspec.filesystem("s3")
    yield filesystem.pipe_file
    sys.modules["fsspec.registry"]._registry.pop("s3", None)


def store(root: Path) -> Store:
    return Store(disks=[Disk(root, max_bytes=10**9)])


def test_a_snapshot_in_s3_is_fetched_without_what_no_model_reads(
    bucket: Callable[[str, bytes], None], tmp_path: Path
) -> None:
    for name in ("config.json", "model.safetensors", "1_Pooling/config.json", "README.md", "pytorch_model.bin"):
        bucket(f"/models/minilm/{name}", name.encode())
    opened = store(tmp_path).open("s3:models/minilm")
    assert opened.tier == "origin"
    assert opened.snapshot.path is not None
    found = {path.relative_to(opened.snapshot.path).as_posix() for path in opened.snapshot.path.rglob("*.*")}
    assert found == {"config.json", "model.safetensors", "1_Pooling/config.json"}
    assert store(tmp_path).open("s3:models/minilm").tier == "disk"


def test_a_pinned_digest_is_compared(bucket: Callable[[str, bytes], None], tmp_path: Path) -> None:
    bucket("/models/m/model.safetensors", b"weights")
    digest = store(tmp_path).open("s3:models/m").snapshot.digest
    assert store(tmp_path).open("s3:models/m", digest[:12]).tier == "origin"
    with pytest.raises(ModelUnavailable, match="not the pinned"):
        store(tmp_path).open("s3:models/m", "0" * 12)


def test_pickled_weights_are_not_even_fetched(bucket: Callable[[str, bytes], None], tmp_path: Path) -> None:
    bucket("/models/old/pytorch_model.bin", b"\x80")
    with pytest.raises(ModelUnavailable, match="only pickled weights"):
        store(tmp_path).open("s3:models/old")


@pytest.mark.parametrize("source", ["s3:", "s3:bucket", "s3:bucket/../other"])
def test_an_address_without_a_path_is_refused(source: str, tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match="not of the form s3:<bucket>/<path>"):
        store(tmp_path).open(source)


def test_an_empty_place_and_a_missing_client_are_told(
    bucket: Callable[[str, bytes], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelUnavailable, match=r"holds no model files|could not be listed"):
        store(tmp_path).open("s3:models/absent")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(ModelUnavailable, match=r"pip install 'datapunk-cortex\[s3\]'"):
        store(tmp_path).open("s3:models/absent")


def test_a_fetch_tells_the_disks_errors_from_the_networks(tmp_path: Path) -> None:
    def bring(file: remotes.RemoteFile, directory: Path) -> None:
        raise OSError(int(file.name), "no")

    for number, kind in ((28, OSError), (104, ModelUnavailable)):
        remote = remotes.Remote("s3:a/b", (remotes.RemoteFile(str(number), 1),), bring)
        with pytest.raises(kind):
            remotes.fetch(remote, tmp_path, lambda _: None)
