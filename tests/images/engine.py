"""The container engine that the tests of the images use, and a fleet that it runs.

Plain ``docker`` where an engine answers; else the program that CORTEX_IMAGE_LAB names, which brings an engine and a
base image along (``deps``, ``up``, ``base``, ``docker ARGUMENTS``, ``build CONTEXT TAG FILE OPTIONS``, ``down``).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[2]
TARGETS: Final = ("builder", "base", "nlp", "ml", "prod", "dev")
_BASE_IMAGE: Final = "python:3.11-slim"
#: Of a first build; seconds.
_BUILD_LIMIT_S: Final = 1_800


class NoEngine(Exception):
    """Why no engine can be had."""


@dataclass(frozen=True)
class Engine:
    """``docker`` as a prefix of commands."""

    prefix: tuple[str, ...]
    #: The program that brought it; None for an engine that was there.
    lab: Path | None = None
    #: Whether the lab's engine ran before.
    was_up: bool = True
    env: Mapping[str, str] = field(default_factory=dict)

    def docker(self, *arguments: str, check: bool = True, limit_s: float = 300) -> str:
        """What the command prints on stdout. Raises AssertionError with all of its output when it fails."""
        done = subprocess.run(
            [*self.prefix, *arguments],
            env={**os.environ, **self.env}, capture_output=True, text=True, timeout=limit_s, check=False,
        )  # fmt: skip
        assert done.returncode == 0 or not check, f"docker {arguments[0]}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout.strip()

    def inspect(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.docker("inspect", name))[0]
        return found

    def logs(self, name: str) -> str:
        """All that a container has written, to stdout and stderr."""
        done = subprocess.run([*self.prefix, "logs", name], env={**os.environ, **self.env},
                              capture_output=True, text=True, timeout=60, check=True)  # fmt: skip
        return done.stdout + done.stderr

    def build(self, context: Path, tag: str, file: Path, *options: str) -> str:
        """Build an image; returns the log."""
        options = (*options, "--progress", "plain")
        command = [*self.prefix, "build", "-t", tag, "-f", str(file), *options, str(context)]
        if self.lab is not None:
            command = [str(self.lab), "build", str(context), tag, str(file), *options]
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "DOCKER_BUILDKIT": "1"}, capture_output=True, text=True,
            timeout=_BUILD_LIMIT_S, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
        return done.stderr

    def close(self) -> None:
        if self.lab is not None and not self.was_up:
            subprocess.run([str(self.lab), "down"], check=False, capture_output=True)


def find_engine() -> Engine:
    """An engine that answers. Raises NoEngine with the reason."""
    if shutil.which("docker") and _works(["docker", "version"]):
        return Engine(("docker",))
    lab = Path(os.environ.get("CORTEX_IMAGE_LAB") or ROOT.parent / "shared" / "tools" / "image-lab")
    if not lab.is_file():
        raise NoEngine("no docker engine answers, and CORTEX_IMAGE_LAB names no program that brings one")
    was_up = _works([str(lab), "docker", "version"])
    if not was_up and not _works([str(lab), "up"]):
        for step in ("deps", "up"):
            _bring(lab, step)
    if not _works([str(lab), "docker", "image", "inspect", _BASE_IMAGE]):
        _bring(lab, "base")
    return Engine((str(lab), "docker"), lab, was_up)


def _works(command: list[str]) -> bool:
    return subprocess.run(command, capture_output=True, timeout=120, check=False).returncode == 0


def _bring(lab: Path, step: str) -> None:
    done = subprocess.run([str(lab), step], capture_output=True, text=True, timeout=1_200, check=False)
    if done.returncode != 0:
        raise NoEngine(f"{lab.name} {step} fails: {done.stderr.strip().splitlines()[-1:]}")


def wheel_options() -> list[str]:
    """Options of a build that take wheels from a folder: CORTEX_WHEELS, or the one that pip is told of."""
    named = [os.environ.get("CORTEX_WHEELS", ""), *os.environ.get("PIP_FIND_LINKS", "").split()]
    for folder in named:
        if folder and Path(folder).is_dir():
            return ["--build-context", f"wheels={folder}", "--build-arg", "TORCH_INDEX="]
    return []
