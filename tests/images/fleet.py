"""A fleet from docker/compose.yaml, as its users run it, with a model that can be told to eat all memory."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import yaml

from cortex_tasks import Cortex
from cortex_tasks.config import FleetConfig, load_fleet
from cortex_tasks.settings import Settings
from tests.images.engine import ROOT, Engine
from tests.support.redis_server import free_port

COMPOSE_FILE: Final = ROOT / "docker" / "compose.yaml"
SECRETS: Final = ROOT / "docker" / "secrets"
SERVICES: Final = ("redis-broker", "redis-cache", "nlp", "ml", "flower", "metrics")
#: What a worker is given besides its image: its adapter and its queues.yaml.
MOUNT: Final = "/opt/test"


def write_queues(folder: Path) -> Path:
    """The default fleet, and the model ``glutton`` on a queue of its own that nlp consumes too."""
    raw = yaml.safe_load((ROOT / "queues.yaml").read_text(encoding="utf-8"))
    raw["models"]["glutton"] = {
        "source": "builtin:echo", "adapter": "glutton:GluttonAdapter", "tasks": ["classify"], "backend": "native",
        "queue": "glutton", "images": ["nlp", "prod", "dev"], "batching": {"max_items": 4},
    }  # fmt: skip
    for image in ("nlp", "prod", "dev"):
        raw["images"][image]["queues"].append("glutton")
    file = folder / "queues.yaml"
    file.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return file


class ImagesFleet:
    """Redis twice, two nlp workers, an ml worker, Flower and the metrics; a context manager."""

    def __init__(self, engine: Engine, folder: Path, redis_image: str | None) -> None:
        subprocess.run([str(ROOT / "docker" / "secrets.sh")], check=True)
        self.project = f"cortextest{os.getpid()}"
        self.config: FleetConfig = load_fleet(write_queues(folder))
        (folder / "glutton.py").write_text((Path(__file__).parent / "glutton.py").read_text(encoding="utf-8"))
        self.flower_port = free_port()
        cpus = float(os.cpu_count() or 1)
        environ = {f"CORTEX_{name.upper()}_CPUS": f"{min(image.cpus, cpus):g}"
                   for name, image in self.config.images.items()}  # fmt: skip
        environ["CORTEX_FLOWER_PORT"] = str(self.flower_port)
        if redis_image is not None:
            environ["CORTEX_REDIS_IMAGE"] = redis_image
        self.engine = Engine(engine.prefix, engine.lab, engine.was_up, environ)
        mounted = {
            "volumes": [f"{folder}:{MOUNT}:ro"],
            "environment": {"CORTEX_QUEUES_FILE": f"{MOUNT}/queues.yaml", "PYTHONPATH": MOUNT},
        }
        self._override = folder / "compose.override.yaml"
        workers = dict.fromkeys(("nlp", "ml", "metrics"), mounted)
        self._override.write_text(yaml.safe_dump({"services": workers}), encoding="utf-8")

    def compose(self, *arguments: str, profile: str = "full", limit_s: float = 600) -> str:
        files = ("-f", str(COMPOSE_FILE), "-f", str(self._override))
        return self.engine.docker("compose", "-p", self.project, *files, "--profile", profile, *arguments,
                                  limit_s=limit_s)  # fmt: skip

    def up(self) -> None:
        """Returns when every container is healthy."""
        self.compose("up", "-d", "--no-build", "--wait", "--scale", "nlp=2", *SERVICES)

    def down(self) -> None:
        self.compose("down", "-v", "-t", "30")

    def container(self, service: str, number: int = 1) -> str:
        return f"{self.project}-{service}-{number}"

    def execute(self, service: str, script: str, number: int = 1, check: bool = True) -> str:
        """What a shell in the container prints."""
        return self.engine.docker("exec", self.container(service, number), "sh", "-c", script, check=check)

    def address(self, service: str) -> str:
        """Where this host reaches a container on the network ``fleet``."""
        networks = self.engine.inspect(self.container(service))["NetworkSettings"]["Networks"]
        return str(networks[f"{self.project}_fleet"]["IPAddress"])

    def settings(self) -> Settings:
        """Of a light client outside of the containers."""
        return Settings.from_env({
            "CORTEX_BROKER_URL": f"redis://{self.address('redis-broker')}:6379/0",
            "CORTEX_BROKER_PASSWORD_FILE": str(SECRETS / "broker_password"),
            "CORTEX_CACHE_URL": f"redis://{self.address('redis-cache')}:6379/0",
            "CORTEX_CACHE_PASSWORD_FILE": str(SECRETS / "cache_password"),
        })  # fmt: skip

    def client(self, timeout_s: float = 300.0) -> Cortex:
        return Cortex(fleet=self.config, settings=self.settings(), timeout_s=timeout_s)

    @contextmanager
    def profile(self, worker: str) -> Iterator[None]:
        """The worker of another profile beside the rest, healthy."""
        try:
            self.compose("up", "-d", "--no-build", "--wait", worker, profile=worker)
            yield
        finally:
            self.compose("rm", "--stop", "--force", worker, profile=worker)

    @contextmanager
    def one_more(self, image: str, tag: str, *options: str) -> Iterator[str]:
        """Another container of this fleet, with more options of ``docker run``; gives its name."""
        name = f"{self.project}-{image}-1"
        of_worker = self.engine.inspect(self.container("nlp", 2))["Config"]["Env"]
        variables = [text for text in of_worker if text.startswith(("CORTEX_BROKER", "CORTEX_CACHE"))]
        flags = [part for text in variables for part in ("-e", text)]
        # File by file: the directory is shut.
        passwords = ("broker_password", "cache_password")
        secrets = [part for file in passwords for part in ("-v", f"{SECRETS / file}:/run/secrets/{file}:ro")]
        self.engine.docker("run", "-d", "--name", name, "--network", f"{self.project}_fleet", "--read-only",
                           "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--tmpfs", "/tmp:size=256m",
                           *secrets, *options, *flags, tag)  # fmt: skip
        try:
            yield name
        finally:
            self.engine.docker("rm", "-f", "-v", name)

    def state(self, service: str, number: int = 1) -> dict[str, Any]:
        """State, health and number of restarts of a container."""
        found = self.engine.inspect(self.container(service, number))
        state: dict[str, Any] = {**found["State"], "Restarts": found["RestartCount"]}
        return state

    def memory(self, service: str, number: int = 1) -> tuple[int, int]:
        """The most that a container has used, and its limit, in bytes; cgroup v1 or v2."""
        script = (
            "cd /sys/fs/cgroup; if [ -e memory.max ]; then cat memory.peak memory.max; "
            "else cat memory/memory.max_usage_in_bytes memory/memory.limit_in_bytes; fi"
        )
        peak, limit = self.execute(service, script, number).split()
        return int(peak), int(limit)
