"""``python -m deploy.generate`` writes the files of deployments; ``--check`` tells which are not current."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from cortex_tasks.config import FleetConfig, load_fleet
from deploy.generate import compose, kubernetes

__all__ = ["FILES", "ROOT", "main", "stale"]

ROOT: Final = Path(__file__).resolve().parents[2]
#: Each file, by its path in the checkout, and what makes its text of the fleet.
FILES: Final[Mapping[str, Callable[[FleetConfig], str]]] = {
    "docker/compose.yaml": compose.render,
    "docker/compose.gpu.yaml": compose.render_gpu,
    "deploy/kubernetes/base/queues.yaml": kubernetes.render_queues,
    "deploy/kubernetes/base/redis.yaml": kubernetes.render_redis,
    "deploy/kubernetes/base/workers.yaml": kubernetes.render_workers,
    "deploy/kubernetes/components/autoscaling/scaledobjects.yaml": kubernetes.render_scaling,
    "deploy/kubernetes/components/gpu/gpu.yaml": kubernetes.render_gpu,
}


def stale(fleet: FleetConfig) -> list[str]:
    """The files that are not what queues.yaml makes of them, or not there."""
    return [name for name, render in FILES.items() if _read(ROOT / name) != render(fleet)]


def _read(file: Path) -> str | None:
    return file.read_text(encoding="utf-8") if file.exists() else None


def main(arguments: list[str]) -> int:
    """The exit code: 1 where ``--check`` finds a file that is not current."""
    fleet = load_fleet(ROOT / "queues.yaml")
    old = stale(fleet)
    if arguments == ["--check"]:
        sys.stderr.writelines(f"{name} is not current: make deploy-files\n" for name in old)
        return 1 if old else 0
    for name in old:
        (ROOT / name).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / name).write_text(FILES[name](fleet), encoding="utf-8")
        sys.stdout.write(f"{name}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
