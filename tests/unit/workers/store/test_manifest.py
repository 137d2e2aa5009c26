from __future__ import annotations

import os
from pathlib import Path

import pytest

from cortex_tasks.errors import ModelUnavailable
from workers.store.manifest import digest_of, manifest, refuse_pickle


def _model(root: Path, weights: bytes = b"weights") -> Path:
    (root / "1_Pooling").mkdir(parents=True)
    (root / "model.safetensors").write_bytes(weights)
    (root / "config.json").write_text("{}")
    (root / "1_Pooling" / "config.json").write_text("{}")
    return root


def _digest(root: Path) -> str:
    return digest_of(manifest(root))


def test_a_manifest_lists_names_sizes_and_hashes_in_order(tmp_path: Path) -> None:
    entries = manifest(_model(tmp_path))
    assert [(entry.name, entry.size_bytes) for entry in entries] == [
        ("1_Pooling/config.json", 2),
        ("config.json", 2),
        ("model.safetensors", 7),
    ]
    assert entries[1].sha256 == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"


def test_a_digest_depends_on_content_and_not_on_the_place(tmp_path: Path) -> None:
    assert _digest(_model(tmp_path / "here")) == _digest(_model(tmp_path / "there"))
    assert _digest(_model(tmp_path / "other", b"weightz")) != _digest(tmp_path / "here")


@pytest.mark.parametrize(
    "name", ["README.md", "LICENSE", ".gitattributes", "__init__.py", "onnx/.cache/x", "__pycache__/x"]
)
def test_files_that_no_model_reads_do_not_count(tmp_path: Path, name: str) -> None:
    before = _digest(_model(tmp_path))
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("anything")
    assert _digest(tmp_path) == before


@pytest.mark.parametrize("name", ["vocab.txt", "tokenizer.json", "vocab/lookups.bin", "ner/model", "spiece.model"])
def test_files_that_a_model_reads_count(tmp_path: Path, name: str) -> None:
    before = _digest(_model(tmp_path))
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("anything")
    assert _digest(tmp_path) != before


def test_a_renamed_file_changes_the_digest(tmp_path: Path) -> None:
    before = _digest(_model(tmp_path))
    (tmp_path / "config.json").rename(tmp_path / "generation_config.json")
    assert _digest(tmp_path) != before


def test_a_file_changed_in_place_is_read_again(tmp_path: Path) -> None:
    before = _digest(_model(tmp_path))
    weights = tmp_path / "model.safetensors"
    stat = weights.stat()
    weights.write_bytes(b"WEIGHTS")
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert _digest(tmp_path) != before


def test_links_to_files_are_followed_as_the_hubs_cache_has_them(tmp_path: Path) -> None:
    real = _model(tmp_path / "real")
    linked = tmp_path / "linked"
    for path in (file for file in real.rglob("*") if file.is_file()):
        target = linked / path.relative_to(real)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(path)
    assert _digest(linked) == _digest(real)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "model.pkl", "x.ckpt"]
)
def test_pickled_weights_alone_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04")
    with pytest.raises(ModelUnavailable, match=rf"'file:x' has only pickled weights \({name}\)"):
        refuse_pickle(tmp_path, "file:x")


def test_pickled_weights_beside_safetensors_are_passed_over(tmp_path: Path) -> None:
    before = _digest(_model(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    refuse_pickle(tmp_path, "file:x")
    assert _digest(tmp_path) == before


def test_a_module_with_pickled_weights_only_is_refused_though_its_model_is_safe(tmp_path: Path) -> None:
    _model(tmp_path)
    (tmp_path / "2_Dense").mkdir()
    (tmp_path / "2_Dense" / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ModelUnavailable, match=r"2_Dense/pytorch_model\.bin"):
        refuse_pickle(tmp_path, "file:x")


def test_binary_files_that_are_not_weights_are_no_pickles(tmp_path: Path) -> None:
    (tmp_path / "vocab").mkdir()
    (tmp_path / "vocab" / "lookups.bin").write_bytes(b"\x80")
    refuse_pickle(tmp_path, "pypi:en_core_web_sm")
