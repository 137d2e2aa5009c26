"""From queues.yaml to the worker's card: the registry hands an adapter its engine's settings, also in a child."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from cortex_tasks.config import FleetConfig, load_fleet
from tests.support import tiny_models
from workers.registry import Registry

pytestmark = pytest.mark.models


def _fleet(tmp_path: Path, **model: object) -> FleetConfig:
    path = tiny_models.sentence_encoder(tmp_path)
    fleet = load_fleet()
    changes = {"source": f"file:{path}", "revision": None, "tasks": ("embed",)} | model
    raw = fleet.model_dump(mode="json")
    raw["models"] = {"minilm": raw["models"]["minilm"] | changes}
    raw["images"] = {"nlp": raw["images"]["nlp"] | {"queues": ["minilm"]}}
    raw["models"]["minilm"]["images"] = ["nlp"]
    return FleetConfig.model_validate(raw)


@pytest.mark.parametrize("children", [0, 1])
def test_the_card_names_the_engine_that_runs(tmp_path: Path, children: int) -> None:
    if not os.environ.get("CI"):
        pytest.importorskip("onnxruntime", reason="the extra 'onnx' is not installed")
    fleet = _fleet(tmp_path, backend="onnx", precision="int8", gate={"mean_cosine": 1.0}, children=children)
    cache = tmp_path / "cache"
    registry = Registry(
        fleet, ["minilm"], threads=1, device="cpu", models_dir=None, clock=time.monotonic, cache_dir=cache
    )
    try:
        card = registry.load("minilm").card()
    finally:
        registry.close()
    assert (card.backend, card.precision) == ("onnx", "fp32")
    assert card.engine.startswith("onnx fp32 cos 1.0000")
    assert "onnx int8 is refused" in card.reason
    assert len(list((cache / "engines").glob("*/entry.json"))) == 2
