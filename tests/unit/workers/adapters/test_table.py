"""Finding an adapter's class by name, and what is said when it cannot be found."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from cortex_tasks.errors import ConfigError, ModelUnavailable
from workers.adapters import ADAPTERS, Adapter, adapter_class


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of a package ``own_adapters`` that is on the path."""
    package = tmp_path / "own_adapters"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_adapters", raising=False)
    return package


def refusal(name: str) -> str:
    with pytest.raises(ModelUnavailable) as caught:
        adapter_class(name)
    return str(caught.value)


def test_one_of_the_table_and_one_of_ones_own(own: Path) -> None:
    (own / "fine.py").write_text("class Mine: ...")
    assert issubclass(adapter_class("echo"), Adapter)
    assert adapter_class("own_adapters.fine:Mine").__name__ == "Mine"


@pytest.mark.parametrize("name", ["no_such_module:Mine", "no_such_package.module:Mine"])
def test_a_module_that_is_not_on_the_path(name: str) -> None:
    said = refusal(name)
    assert f"there is no module {name.partition(':')[0].partition('.')[0]!r} where the worker looks" in said
    assert "PYTHONPATH" in said


def test_a_package_that_lacks_the_module(own: Path) -> None:
    said = refusal("own_adapters.fien:Mine")
    assert "there is no module 'own_adapters.fien' where the worker looks" in said
    assert "PYTHONPATH" in said


def test_a_library_that_the_module_lacks(own: Path) -> None:
    (own / "needy.py").write_text("import no_such_library.part")
    said = refusal("own_adapters.needy:Mine")
    assert "'own_adapters.needy' was found, but imports 'no_such_library', which is not installed" in said
    assert "PYTHONPATH" not in said


def test_a_module_that_breaks_otherwise(own: Path) -> None:
    (own / "broken.py").write_text("from os import no_such_name")
    said = refusal("own_adapters.broken:Mine")
    assert "cannot be imported: cannot import name 'no_such_name' from 'os'" in said
    assert "install" not in said


def test_a_library_of_ours_that_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, ADAPTERS["prophet"].target.partition(":")[0], None)
    assert "pip install 'datapunk-cortex[prophet]'" in refusal("prophet")


def test_wrong_names(own: Path) -> None:
    (own / "other.py").touch()
    with pytest.raises(ConfigError, match="did you mean 'echo'"):
        adapter_class("ecko")
    with pytest.raises(ConfigError, match="no attribute 'Mine'"):
        adapter_class("own_adapters.other:Mine")
