"""Models of Forge's registry: published, read, damaged, half there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from cortex_tasks.errors import ConfigError, ModelUnavailable
from workers.store import forge
from workers.store.disk import Disk
from workers.store.tiers import Store

fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed")


@pytest.fixture(params=["file", "memory"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The address of an empty registry: a directory, and an object store."""
    if request.param == "file":
        yield (tmp_path / "forge").as_uri()
        return
    place = f"/{uuid4().hex}"
    yield f"memory:/{place}"
    filesystem = fsspec.filesystem("memory")
    if filesystem.exists(place):
        filesystem.rm(place, recursive=True)


@pytest.fixture
def trained(tmp_path: Path) -> Callable[[bytes], Path]:
    """Makes a directory with a model of some weights, as training leaves it."""

    def make(weights: bytes) -> Path:
        directory = tmp_path / weights.decode()
        (directory / "1_Pooling").mkdir(parents=True)
        (directory / "model.safetensors").write_bytes(weights)
        (directory / "config.json").write_bytes(b"{}")
        (directory / "1_Pooling" / "config.json").write_bytes(b"{}")
        (directory / "README.md").write_bytes(b"nothing that decides an answer")
        return directory

    return make


def store(tmp_path: Path, registry: str | None, host: str = "host") -> Store:
    return Store(disks=[Disk(tmp_path / host, max_bytes=10**9)], forge_url=registry)


def inside(registry: str, path: str) -> tuple[Any, str]:
    filesystem, root = fsspec.core.url_to_fs(registry)
    return filesystem, f"{root}/{path}"


def weights_of(tmp_path: Path, registry: str, host: str, revision: str | None = None, *, again: bool = False) -> bytes:
    opened = store(tmp_path, registry, host).open("forge:team/minilm", revision, again=again)
    assert opened.snapshot.path is not None
    return (opened.snapshot.path / "model.safetensors").read_bytes()


def test_what_is_published_is_served_until_the_next_is_asked_for(
    registry: str, trained: Callable[[bytes], Path], tmp_path: Path
) -> None:
    first = forge.publish(registry, "team/minilm", trained(b"first"))
    assert weights_of(tmp_path, registry, "host") == b"first"
    opened = store(tmp_path, registry).open("forge:team/minilm")
    assert (opened.tier, opened.snapshot.digest) == ("disk", first)
    assert opened.snapshot.path is not None
    assert not (opened.snapshot.path / "README.md").exists()
    second = forge.publish(registry, "team/minilm", trained(b"second"))
    assert second != first
    assert weights_of(tmp_path, registry, "host") == b"first"
    assert weights_of(tmp_path, registry, "host", again=True) == b"second"
    assert weights_of(tmp_path, registry, "other host") == b"second"


def test_a_revision_is_pinned_by_its_digest_or_the_beginning_of_it(
    registry: str, trained: Callable[[bytes], Path], tmp_path: Path
) -> None:
    first = forge.publish(registry, "team/minilm", trained(b"first"))
    forge.publish(registry, "team/minilm", trained(b"second"))
    assert weights_of(tmp_path, registry, "a", first) == b"first"
    assert weights_of(tmp_path, registry, "b", first[:12].upper()) == b"first"
    for absent in ("0" * 64, "0" * 12, first[:4]):
        with pytest.raises(ModelUnavailable, match="the registry has no"):
            store(tmp_path, registry, "c").open("forge:team/minilm", absent)


def test_the_old_revision_can_be_made_current_again_and_nothing_is_sent_for_that(
    registry: str, trained: Callable[[bytes], Path], tmp_path: Path
) -> None:
    old = trained(b"first")
    digest = forge.publish(registry, "team/minilm", old)
    forge.publish(registry, "team/minilm", trained(b"second"))
    filesystem, path = inside(registry, f"team/minilm/{digest}/config.json")
    before = filesystem.modified(path)
    assert forge.publish(registry, "team/minilm", old) == digest
    assert filesystem.modified(path) == before
    assert weights_of(tmp_path, registry, "host") == b"first"


def test_a_publication_that_ends_half_way_changes_nothing_for_readers(
    registry: str, trained: Callable[[bytes], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forge.publish(registry, "team/minilm", trained(b"first"))
    second = trained(b"second")
    filesystem, _ = inside(registry, "")

    def cut_off(*_: Any, **__: Any) -> None:
        raise OSError("the line is cut")

    with monkeypatch.context() as patch:
        patch.setattr(type(filesystem), "put_file", cut_off)
        with pytest.raises(OSError, match="the line is cut"):
            forge.publish(registry, "team/minilm", second)
    assert weights_of(tmp_path, registry, "host") == b"first"
    forge.publish(registry, "team/minilm", second)
    assert weights_of(tmp_path, registry, "other host") == b"second"


@pytest.mark.parametrize("damage", ["file", "manifest", "garbage", "outside", "current"])
def test_damage_in_the_registry_is_told_and_not_loaded(
    registry: str, trained: Callable[[bytes], Path], tmp_path: Path, damage: str
) -> None:
    digest = forge.publish(registry, "team/minilm", trained(b"weights"))
    place, content = {
        "file": (f"{digest}/model.safetensors", b"Weights"),
        "manifest": (f"{digest}.json", b'{"files": [["model.safetensors", 7, "' + b"0" * 64 + b'"]]}'),
        "garbage": (f"{digest}.json", b"\xff{"),
        "outside": (f"{digest}.json", b'{"files": [["../../x", 7, "' + b"0" * 64 + b'"]]}'),
        "current": ("current", b"../" * 20),
    }[damage]
    filesystem, path = inside(registry, f"team/minilm/{place}")
    filesystem.pipe_file(path, content)
    with pytest.raises(ModelUnavailable, match=r"forge:team/minilm"):
        store(tmp_path, registry).open("forge:team/minilm")
    assert not list((tmp_path / "host").rglob("*.safetensors"))


def test_without_a_registry_or_a_client_for_it_the_remedy_is_told(
    trained: Callable[[bytes], Path], tmp_path: Path
) -> None:
    with pytest.raises(ModelUnavailable, match="set CORTEX_FORGE_URL"):
        store(tmp_path, None).open("forge:m")
    with pytest.raises(ConfigError, match="CORTEX_FORGE_URL"):
        forge.publish(None, "m", trained(b"first"))
    with pytest.raises(ModelUnavailable, match="could not be read") as told:
        store(tmp_path, "nosuch://user:secret@host/x").open("forge:m")
    assert "secret" not in str(told.value)


@pytest.mark.parametrize("name", ["", "../up", "a/../b", "/etc", "a//b", "a b"])
def test_a_name_leads_nowhere_else(name: str, registry: str, trained: Callable[[bytes], Path], tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match="not of the form forge:<name>"):
        store(tmp_path, registry).open(f"forge:{name}")
    with pytest.raises(ModelUnavailable, match="not of the form forge:<name>"):
        forge.publish(registry, name, trained(b"first"))


def test_pickled_weights_are_not_published(registry: str, tmp_path: Path) -> None:
    directory = tmp_path / "old"
    directory.mkdir()
    (directory / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(ModelUnavailable, match="only pickled weights"):
        forge.publish(registry, "m", directory)
    (directory / "pytorch_model.bin").rename(directory / "notes.md")
    with pytest.raises(ModelUnavailable, match="holds no model files"):
        forge.publish(registry, "m", directory)
