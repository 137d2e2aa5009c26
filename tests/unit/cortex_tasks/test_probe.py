"""What a health check makes of the few words that a worker writes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cortex_tasks.probe import SILENT_AFTER_S, STALLED_AFTER_S, Report, main, problem, write_report

NOW_S = 1_000.0


def report(**changed: object) -> Report:
    return Report("nlp.1@h", "ready", 3, 0.0, NOW_S - 1)._replace(**changed)


def say(wanted: str, **changed: object) -> str:
    return problem(json.dumps(report(**changed)._asdict()), wanted, NOW_S)


@pytest.mark.parametrize(
    ("changed", "live", "ready"),
    [
        ({}, "", ""),
        ({"stalled_s": STALLED_AFTER_S}, "", ""),
        ({"stalled_s": STALLED_AFTER_S + 1}, "holds 3 jobs and has finished none for 61 s", "holds 3 jobs"),
        ({"at_s": NOW_S - SILENT_AFTER_S - 1}, "has said nothing for 61 s", "has said nothing"),
        ({"state": "starting"}, "", "is starting"),
        ({"state": "stopping"}, "", "is stopping"),
        ({"missing": ("spacy", "minilm")}, "", "could not load spacy, minilm"),
    ],
)
def test_who_is_live_and_who_is_ready(changed: dict[str, object], live: str, ready: str) -> None:
    for wanted, expected in (("live", live), ("ready", ready)):
        said = say(wanted, **changed)
        assert expected in said
        assert bool(said) == bool(expected)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '"x"', '{"node": "n", "state": "ready"}', "null", '{"missing": 1}'])
def test_a_damaged_file_is_no_sign_of_life(text: str) -> None:
    assert problem(text, "live", NOW_S) == "the health file is damaged"


def test_a_file_is_replaced_as_a_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "health.json"
    environ = {"CORTEX_HEALTH_FILE": str(file)}
    assert main(["live"], environ, NOW_S) == 1
    assert "no worker has written" in capsys.readouterr().err
    write_report(file, report(state="starting"))
    write_report(file, report())
    assert [path.name for path in tmp_path.iterdir()] == ["health.json"]
    assert main(["ready"], environ, NOW_S) == 0
    assert main(["ready"], environ, NOW_S + SILENT_AFTER_S) == 1


@pytest.mark.parametrize("arguments", [[], ["alive"], ["live", "ready"]])
def test_wrong_usage_is_neither_health_nor_illness(arguments: list[str]) -> None:
    assert main(arguments, {"CORTEX_HEALTH_FILE": "/nowhere"}, NOW_S) == 2
    assert main(["live"], {}, NOW_S) == 2


def test_the_command_loads_next_to_nothing(tmp_path: Path) -> None:
    file = tmp_path / "health.json"
    write_report(file, report(at_s=time.monotonic()))
    code = (
        "import sys, time; from cortex_tasks import probe\n"
        "code = probe.main(['ready'], {'CORTEX_HEALTH_FILE': sys.argv[1]}, time.monotonic())\n"
        "print(code, [m for m in ('celery', 'kombu', 'redis', 'pydantic', 'click', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0 []"
    asked = [sys.executable, "-m", "cortex_tasks.probe", "live"]
    assert subprocess.run(asked, env={"CORTEX_HEALTH_FILE": str(file)}, check=False).returncode == 0
