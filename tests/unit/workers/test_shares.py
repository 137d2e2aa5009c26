"""What a worker's card says of the budgets of queues.yaml."""

from __future__ import annotations

from pathlib import Path

import pytest

from cortex_tasks.config import FleetConfig, load_fleet
from cortex_tasks.presence import BudgetCard
from tests.support.worker_process import QUEUES_FILE
from workers.registry import Registry
from workers.shares import Shares
from workers.store.disk import Disk
from workers.store.manifest import manifest
from workers.store.tiers import Store


def registry_of(fleet: FleetConfig, tmp_path: Path, alias: str) -> Registry:
    store = Store(disks=[Disk(tmp_path / "models", max_bytes=10**9), Disk(tmp_path / "shm", max_bytes=10**6)])
    return Registry(
        fleet, [alias], threads=1, device="cpu", models_dir=None, clock=lambda: 0.0, cache_dir=tmp_path, store=store
    )


@pytest.fixture
def fleet() -> FleetConfig:
    return load_fleet(QUEUES_FILE)


def test_every_budget_is_shown_with_its_limit_before_anything_is_loaded(fleet: FleetConfig, tmp_path: Path) -> None:
    cards = Shares(registry_of(fleet, tmp_path, "echo")).cards(0.0)
    limits = fleet.memory_config
    assert cards == {
        "model_cache": BudgetCard(
            used_bytes=0, limit_bytes=min(limits.model_cache, fleet.model_storage.l1_memory.size)
        ),
        "inference_buffer": BudgetCard(used_bytes=0, limit_bytes=limits.inference_buffer),
        "process_pool": BudgetCard(used_bytes=0, limit_bytes=limits.process_pool),
        "model_store": BudgetCard(used_bytes=0, limit_bytes=10**9),
        "shared_memory": BudgetCard(used_bytes=0, limit_bytes=10**6),
    }
    assert not list(tmp_path.iterdir()), "a look makes nothing"


def test_a_loaded_model_counts_with_its_weights_and_a_full_batch(tmp_path: Path) -> None:
    fleet = load_fleet()
    registry = registry_of(fleet, tmp_path, "minilm")
    model = registry.load("minilm")
    try:
        cards = Shares(registry).cards(0.0)
        assert cards["model_cache"].used_bytes == model.card().size_bytes > 80 * 10**6
        batch = cards["inference_buffer"]
        assert 0 < batch.used_bytes <= batch.limit_bytes
    finally:
        registry.close()


def test_children_count_in_the_process_pool(fleet: FleetConfig, tmp_path: Path) -> None:
    config = fleet.models["echo"].model_copy(update={"children": 1})
    registry = registry_of(fleet.model_copy(update={"models": {**fleet.models, "echo": config}}), tmp_path, "echo")
    registry.load("echo")
    try:
        cards = Shares(registry).cards(0.0)
        assert cards["process_pool"].used_bytes > 10**6
        assert cards["model_cache"].used_bytes == 0
    finally:
        registry.close()


def test_the_disk_is_looked_through_now_and_then_only(fleet: FleetConfig, tmp_path: Path) -> None:
    registry = registry_of(fleet, tmp_path, "echo")
    shares = Shares(registry)
    assert shares.cards(0.0)["model_store"].used_bytes == 0
    disk = registry.store.disks[0]
    with disk.fetching("key", 1.0) as partial:
        (partial / "model.safetensors").write_bytes(bytes(1_000))
        disk.publish(partial, manifest(partial), "hub:a/b", "key").release()
    assert shares.cards(29.0)["model_store"].used_bytes == 0
    assert shares.cards(30.0)["model_store"].used_bytes == 1_000
