"""The images' locks: what pyproject.toml demands, each file with its hash, and nothing of where it was found."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from deploy.generate.__main__ import ROOT

LOCKS: Final = sorted((ROOT / "docker").glob("requirements-*.lock"))
#: The extras of each lock, as tools/lock.sh has them.
EXTRAS: Final = {
    "base": ("minilm", "transformers", "flower"),
    "nlp": ("nlp", "flower"),
    "ml": ("ml", "flower"),
    "dev": ("all", "test", "check", "reload"),
}


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return found


def pins(name: str) -> dict[str, Version]:
    text = (ROOT / "docker" / f"requirements-{name}.lock").read_text(encoding="utf-8")
    return {canonicalize_name(package): Version(version) for package, version in re.findall(r"(?m)^(\S+)==(\S+)", text)}


def demanded(project: dict[str, Any], extras: tuple[str, ...]) -> Iterator[Requirement]:
    """The requirements of the package and of its extras, those that an extra names included."""
    for text in (*project["dependencies"], *(t for name in extras for t in project["optional-dependencies"][name])):
        requirement = Requirement(text)
        if requirement.name == project["name"]:
            yield from demanded(project, tuple(sorted(requirement.extras)))
        else:
            yield requirement


@pytest.mark.parametrize("name", EXTRAS)
def test_a_lock_holds_what_is_demanded(project: dict[str, Any], name: str) -> None:
    locked = pins(name)
    for requirement in demanded(project, EXTRAS[name]):
        if requirement.name == "torch":
            continue
        version = locked.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not locked: make lock"
        assert requirement.specifier.contains(version), f"{requirement}, but {version} is locked: make lock"


@pytest.mark.parametrize("build", ["cpu", "cuda"])
def test_torch_has_locks_of_its_own(project: dict[str, Any], build: str) -> None:
    (wanted,) = {requirement for requirement in demanded(project, ("ml",)) if requirement.name == "torch"}
    version = pins(f"torch-{build}")["torch"]
    assert wanted.specifier.contains(version)
    assert (version.local == "cpu") == (build == "cpu")
    assert not any("torch" in pins(name) for name in EXTRAS)


def test_the_locks_agree_with_each_other() -> None:
    whole = pins("dev")
    for name in (*EXTRAS, "torch-cuda"):
        for package, version in pins(name).items():
            assert package == "torch" or whole.get(package, version) == version, f"{name}: {package}"


@pytest.mark.parametrize("lock", LOCKS, ids=[lock.stem for lock in LOCKS])
def test_every_file_has_a_hash_and_no_address(lock: Path) -> None:
    text = lock.read_text(encoding="utf-8")
    entries = re.split(r"(?m)^(?=[a-z0-9])", text)[1:]
    assert entries
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}\b", entry) for entry in entries)
    assert not re.search(r"://|--(extra-)?index|--find-links|^/", text, re.MULTILINE)


def test_every_lock_has_a_maker() -> None:
    made = (ROOT / "tools" / "lock.sh").read_text(encoding="utf-8")
    names = {lock.stem.removeprefix("requirements-") for lock in LOCKS}
    assert names == set(re.findall(r"(?m)^compile (\S+)", made))
