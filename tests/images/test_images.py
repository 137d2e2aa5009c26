"""What the images are made of, and that a change of the code costs seconds."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path
from typing import Final

import pytest

from tests.images.engine import ROOT, Engine, wheel_options

pytestmark = [pytest.mark.images, pytest.mark.timeout(3_600)]

RUNTIME: Final = ("base", "nlp", "ml", "prod")
#: Bytes. What the official python:3.11-slim takes is part of it.
MOST: Final = {"base": 1.7e9, "nlp": 1.9e9, "ml": 1.9e9, "prod": 2.1e9, "dev": 3.1e9}
SEARCH: Final = """
for tool in gcc cc g++ c++ clang make ld as git; do command -v $tool && echo "a tool: $tool"; done
cd /opt/cortex/lib/python3*/site-packages || echo "no packages"
find . -name '*.dist-info' -prune -o -type d \\( -name tests -o -name test \\) -print
find / -xdev \\( -path '*/.cache/pip' -o -path '/var/lib/apt/lists/*' -o -path '/var/cache/apt/*.bin' \\
    -o -path '/wheels/*' -o -path '/locks/*' \\) 2>/dev/null | grep -v '/lists/partial$'
test -d pip && echo pip
true
"""


def run(engine: Engine, image: str, script: str) -> str:
    return engine.docker("run", "--rm", "--network", "none", image, "sh", "-c", script)


@pytest.mark.parametrize("target", [*RUNTIME, "dev"])
def test_an_image_says_how_it_is_run(engine: Engine, images: dict[str, str], target: str) -> None:
    config = engine.inspect(images[target])["Config"]
    assert config["User"] == "10001:10001"
    assert config["StopSignal"] == "SIGTERM"
    assert config["Entrypoint"][0].endswith("tini")
    assert config["Healthcheck"]["Test"] == ["CMD", "python", "-m", "workers.probe", "ready"]
    labels = {name.rpartition(".")[2]: text for name, text in config["Labels"].items()}
    assert (labels["version"], labels["revision"]) == ("9.9.9", "abc123")
    assert labels["created"].endswith("Z")
    assert ("CORTEX_IMAGE=" + target in config["Env"]) == (target != "base")


@pytest.mark.parametrize("target", RUNTIME)
def test_nothing_of_the_build_is_left(engine: Engine, images: dict[str, str], target: str) -> None:
    assert run(engine, images[target], SEARCH) == ""


@pytest.mark.parametrize("target", [*RUNTIME, "dev"])
def test_an_image_is_small(engine: Engine, images: dict[str, str], target: str) -> None:
    size = int(engine.inspect(images[target])["Size"])
    print(f"{target}: {size / 1e6:,.0f} MB")
    assert size < MOST[target]


def test_the_tools_of_development_are_in_one_image(engine: Engine, images: dict[str, str]) -> None:
    shown = run(engine, images["dev"], "gcc --version && git --version && pytest --version && watchfiles --version")
    assert "pytest" in shown


def ran_anew(log: str) -> list[str]:
    """The stages whose commands were run, not taken from an earlier build; each once. ``log``: plain progress."""
    steps = dict(re.findall(r"^#(\d+) \[(\S+) +\d+/\d+\] RUN ", log, re.MULTILINE))
    kept = set(re.findall(r"^#(\d+) CACHED$", log, re.MULTILINE))
    return list(dict.fromkeys(stage for number, stage in steps.items() if number not in kept))


def test_a_change_of_the_code_builds_nothing_else(engine: Engine, images: dict[str, str], tmp_path: Path) -> None:
    context = tmp_path / "checkout"
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("cortex_tasks", "workers", "docker"):
        shutil.copytree(ROOT / name, context / name, ignore=ignored)
    for name in (
        "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "Procfile", "queues.yaml", ".dockerignore",
    ):  # fmt: skip
        shutil.copy2(ROOT / name, context / name)
    marked = f"# {time.time()}\n"
    with (context / "workers" / "tasks.py").open("a", encoding="utf-8") as file:
        file.write(marked)
    file, options = context / "docker" / "Dockerfile", ("--target", "nlp", *wheel_options())
    began_s = time.monotonic()
    log = engine.build(context, "cortex-test/rebuilt", file, *options)
    print(f"rebuilt in {time.monotonic() - began_s:.1f} s")
    assert ran_anew(log) == ["code"]
    where = "tail -1 /opt/cortex/lib/python3*/site-packages/workers/tasks.py"
    assert run(engine, "cortex-test/rebuilt", where) == marked.strip()
    engine.docker("image", "rm", "cortex-test/rebuilt")
