"""Workers of real models for tests: nlp and ml serve queues.yaml as it is, a third serves tiny DistilBERT models.

The tiny ones stand in for the default fleet's, which are on a hub that is not in reach.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cortex_tasks import Cortex, load_fleet
from cortex_tasks.presence import WorkerCard
from tests.support import tiny_models
from tests.support.redis_server import RedisServer, free_port
from tests.support.worker_process import ROOT, WorkerProcess

__all__ = ["ModelFleet", "model_fleet"]


@dataclass(frozen=True)
class ModelFleet:
    """Running workers and a client for each queues.yaml."""

    url: str
    #: Each worker's first card that said ready.
    nlp: WorkerCard
    ml: WorkerCard
    nlp_worker: WorkerProcess
    cortex: Cortex
    tiny: Cortex
    #: Where the tiny models lie.
    models: dict[str, Path]
    #: While it exists, model gated of the tiny fleet does not get loaded.
    gate: Path


def build_models(directory: Path) -> dict[str, Path]:
    return {
        "masked": tiny_models.masked_lm(directory / "masked"),
        "topics": tiny_models.classifier(directory / "topics"),
        "tags": tiny_models.classifier(directory / "tags", multi_label=True),
        "nli": tiny_models.nli(directory / "nli"),
    }


def write_queues(directory: Path, models: dict[str, Path], gate: Path) -> Path:
    """A queues.yaml whose models are the tiny ones."""
    tasks = {"masked": ["fill_mask", "features"], "topics": ["classify"], "tags": ["classify"], "nli": ["zero_shot"]}
    shared = {"queue": "tiny", "images": ["tiny"], "load": "lazy"}
    declared: dict[str, Any] = {
        alias: {"source": f"file:{path}", "adapter": "transformers", "tasks": tasks[alias], **shared}
        for alias, path in models.items()
    }
    declared["gated"] = {
        "source": "builtin:echo",
        "adapter": "tests.support.poison:GatedLoadAdapter",
        "tasks": ["embed"],
        "backend": "native",
        "options": {"gate": str(gate)},
        **shared,
    }
    image = {"queues": ["tiny"], "cpus": 2, "memory": "4GB", "storage": "1GB"}
    file = directory / "queues.yaml"
    file.write_text(yaml.safe_dump({"version": 1, "models": declared, "images": {"tiny": image}}))
    return file


@contextmanager
def model_fleet(directory: Path) -> Iterator[ModelFleet]:
    """Start everything side by side, and wait until all is warm."""
    # Whatever this machine can reach, has in its caches or computes with: the hub is away, the answers are a CPU's.
    env = {
        "HF_ENDPOINT": f"http://127.0.0.1:{free_port()}",
        "HF_HOME": str(directory / "hub"),
        "CORTEX_MODELS_DIR": "",
        "CORTEX_DEVICE": "cpu",
    }
    gate = directory / "gate"
    default = load_fleet(ROOT / "queues.yaml")
    with ExitStack() as stack:
        server = stack.enter_context(RedisServer(directory=directory))

        def start(name: str, queues: Sequence[str], file: Path) -> WorkerProcess:
            log = directory / f"{name}.log"
            worker = WorkerProcess(server.url, log, queues=",".join(queues), queues_file=file, env=env, wait=False)
            return stack.enter_context(worker)

        nlp = start("nlp", default.images["nlp"].consumed(gpu=False), ROOT / "queues.yaml")
        ml = start("ml", default.images["ml"].consumed(gpu=False), ROOT / "queues.yaml")
        models = build_models(directory)
        file = write_queues(directory, models, gate)
        tiny = start("tiny", ["tiny"], file)
        cards = [worker.wait_ready(180) for worker in (nlp, ml, tiny)]
        yield ModelFleet(
            url=server.url,
            nlp=cards[0],
            ml=cards[1],
            nlp_worker=nlp,
            cortex=stack.enter_context(Cortex(server.url, fleet=default, timeout_s=120)),
            tiny=stack.enter_context(Cortex(server.url, fleet=load_fleet(file), timeout_s=120)),
            models=models,
            gate=gate,
        )
