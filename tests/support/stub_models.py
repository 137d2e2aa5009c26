"""Adapters, a registry and a listener that tests of the worker's threads steer by hand."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

from cortex_tasks.config import FleetConfig
from cortex_tasks.errors import CortexError, InvalidInput
from cortex_tasks.payloads import EmbedParams, Params
from workers.adapters import Adapter, Item, LoadContext
from workers.registry import Registry
from workers.runner import Runner
from workers.runtime import Job

#: No test waits longer than this for another thread.
PATIENCE_S = 20.0


def fleet_of(**models: dict[str, Any]) -> FleetConfig:
    """A fleet of stub models, all in one image; each argument changes one model's configuration."""
    plain = {
        "source": "builtin:stub",
        "adapter": "tests.support.stub_models:StubAdapter",
        "tasks": ["embed"],
        "backend": "native",
        "images": ["test"],
        "batching": {"max_items": 8, "max_padded_tokens": 1_000},
    }
    declared = {alias: {"queue": alias, **plain, **changes} for alias, changes in models.items()}
    queues = sorted({model["queue"] for model in declared.values()})
    image = {"queues": queues, "cpus": 1, "memory": "1GB", "storage": "1GB"}
    return FleetConfig.model_validate({"version": 1, "models": declared, "images": {"test": image}})


def registry_of(fleet: FleetConfig, clock: Callable[[], float] = lambda: 0.0) -> Registry:
    return Registry(fleet, fleet.models, threads=1, device="cpu", models_dir=None, clock=clock)


def ready(registry: Registry, alias: str, adapter: Adapter) -> None:
    """Make a model ready with this adapter, without loading."""
    model = registry.model(alias)
    model.adapter, model.state, model.revision = adapter, "ready", "rev"
    registry.memory.enter(alias, adapter.size_bytes, pinned=False, reload_s=1.0)
    registry.memory.release(alias)


def job(job_id: str, *inputs: Any, model: str = "m", **more: Any) -> Job:
    return Job(job_id, model, "embed", EmbedParams(), inputs, **more)


@contextmanager
def started(runner: Runner, let_go: Callable[[], None]) -> Iterator[None]:
    """A runner that works within. ``let_go``: called at the end, for passes that a test holds up."""
    runner.start()
    try:
        yield
    finally:
        let_go()
        runner.stop()
        runner.join(PATIENCE_S)
        assert not runner.is_alive()


class StubAdapter(Adapter):
    """Echoes its inputs. ``refuse``: inputs that prepare refuses. A forward pass waits while ``gate`` is not set."""

    def __init__(self, refuse: set[str] | None = None) -> None:
        self.refuse = refuse or set()
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.prepared: list[str] = []
        self.passes: list[list[str]] = []
        self.closed = False

    @classmethod
    def load(cls, context: LoadContext) -> Self:
        return cls()

    @property
    def size_bytes(self) -> int:
        return 7

    def example(self, task: str) -> tuple[Sequence[Any], Params]:
        return ["warm"], EmbedParams()

    def prepare(self, task: str, inputs: Sequence[Any], params: Params) -> list[Item | CortexError]:
        self.prepared += inputs
        return [InvalidInput("refused") if value in self.refuse else Item(value, len(value)) for value in inputs]

    def forward(self, task: str, items: Sequence[Item], params: Params) -> Sequence[Any]:
        self.entered.set()
        assert self.gate.wait(PATIENCE_S), "nobody opened the gate"
        self.passes.append([item.data for item in items])
        return [{"said": item.data} for item in items]

    def close(self) -> None:
        self.closed = True


class Panic(BaseException):
    """As pyo3's PanicException, which a Rust library's defect raises: no Exception."""


class Listener:
    """Events that are noted; ``wait`` for what another thread will tell."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []
        self.unwanted_ids: set[str] = set()
        self.refusals: dict[str, CortexError] = {}
        self.asked: list[str] = []
        self._changed = threading.Condition()

    def started(self, jobs: Sequence[Job]) -> None:
        self._note("started", jobs)

    def finished(self, jobs: Sequence[Job]) -> None:
        self._note("finished", jobs)

    def dropped(self, jobs: Sequence[Job]) -> None:
        self._note("dropped", jobs)

    def unwanted(self, job: Job) -> bool:
        return job.id in self.unwanted_ids

    def may_run(self, job: Job, index: int) -> CortexError | None:
        self.asked.append(job.id)
        return self.refusals.get(job.id)

    def survived(self, job: Job, index: int) -> None:
        self._note("survived", [job])

    def ids(self, what: str) -> list[str]:
        return [job_id for told, job_id in self.told if told == what]

    def wait(self, what: str, *job_ids: str) -> None:
        with self._changed:
            there = self._changed.wait_for(lambda: set(job_ids) <= set(self.ids(what)), PATIENCE_S)
        assert there, f"{what}: {job_ids} not among {self.told}"

    def _note(self, what: str, jobs: Sequence[Job]) -> None:
        with self._changed:
            self.told += [(what, job.id) for job in jobs]
            self._changed.notify_all()
