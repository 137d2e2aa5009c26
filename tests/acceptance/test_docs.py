"""The pages say what is true: links lead somewhere, programs and commands are real, tables are those of the code."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import click
import pydantic
import pytest
import redis
import yaml
from pydantic_core import PydanticUndefined

from cortex_tasks import errors
from cortex_tasks.catalog import TASKS
from cortex_tasks.cli import main
from cortex_tasks.cli.exits import EPILOG
from cortex_tasks.config import FleetConfig, default_queues_file
from cortex_tasks.dead_letters import attempts_key, dead_letter_key
from cortex_tasks.procfile import child_environment
from cortex_tasks.settings import Settings
from tests.support.markdown import PAGES, ROOT, anchors, blocks, commands, links, prose, tables
from tests.support.redis_server import RedisServer
from tests.support.worker_process import WorkerProcess
from workers.health import HUNG_EXIT_CODE

DOCS = ROOT / "docs"
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
#: Who wrote a page, and where, is not the reader's concern.
FORBIDDEN = re.compile(r"\b(AI[- ](written|generated)|language model)\b", re.I)
#: Directories of the machine at hand (the root directory is everybody's).
HERE = [f"{path}/" for path in (ROOT, Path.home()) if path != Path("/")]

each_page = pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])


# ------------------------------------------------------------------------------------------------- every page


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        if link.startswith(("http://", "https://")):
            continue
        path, _, fragment = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not fragment or fragment in anchors(target), link


@each_page
def test_programs_and_data_parse(page: Path) -> None:
    for block in blocks(page, "python"):
        compile(block.text, f"{page.name}: {block.file}", "exec")
    for block in blocks(page, "json"):
        json.loads(block.text)
    for block in blocks(page, "yaml"):
        yaml.safe_load(block.text)


@each_page
def test_cortex_commands_exist(page: Path) -> None:
    for line in commands(page):
        for part in re.split(r"\$\(|\||&&", line):
            words = shlex.split(part.strip(") "), posix=True) if part.startswith("cortex ") else []
            if len(words) > 1:
                check_command(words[1:])


def check_command(words: list[str]) -> None:
    """That a command, its subcommand and its options are there."""
    command: click.Command = main
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        name, words = words[0], words[1:]
        found = command.get_command(click.Context(command), name)
        assert found is not None, name
        command = found
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    for word in words:
        if word.startswith("-"):
            assert word.partition("=")[0] in known | {"--help", "-h"}, word


@each_page
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for line in commands(page):
        if line.startswith("make "):
            assert line.split()[1] in targets, line


@each_page
def test_no_forbidden_words(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert FORBIDDEN.search(text) is None
    assert not any(path in text for path in HERE)


@each_page
def test_lines_fit_a_screen(page: Path) -> None:
    for line in prose(page).splitlines():
        assert len(line) <= 120 or line.startswith(("|", "[", '  "body"')), line


# ----------------------------------------------------------------------------------------------------- tables


def test_every_error_is_described() -> None:
    rows = {row["class"]: row for row in tables(DOCS / "errors.md", "class")}
    classes = [getattr(errors, name) for name in errors.__all__ if name != "error_from_wire"]
    assert set(rows) == {cls.__name__ for cls in classes}
    for cls in classes:
        assert rows[cls.__name__]["code"] == cls.code
        assert rows[cls.__name__]["retryable"] == ("yes" if cls.retryable else "no")


def test_the_tree_of_errors_is_the_codes() -> None:
    text = next(block.text for block in blocks(DOCS / "errors.md", "text"))
    path: list[str] = []
    for line in text.splitlines():
        depth, name = len(re.match(r"[│ ├└─]*", line)[0]) // 4, line.lstrip("│ ├└─")  # type: ignore[index]
        path = [*path[:depth], name]
        if depth:
            assert path[depth - 1] in {base.__name__ for base in getattr(errors, name).__bases__}, name
    assert len(text.splitlines()) == len(errors.__all__) - 1


def test_every_setting_is_described() -> None:
    rows = [row for row in tables(DOCS / "configuration.md", "variable") if "worker: the device" not in row["meaning"]]
    described = {row["variable"]: row["default"] for row in rows}
    for name, field in Settings.model_fields.items():
        default = described.pop(f"CORTEX_{name.upper()}")
        if isinstance(field.default, pydantic.SecretStr):
            assert default == field.default.get_secret_value()
        elif field.default is not None:
            assert default == str(field.default)
    assert set(described) == {"CORTEX_GPU", "CORTEX_FLOWER_PORT"}


def keys_of(model: type[pydantic.BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a section with its default, as dotted paths; a mapping's names are written <alias> or <name>."""
    for name, field in model.model_fields.items():
        kind, path = field.annotation, f"{prefix}{name}"
        inner = get_args(kind)[1] if get_origin(kind) is dict else kind
        if get_origin(kind) is UnionType:  # a section that may be absent
            inner = get_args(kind)[0]
        if isinstance(inner, type) and issubclass(inner, pydantic.BaseModel):
            step = {"models": ".<alias>", "images": ".<name>"}.get(name, "")
            yield from keys_of(inner, f"{path}{step}.")
        elif path != "version":
            yield path, PydanticUndefined if field.default_factory else field.default


def shown(key: str, default: Any) -> str:
    """A default as the page writes it."""
    sizes = ("size", "max_size", "memory", "storage")
    if default in (None, ()) or (default is PydanticUndefined and key.endswith("options")):
        return "none"
    if default is PydanticUndefined:
        return "required"
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, int) and (key.endswith(sizes) or key.startswith("memory_config")):
        return f"{default // 10**9}GB" if default % 10**9 == 0 else f"{default // 10**6}MB"
    return str(default)


def test_every_key_of_queues_yaml_is_described() -> None:
    rows = {row["key"]: row for row in tables(DOCS / "configuration.md", "key")}
    expected = dict(keys_of(FleetConfig))
    # The tiers' defaults are those of the section, not of the class they share.
    storage = FleetConfig.model_fields["model_storage"].default
    expected |= {
        f"model_storage.{tier}.{name}": value
        for tier in ("l1_memory", "l2_redis", "disk")
        for name, value in getattr(storage, tier)
    }
    assert set(rows) == set(expected)
    assert {key: row["default"] for key, row in rows.items()} == {key: shown(key, d) for key, d in expected.items()}
    assert all(row["enforced by"] for row in rows.values())


def test_every_task_and_parameter_is_described() -> None:
    rows = {row["task"]: row["parameters (default)"] for row in tables(DOCS / "client.md", "task")}
    assert list(rows) == list(TASKS)
    own = prose(DOCS / "client.md").partition("Prophet's own:")[2]
    for name, spec in TASKS.items():
        for parameter in spec.params.model_fields:
            assert parameter in rows[name] or parameter in own, f"{name}: {parameter}"


def test_every_exit_code_is_described() -> None:
    described = {int(row["code"]): row["meaning"] for row in tables(DOCS / "operations.md", "code")}
    assert described == {int(code): text for code, text in re.findall(r"^ +(\d+) +(.+)$", EPILOG, re.MULTILINE)}
    assert f"code {HUNG_EXIT_CODE}" in prose(DOCS / "operations.md")


def test_the_changelog_knows_this_version() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    version = re.search(r'^version = "(.+)"$', project, re.MULTILINE)
    assert version is not None
    assert f"## [{version[1]}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


# --------------------------------------------------------------------------------------------------- programs


def echo_models(directory: Path) -> Path:
    """The default fleet with an echo model behind every alias."""
    raw = yaml.safe_load(default_queues_file().read_text(encoding="utf-8"))
    for model in raw["models"].values():
        model.update(source="builtin:echo", adapter="echo", backend="native", load="pinned", children=0)
    file = directory / "queues.yaml"
    file.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, str]]:
    """The environment of a client of one worker that serves every alias."""
    directory = tmp_path_factory.mktemp("docs")
    file = echo_models(directory)
    queues = ",".join(yaml.safe_load(file.read_text(encoding="utf-8"))["images"]["prod"]["queues"])
    with (
        RedisServer(directory=directory) as server,
        WorkerProcess(server.url, directory / "worker.log", queues=queues, queues_file=file),
    ):
        yield {
            **child_environment(os.environ),
            "CORTEX_BROKER_URL": server.url,
            "CORTEX_QUEUES_FILE": str(file),
            "PYTHONPATH": str(ROOT),
        }


def run(program: Path, *arguments: str, env: Mapping[str, str], given: str = "") -> str:
    return succeed([sys.executable, str(program), *arguments], env, given)


def cortex(*arguments: str, env: Mapping[str, str]) -> str:
    return succeed([sys.executable, "-c", "from cortex_tasks.cli import main; main()", *arguments], env)


def succeed(command: list[str], env: Mapping[str, str], given: str = "") -> str:
    done = subprocess.run(
        command,
        env=env, input=given, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.fleet
def test_the_clients_page_runs(fleet: Mapping[str, str], tmp_path: Path) -> None:
    program = tmp_path / "page.py"
    program.write_text("\n".join(block.text for block in blocks(DOCS / "client.md", "python")), encoding="utf-8")
    shown_lines = run(program, env=fleet).splitlines()
    assert shown_lines[0].startswith("(8,) minilm ")
    assert shown_lines[1].startswith("3 False {1: InvalidInput(")
    assert "50 True SUCCESS" in shown_lines
    assert shown_lines[-1].startswith("no answer to cortex.classify")


@pytest.mark.fleet
def test_examples_search_enrich_and_forecast(fleet: Mapping[str, str], tmp_path: Path) -> None:
    examples = ROOT / "examples"
    texts, table = tmp_path / "texts.txt", tmp_path / "series.csv"
    texts.write_text("One text.\nAnother text.\nA third.\nA fourth.\n", encoding="utf-8")
    table.write_text("ds,y\n" + "".join(f"2024-01-{day:02},{day}\n" for day in range(1, 11)), encoding="utf-8")
    found = run(examples / "semantic_search.py", str(texts), "A third.", env=fleet).splitlines()
    assert len(found) == 3
    assert found[0].endswith("A third.")
    events = run(examples / "event_stream.py", env=fleet, given="In Berlin.\n\nnothing\n").splitlines()
    assert json.loads(events[0]) == {"text": "In Berlin.", "entities": [["In", "ECHO"], ["Berlin.", "ECHO"]]}
    assert json.loads(events[1]) == {"text": "nothing", "entities": []}
    forecast = run(examples / "forecast_csv.py", str(table), "3", env=fleet).splitlines()
    assert [line.partition(",")[0] for line in forecast[1:]] == [f"2024-01-{day}T00:00:00" for day in (11, 12, 13)]


@pytest.mark.fleet
def test_a_parked_job_is_put_back_and_answered(fleet: Mapping[str, str]) -> None:
    key, job_id = dead_letter_key("minilm"), "11111111-2222-4333-a444-555555555555"
    with redis.Redis.from_url(fleet["CORTEX_BROKER_URL"]) as client:
        client.hset(attempts_key(job_id), "0", 3)
        client.lpush(key, json.dumps({"id": job_id, "reason": "it died", "at": 0, "message": parked_message(job_id)}))
        assert job_id in cortex("dead", "list", "minilm", env=fleet)
        assert job_id in cortex("dead", "requeue", job_id, env=fleet)
        assert client.llen(key) == 0
        told = subprocess.run(
            [sys.executable, "-c", WAIT, job_id], env=fleet, capture_output=True, text=True, timeout=60, check=False
        )
        assert told.stdout.strip() == "SUCCESS", told.stderr


WAIT = """
import sys
from celery.result import AsyncResult
from cortex_tasks.app import app
result = AsyncResult(sys.argv[1], app=app)
result.get(timeout=30)
print(result.state)
"""


def parked_message(job_id: str) -> dict[str, Any]:
    """A job as a worker parks it: its message, marked as delivered before."""
    from cortex_tasks.client.core import Core
    from cortex_tasks.config import load_fleet

    plan = Core(load_fleet(default_queues_file()), 10).plan("embed", model="minilm")
    message: dict[str, Any] = json.loads(plan.envelope.seal(job_id, ["parked"], sent_at=0.0))
    message["properties"]["delivery_info"]["redelivered"] = True
    return message


def test_every_example_is_tried() -> None:
    assert {example.name for example in EXAMPLES} == {
        "event_stream.py", "forecast_csv.py", "semantic_search.py",
    }  # fmt: skip
