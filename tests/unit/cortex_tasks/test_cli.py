"""The command as a whole, and what it says of queues.yaml: no Redis is needed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from cortex_tasks import errors as e
from cortex_tasks.cli import main
from cortex_tasks.cli.exits import EPILOG, exit_code


@pytest.fixture
def cortex(monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    for name in list(os.environ):
        if name.startswith("CORTEX_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("CORTEX_GPU", "0")
    return CliRunner()


# -------------------------------------------------------------------------------------------------- the command


def test_help_lists_the_commands_and_the_exit_codes(cortex: CliRunner) -> None:
    result = cortex.invoke(main, ["--help"])
    assert result.exit_code == 0
    for name in ("up", "demo", "run", "models", "status", "queues", "config", "redis"):
        assert re.search(rf"^  {name} ", result.output, re.M), name
    assert "3    Redis does not answer" in result.output


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (e.ConfigError(), 2),
        (e.UnknownTask(), 2),
        (e.InvalidParameter(), 2),
        (e.BrokerUnavailable(), 3),
        (e.ResultTimeout(), 4),
        (e.NoConsumer(), 4),
        (e.DeadlineExceeded(), 4),
        (e.QueueFull(), 5),
        (e.ModelUnavailable(), 1),
        (e.CortexError(), 1),
    ],
)
def test_exit_codes(error: e.CortexError, code: int) -> None:
    assert exit_code(error) == code
    assert re.search(rf"^  {code} ", EPILOG, re.M)


def test_an_unknown_command_is_answered_with_the_nearest(cortex: CliRunner) -> None:
    result = cortex.invoke(main, ["statsu"])
    assert result.exit_code == 2
    assert "did you mean 'status'" in result.stderr


def test_the_quick_command_loads_nothing_heavy() -> None:
    code = "import sys; from cortex_tasks.cli.declared import queues; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "click" in loaded
    assert not {"numpy", "celery", "kombu", "redis", "torch"} & set(loaded)


# --------------------------------------------------------------------------------------------------------- queues


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [
        (["nlp"], "minilm,spacy,distilbert"),
        (["ml"], "prophet"),
        (["ml", "--gpu"], "prophet,minilm,distilbert"),
        (["ml", "--no-gpu"], "prophet"),
    ],
)
def test_queues_of_an_image(cortex: CliRunner, arguments: list[str], printed: str) -> None:
    result = cortex.invoke(main, ["queues", *arguments])
    assert (result.exit_code, result.output) == (0, printed + "\n")


def test_a_gpu_is_taken_from_the_environment(cortex: CliRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORTEX_GPU", "1")
    assert cortex.invoke(main, ["queues", "ml"]).output == "prophet,minilm,distilbert\n"
    monkeypatch.setenv("CORTEX_GPU", "perhaps")
    result = cortex.invoke(main, ["queues", "ml"])
    assert (result.exit_code, result.output.startswith("cortex: CORTEX_GPU: expected one of")) == (2, True)


def test_queues_as_json(cortex: CliRunner) -> None:
    assert json.loads(cortex.invoke(main, ["queues", "ml", "--json", "--gpu"]).output) == {
        "image": "ml", "gpu": True, "queues": ["prophet", "minilm", "distilbert"],
    }  # fmt: skip
    images = json.loads(cortex.invoke(main, ["queues", "--json"]).output)["images"]
    assert images["base"] == []
    assert images["dev"] == ["minilm", "spacy", "distilbert", "prophet"]


def test_all_images_in_a_table(cortex: CliRunner) -> None:
    lines = cortex.invoke(main, ["queues"]).output.splitlines()
    assert lines[0].split()[:2] == ["image", "queues"]
    assert [line.split()[0] for line in lines[1:]] == ["base", "nlp", "ml", "prod", "dev"]


@pytest.mark.parametrize(("image", "said"), [("nlpp", "did you mean 'nlp'"), ("base", "consumes no queues")])
def test_an_image_without_queues(cortex: CliRunner, image: str, said: str) -> None:
    result = cortex.invoke(main, ["queues", image])
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr


# --------------------------------------------------------------------------------------------------------- config


def test_config_check(cortex: CliRunner, tmp_path: Path) -> None:
    result = cortex.invoke(main, ["config", "check"])
    assert result.exit_code == 0
    assert result.output.endswith("6 models, 4 queues, 5 images: ok\n")
    wrong = tmp_path / "queues.yaml"
    wrong.write_text("version: 1\nmodles: {}\n")
    result = cortex.invoke(main, ["config", "check", str(wrong)])
    assert result.exit_code == 2
    assert f"{wrong}:2: modles: unknown key; did you mean 'models'?" in result.stderr
    answer = json.loads(cortex.invoke(main, ["config", "check", "--json", str(wrong)]).stdout)
    assert answer["ok"] is False
    assert len(answer["problems"]) == 3


def test_config_check_looks_at_the_settings_too(cortex: CliRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORTEX_POOL", "hunter2")
    result = cortex.invoke(main, ["config", "check"])
    assert (result.exit_code, result.stderr) == (2, "CORTEX_POOL: expected 'cortex' or 'stock'\n")


def test_config_show_masks_passwords(cortex: CliRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORTEX_BROKER_URL", "redis://:hunter2@h:6379/0")
    for arguments in (["config", "show"], ["config", "show", "--json"]):
        result = cortex.invoke(main, arguments)
        assert result.exit_code == 0
        assert "hunter2" not in result.output
        assert "redis://:***@h:6379/0" in result.output
    shown = json.loads(cortex.invoke(main, ["config", "show", "--json"]).output)
    assert shown["fleet"]["models"]["spacy"]["limits"]["text_chars"] == 10_000


# ------------------------------------------------------------------------------------------------------------- up


def test_up_gives_its_place_to_honcho(cortex: CliRunner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    called: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr("os.execve", lambda _path, argv, env: called.append((argv, env)))
    procfile = tmp_path / "Procfile"
    procfile.write_text("a: b\n")
    assert cortex.invoke(main, ["up", "-f", str(procfile), "a"]).exit_code == 0
    ((argv, env),) = called
    assert argv[1:] == ["-m", "honcho", "-f", str(procfile), "start", "a"]
    assert env["PATH"].startswith(str(Path(sys.executable).parent))


def test_up_without_honcho_names_the_extra(cortex: CliRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    result = cortex.invoke(main, ["up"])
    assert result.exit_code == 2
    assert "pip install 'datapunk-cortex[fleet]'" in result.stderr


# ---------------------------------------------------------------------------------------------------- the wheel


def test_a_wheel_holds_the_fleets_files(tmp_path: Path) -> None:
    """``cortex queues`` and ``cortex up`` work from an installed wheel: the files are in it."""
    import zipfile

    repository = Path(__file__).parents[3]
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    try:
        import hatchling  # noqa: F401
    except ImportError:
        command.remove("--no-build-isolation")
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(repository)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"cortex_tasks/queues.yaml", "cortex_tasks/Procfile", "cortex_tasks/demo_data/sentences.txt"} <= names
    assert {"cortex_tasks/py.typed", "workers/app.py"} <= names
    assert not any(name.startswith(("tests/", "benchmarks/")) for name in names)
    unpacked = tmp_path / "unpacked"
    zipfile.ZipFile(wheel).extractall(unpacked)
    code = "from cortex_tasks.config import *; from cortex_tasks.procfile import *; print(default_queues_file());" \
           "print(len(load_fleet().models), list(read_procfile(default_procfile())))"  # fmt: skip
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=unpacked, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert shown == [str(unpacked / "cortex_tasks" / "queues.yaml"), "6 ['redis', 'nlp', 'ml', 'flower']"]
