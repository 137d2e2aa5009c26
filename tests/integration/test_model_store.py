"""The store among real processes and threads: pulls that race or are killed, models that come and go under load."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import pytest
import yaml

from cortex_tasks.payloads import Params
from tests.support.fake_hub import FakeHub, fake_hub
from tests.support.stub_models import PATIENCE_S, Listener, StubAdapter, fleet_of, job, registry_of
from workers.adapters import Item, LoadContext
from workers.memory import Memory
from workers.registry import Registry
from workers.runner import Runner
from workers.runtime import Job
from workers.store.disk import Disk

ROOT = Path(__file__).resolve().parents[2]
FILES = {"config.json": b"{}", "model.safetensors": os.urandom(2_000_000)}


# ------------------------------------------------------------------------------------------------- pulling


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with fake_hub("org/name", FILES) as made:
        yield made


@pytest.fixture
def environment(hub: FakeHub, redis_url: str, tmp_path: Path) -> dict[str, str]:
    fleet = {
        "version": 1,
        "models": {
            "model": {
                "source": "hub:org/name", "adapter": "transformers", "tasks": ["features"], "queue": "q",
                "images": ["i"], "tier": "l2",
            }
        },
        "images": {"i": {"queues": ["q"], "cpus": 1, "memory": "1GB", "storage": "1GB"}},
    }  # fmt: skip
    (tmp_path / "queues.yaml").write_text(yaml.safe_dump(fleet))
    return {
        **os.environ,
        "CORTEX_QUEUES_FILE": str(tmp_path / "queues.yaml"),
        "CORTEX_CACHE_URL": redis_url,
        "CORTEX_MODELS_DIR": str(tmp_path / "models"),
        "HF_ENDPOINT": hub.url,
        "HF_HUB_CACHE": str(tmp_path / "hub-cache"),
        "PYTHONPATH": str(ROOT),
    }


def pulling(environment: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from cortex_tasks.cli import main; main()", "models", "pull", "model"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen[str]) -> str:
    said, complained = process.communicate(timeout=60)
    assert process.returncode == 0, complained
    return said


def disk_of(environment: dict[str, str]) -> Disk:
    return Disk(Path(environment["CORTEX_MODELS_DIR"]), max_bytes=10**9)


@pytest.mark.fleet
def test_processes_that_pull_at_once_fetch_once(hub: FakeHub, environment: dict[str, str]) -> None:
    hub.stalls = {"model.safetensors"}
    hub.hold_s = 2.0
    said = [finished(process) for process in [pulling(environment) for _ in range(3)]]
    assert sorted(line.split()[5] for line in said) == ["disk", "disk", "origin"]
    assert hub.fetched.count("model.safetensors") == 1
    [stored] = disk_of(environment).revisions()
    assert disk_of(environment).verify(stored.digest) == []


@pytest.mark.fleet
def test_a_pull_that_is_killed_in_the_middle_leaves_nothing_torn_and_the_next_succeeds(
    hub: FakeHub, environment: dict[str, str]
) -> None:
    hub.stalls = {"model.safetensors"}
    first = pulling(environment)
    assert hub.stalled.wait(60), "it began to fetch the weights"
    os.kill(first.pid, signal.SIGKILL)
    first.communicate(timeout=60)
    disk = disk_of(environment)
    assert disk.revisions() == []
    assert list((disk.root / "partial").iterdir()), "it was killed in the middle"
    hub.stalls = set()
    hub.go_on.set()
    assert " from origin in " in finished(pulling(environment))
    [stored] = disk.revisions()
    assert disk.verify(stored.digest) == []
    assert list((disk.root / "partial").iterdir()) == []


# ------------------------------------------------------------------------------------------ coming and going


class Fragile(StubAdapter):
    """Fails the test when it is used after it was closed."""

    misused: ClassVar[list[str]] = []
    loads: ClassVar[int] = 0

    @classmethod
    def load(cls, context: LoadContext) -> Self:
        Fragile.loads += 1
        return cls()

    def prepare(self, task: str, inputs: Sequence[Any], params: Params) -> Any:
        if self.closed:
            self.misused.append("prepare")
        return super().prepare(task, inputs, params)

    def forward(self, task: str, items: Sequence[Item], params: Params) -> Sequence[Any]:
        outputs = super().forward(task, items, params)
        if self.closed:
            self.misused.append("forward")
        return outputs


def crowded(room: int, models: int) -> Registry:
    adapter = {"adapter": f"{__name__}:Fragile"}
    registry = registry_of(fleet_of(**{f"m{number}": adapter for number in range(models)}))
    # Stubs take 7 bytes each.
    registry.memory = Memory(7 * room, 1e9, registry._let_go, lambda: 0.0, patience_s=0.05, limit_s=PATIENCE_S)
    return registry


def test_jobs_of_more_models_than_fit_are_all_answered_and_no_model_is_closed_in_use() -> None:
    Fragile.misused, Fragile.loads = [], 0
    registry, events = crowded(room=3, models=6), Listener()
    runner = Runner("crowd", registry, events)
    runner.start()
    ids = [f"{sender}-{number}" for sender in range(4) for number in range(40)]

    sent: list[Job] = []

    def send(sender: int) -> None:
        for number in range(40):
            one = job(f"{sender}-{number}", "a", "b", model=f"m{(sender + number) % 6}")
            sent.append(one)
            runner.submit(one)
            if number % 2:
                events.wait("finished", one.id)

    senders = [threading.Thread(target=send, args=(sender,)) for sender in range(4)]
    for thread in senders:
        thread.start()
    for thread in senders:
        thread.join()
    events.wait("finished", *ids)
    runner.stop()
    runner.join(PATIENCE_S)
    assert Fragile.misused == []
    assert sorted(events.ids("finished")) == sorted(ids), "each once"
    assert all(one.outcomes == [{"said": "a"}, {"said": "b"}] for one in sent)
    assert registry.memory.used_bytes <= 21
    assert 0 < registry.store.counters.reloads <= Fragile.loads - 6


def test_a_busy_model_leaves_when_another_has_waited_and_its_own_jobs_are_answered_too() -> None:
    Fragile.misused, Fragile.loads = [], 0
    registry, events = crowded(room=1, models=2), Listener()
    runner = Runner("one", registry, events)
    runner.start()
    runner.submit(job("first", "x", model="m0"))
    events.wait("finished", "first")
    adapter = registry.model("m0").adapter
    assert isinstance(adapter, Fragile)
    adapter.gate.clear()
    jobs = {
        alias: job(name, "x", model=alias[:2]) for alias, name in (("m0", "running"), ("m1", "other"), ("m0b", "own"))
    }
    runner.submit(jobs["m0"])
    assert adapter.entered.wait(PATIENCE_S)
    runner.submit(jobs["m1"])
    runner.submit(jobs["m0b"])
    adapter.gate.set()
    events.wait("finished", "running", "other", "own")
    runner.stop()
    runner.join(PATIENCE_S)
    assert Fragile.misused == []
    assert [one.outcomes for one in jobs.values()] == [[{"said": "x"}]] * 3
    assert Fragile.loads in (2, 3), "its own later job may have come before it was asked to leave"
