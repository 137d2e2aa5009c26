"""Memory sizes that fit into the container's."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortex_tasks.config import FleetConfig, ImageConfig, default_queues_file, load_fleet
from workers.sizing import LIBRARIES_BYTES, allowed_memory, describe, fitted

GB, MB = 10**9, 10**6


@pytest.fixture(scope="module")
def fleet() -> FleetConfig:
    return load_fleet(default_queues_file())


def image(memory: str) -> ImageConfig:
    return ImageConfig.model_validate({"cpus": 1, "memory": memory, "storage": "1GB"})


def test_the_smaller_of_image_and_container_counts() -> None:
    assert allowed_memory(4 * GB, image("8GB")) == 4 * GB
    assert allowed_memory(32 * GB, image("8GB")) == 8 * GB
    assert allowed_memory(32 * GB, None) == 32 * GB


@pytest.mark.parametrize(("name", "children"), [("nlp", 1), ("ml", 2), ("prod", 3), ("dev", 3)])
def test_the_images_of_the_fleet_have_room_for_its_sizes(fleet: FleetConfig, name: str, children: int) -> None:
    assert fitted(fleet, fleet.images[name].memory, children=children) is fleet


def test_a_small_container_gets_smaller_parts(fleet: FleetConfig) -> None:
    memory = fitted(fleet, 2 * GB, children=1).memory_config
    given = fleet.memory_config
    # 1,800 MB less 600 MB of libraries less 512 MB of children, in the proportions 2,000 : 1,000 : 512.
    assert memory.process_pool == given.process_pool
    assert memory.model_cache == pytest.approx(392 * MB, rel=0.01)
    assert memory.inference_buffer == pytest.approx(196 * MB, rel=0.01)
    assert memory.shared_memory == pytest.approx(100 * MB, rel=0.01)


def test_nobody_keeps_memory_for_children_that_are_not_there(fleet: FleetConfig) -> None:
    memory = fitted(fleet, 2 * GB, children=0).memory_config
    assert memory.process_pool == fleet.memory_config.process_pool
    assert memory.model_cache == pytest.approx(683 * MB, rel=0.01)


def test_l1_counts_where_it_is_the_smaller(fleet: FleetConfig) -> None:
    l1 = fleet.model_storage.l1_memory.model_copy(update={"size": GB})
    small = fleet.model_copy(update={"model_storage": fleet.model_storage.model_copy(update={"l1_memory": l1})})
    assert fitted(small, 2 * GB, children=0).memory_config.model_cache < GB * 0.5


@given(memory_bytes=st.integers(0, 64 * GB), children=st.integers(0, 4))
def test_no_part_grows_and_together_they_fit(fleet: FleetConfig, memory_bytes: int, children: int) -> None:
    given_, memory = fleet.memory_config, fitted(fleet, memory_bytes, children=children).memory_config
    parts = memory.model_dump()
    assert all(0 <= size <= getattr(given_, name) for name, size in parts.items())
    if memory_bytes > 1.2 * GB and children:
        assert sum(parts.values()) + LIBRARIES_BYTES <= memory_bytes


def test_the_other_figures_stay(fleet: FleetConfig) -> None:
    small = fitted(fleet, 2 * GB, children=1)
    assert small.model_copy(update={"memory_config": fleet.memory_config}) == fleet


def test_it_reads_for_people(fleet: FleetConfig) -> None:
    assert describe(fleet.memory_config) == (
        "models 2,000 MB, a batch 1,000 MB, child processes 512 MB, /dev/shm 512 MB"
    )
