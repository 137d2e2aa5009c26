"""The README does what it says: its programs run, its tree is the repository's, its table is the catalogue."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from cortex_tasks.catalog import TASKS
from cortex_tasks.config import default_queues_file, load_fleet
from cortex_tasks.procfile import child_environment
from tests.support.markdown import ROOT, blocks, commands, tables
from tests.support.redis_server import RedisServer
from tests.support.worker_process import WorkerProcess

README = ROOT / "README.md"
#: The README itself; the measured table is not ours to count.
MAX_LINES = 200
#: At the top of a checkout, but made by tools.
PRODUCED = {"build", "dist", "__pycache__", "datapunk_cortex.egg-info"}


# ------------------------------------------------------------------------------------------------------ programs


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, str]]:
    """The environment of a client of a real nlp worker."""
    directory = tmp_path_factory.mktemp("readme")
    queues = ",".join(load_fleet(default_queues_file()).images["nlp"].queues)
    with (
        RedisServer(directory=directory) as server,
        WorkerProcess(
            server.url, directory / "worker.log", queues=queues, queues_file=default_queues_file(), wait=False
        ) as worker,
    ):
        worker.wait_ready(240)
        yield {**child_environment(os.environ), "CORTEX_BROKER_URL": server.url, "PYTHONPATH": str(ROOT)}


def run(command: list[str], env: Mapping[str, str], directory: Path) -> str:
    done = subprocess.run(command, env=env, cwd=directory, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.fleet
@pytest.mark.models
@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (0, ["The cheetah is the fastest runner on land.", "Marie Curie PERSON 0 11", "1891 DATE"]),
        (1, ["(384,)"]),
        (2, ["384 384"]),
    ],
)
def test_a_program_runs(fleet: Mapping[str, str], tmp_path: Path, number: int, expected: list[str]) -> None:
    program = tmp_path / "program.py"
    program.write_text(blocks(README, "python")[number].text, encoding="utf-8")
    shown = run([sys.executable, str(program)], fleet, tmp_path)
    for text in expected:
        assert text in shown


@pytest.mark.fleet
@pytest.mark.models
def test_the_commands_run(fleet: Mapping[str, str], tmp_path: Path) -> None:
    given = [line for line in commands(README) if line.startswith("cortex ") and "--help" not in line]
    assert len(given) >= 6
    for line in given:
        if line != "cortex run":
            assert run(shlex.split(line), fleet, tmp_path)


def test_every_program_is_run() -> None:
    assert len(blocks(README, "python")) == 3


def test_the_example_is_short() -> None:
    assert len(blocks(README, "python")[0].text.splitlines()) <= 10


# --------------------------------------------------------------------------------------------- the page itself


def tree() -> list[str]:
    """Every path that the annotated tree names. A line: names, two spaces, what they are."""
    text = next(block.text for block in blocks(README, "text") if block.text.startswith("cortex_tasks/"))
    found: list[str] = []
    folders: dict[int, str] = {-1: ""}
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        folder = folders[max(level for level in folders if level < indent)]
        names = re.split(r" {2,}", line.strip())[0].split()
        found += [folder + name for name in names]
        folders = {level: name for level, name in folders.items() if level < indent}
        if names[0].endswith("/"):
            folders[indent] = folder + names[0]
    return found


def test_every_path_of_the_tree_exists() -> None:
    for path in tree():
        assert (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file(), path


def test_the_tree_leaves_nothing_out() -> None:
    named = {path.rstrip("/") for path in tree()} | {"README.md"}
    top = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")} - PRODUCED
    modules = {
        module.relative_to(ROOT).as_posix()
        for package in ("cortex_tasks", "workers")
        for module in (ROOT / package).rglob("*.py")
        if module.name != "__init__.py"
    }
    assert top - named == set()
    assert modules - named == set()


def test_the_table_of_tasks_is_the_catalogue() -> None:
    fleet = load_fleet(default_queues_file())
    expected = [
        {
            "task": name,
            "input": str(spec.input),
            "result": spec.result.__name__,
            "default model": fleet.model(None, name)[0],
        }
        for name, spec in TASKS.items()
    ]
    assert tables(README, "task") == expected


def test_it_is_short_and_has_room_for_the_measurements() -> None:
    text = README.read_text(encoding="utf-8")
    before, rest = text.split("<!-- bench:start -->")
    measured, after = rest.split("<!-- bench:end -->")
    assert measured.strip()
    assert len((before + after).splitlines()) <= MAX_LINES
