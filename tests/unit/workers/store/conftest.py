"""Hubs on loopback, and file systems that are too small or read-only."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty local cache of Hugging Face's, so that what this machine has fetched plays no part."""
    from huggingface_hub import constants

    cache = tmp_path / "hub-cache"
    cache.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return cache


@pytest.fixture
def point_to(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes Hugging Face's library ask a hub at a URL."""
    from huggingface_hub import constants

    def point(url: str) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")

    return point


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts a file system in memory: ``mounted(size_kb, read_only=False)``. Needs the right to mount."""
    made: list[Path] = []

    def mount(size_kb: int) -> Path:
        if os.geteuid() != 0:
            pytest.skip("mounting a small file system needs root")
        place = tmp_path / f"mount-{len(made)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size_kb}k", "tmpfs", str(place)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
        except FileNotFoundError:
            pytest.skip("there is no mount command")
        if done.returncode:
            pytest.skip(f"this machine lets nobody mount a file system: {done.stderr.strip()}")
        made.append(place)
        return place

    yield mount
    for place in made:
        subprocess.run(["umount", "-l", str(place)], check=True, timeout=20)
