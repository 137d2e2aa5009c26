"""``cortex run``: inputs in their three forms, answers in order, errors in their place, exit codes for scripts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from cortex_tasks import testing
from cortex_tasks.cli import main
from cortex_tasks.cli.run import parse_line
from cortex_tasks.echo import DIMENSIONS, FAIL, REVISION, echo_vector
from cortex_tasks.errors import InvalidInput
from cortex_tasks.show import floats
from cortex_tasks.testing import LocalFleet

SERIES = {"ds": ["2024-01-01", "2024-01-02", "2024-01-03"], "y": [1.0, 2.0, 3.0]}
Cortex = Callable[..., Result]


@pytest.fixture
def fleet(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalFleet]:
    with testing.fleet() as local:
        monkeypatch.setattr("cortex_tasks.cli.run.open_client", lambda: local.client(timeout_s=5.0))
        yield local


@pytest.fixture
def cortex(fleet: LocalFleet) -> Cortex:
    def run(*arguments: str, stdin: str | bytes = "") -> Result:
        return CliRunner().invoke(main, ["run", *arguments], input=stdin)

    return run


def records(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


# ----------------------------------------------------------------------------------------------- inputs, answers


def test_texts_as_arguments(cortex: Cortex, fleet: LocalFleet) -> None:
    result = cortex("embed", "one", "two", "--json")
    assert result.exit_code == 0
    first, second = records(result)
    assert (first["id"], second["id"]) == (0, 1)
    assert first["value"]["vector"] == pytest.approx(echo_vector("one"), abs=1e-6)
    assert first["value"]["truncated"] is False
    assert (first["model"], first["revision"]) == ("minilm", REVISION)
    assert set(first["timings"]) >= {"queue_ms", "prepare_ms", "forward_ms", "finish_ms", "batch_items"}
    assert [job.lane for job in fleet.jobs] == ["interactive"]


def test_lines_of_stdin(cortex: Cortex, fleet: LocalFleet) -> None:
    result = cortex("embed", "--json", stdin="one\n\n  \ntwo\r\nthree")
    assert [record["id"] for record in records(result)] == [0, 1, 2]
    assert fleet.jobs[0].inputs == ["one", "two", "three"]
    assert fleet.jobs[0].lane == "bulk"


def test_json_lines_in_and_out(cortex: Cortex, fleet: LocalFleet) -> None:
    lines = ['{"id": "a", "text": "one"}', '"two"', '{"text": "three"}']
    result = cortex("embed", "--jsonl", stdin="\n".join(lines))
    assert [record["id"] for record in records(result)] == ["a", 1, 2]
    assert fleet.jobs[0].inputs == ["one", "two", "three"]


@pytest.mark.parametrize(
    "line", [SERIES, {"id": 7, **SERIES}, {"id": 7, "series": SERIES}, [["2024-01-01", 1], ["2024-01-02", 2]]]
)
def test_series_as_json_lines(cortex: Cortex, line: Any) -> None:
    (record,) = records(cortex("forecast", "--jsonl", "-p", "horizon=4", stdin=json.dumps(line)))
    assert len(record["value"]["yhat"]) == 4
    assert record["id"] == (7 if isinstance(line, dict) and "id" in line else 0)


def test_a_series_as_an_argument(cortex: Cortex) -> None:
    (record,) = records(cortex("decompose", json.dumps(SERIES), "--json"))
    assert record["value"]["y"] == SERIES["y"]


def test_more_inputs_than_a_job_holds_stay_in_order(cortex: Cortex, fleet: LocalFleet) -> None:
    result = cortex("embed", "--jsonl", stdin="\n".join(json.dumps({"id": n, "text": f"t{n}"}) for n in range(500)))
    found = records(result)
    assert [record["id"] for record in found] == list(range(500))
    assert all(record["value"]["vector"] == pytest.approx(echo_vector(f"t{n}"), abs=1e-6)
               for n, record in enumerate(found))  # fmt: skip
    assert len(fleet.jobs) > 1


def test_parameters_and_delivery_options(cortex: Cortex, fleet: LocalFleet) -> None:
    result = cortex(
        "zero_shot", "x", "-p", 'labels=["a", "b"]', "-p", "multi_label=true", "-p", "hypothesis_template=Is it {}?",
        "--model", "echo", "--lane", "bulk", "--deadline-s", "60", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    (job,) = fleet.jobs
    assert (job.model, job.lane, job.params["multi_label"]) == ("echo", "bulk", True)
    assert job.params["hypothesis_template"] == "Is it {}?"
    assert job.expires_at == pytest.approx(job.sent_at + 60, abs=2)


def test_parse_line_numbers_and_names() -> None:
    assert parse_line("plain {", 3, jsonl=False).value == "plain {"
    assert isinstance(parse_line("{", 3, jsonl=True).value, InvalidInput)
    assert isinstance(parse_line("[" * 100_000, 3, jsonl=True).value, InvalidInput)
    assert parse_line('{"id": null, "text": 5}', 3, jsonl=True).id is None


# --------------------------------------------------------------------------------------------- errors, exit codes


def test_bad_inputs_keep_their_place_and_fail_the_command(cortex: Cortex) -> None:
    lines = ['"one"', "not json", '{"id": "x"}', '""', json.dumps(f"{FAIL} me"), '"six"', "{"]
    result = cortex("embed", "--jsonl", stdin="\n".join(lines))
    assert result.exit_code == 1
    found = records(result)
    assert [record["id"] for record in found] == [0, 1, "x", 3, 4, 5, 6]
    assert ["error" in record for record in found] == [False, True, True, True, True, False, True]
    assert [record.get("error", {}).get("code") for record in found][1:5] == [
        "invalid_input", "invalid_input", "invalid_input", "inference_failed",
    ]  # fmt: skip


def test_for_people_errors_go_to_stderr(cortex: Cortex) -> None:
    result = cortex("embed", "one", " ", "three")
    assert result.exit_code == 1
    assert "cortex: input 1: a text is empty" in result.stderr
    assert result.stdout.count(f"{DIMENSIONS} dimensions") == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("embbed", "x"), "did you mean 'embed'"),
        (("embed", "x", "-m", "minilmm"), "did you mean 'minilm'"),
        (("embed", "x", "-p", "normalise=true"), "did you mean 'normalize'"),
        (("embed", "x", "-p", "normalize"), "KEY=VALUE"),
        (("embed", "x", "-p", "lane=bulk"), "option of its own"),
        (("zero_shot", "x"), "labels"),
        (("forecast", "--jsonl", "-p", "horizon=0"), "horizon"),
        (("embed", "x", "--lane", "fast"), "interactive"),
    ],
)
def test_wrong_usage(cortex: Cortex, arguments: tuple[str, ...], said: str) -> None:
    result = cortex(*arguments, stdin=json.dumps(SERIES))
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr


def test_no_redis(cortex: Cortex, fleet: LocalFleet) -> None:
    with fleet.broker_down():
        assert cortex("embed", "one").exit_code == 3


def test_no_worker(cortex: Cortex, fleet: LocalFleet) -> None:
    with fleet.without_workers():
        result = cortex("embed", "one", "--timeout-s", "0.05")
    assert result.exit_code == 4
    assert "no worker consumes queue 'minilm'" in result.stderr


def test_bytes_that_are_no_text_fail_their_line_alone(cortex: Cortex) -> None:
    result = cortex("embed", "--json", stdin=b"one\n\xff\xfe\nthree\n")
    assert result.exit_code == 1
    assert ["error" in record for record in records(result)] == [False, True, False]


def test_an_id_that_is_no_text_does_not_break_the_output(cortex: Cortex) -> None:
    result = cortex("embed", "--jsonl", stdin='{"id": "\\ud800", "text": "one"}')
    assert result.exit_code == 0
    assert json.loads(result.stdout)["id"] == "\ud800"


def test_nothing_to_do_is_not_an_error(cortex: Cortex) -> None:
    result = cortex("embed", stdin="")
    assert (result.exit_code, result.stdout) == (0, "")


def test_a_reader_that_goes_away_ends_it_quietly(tmp_path: Path) -> None:
    """``cortex run ... | head -1``: a real pipe, a real process, the in-process fleet."""
    script = tmp_path / "piped.py"
    script.write_text(
        "from cortex_tasks import testing\n"
        "from cortex_tasks.cli import main\n"
        "import cortex_tasks.cli.run as module\n"
        "with testing.fleet() as fleet:\n"
        "    module.open_client = fleet.client\n"
        "    main(['run', 'embed', '--json'])\n"
    )
    command = f"yes word | {sys.executable} {script} | head -n 1; exit ${{PIPESTATUS[1]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, env={**os.environ})
    assert done.returncode == 141, done.stderr
    assert json.loads(done.stdout)["id"] == 0
    assert done.stderr == ""


def test_ctrl_c_ends_it_and_cancels_what_has_not_started(tmp_path: Path) -> None:
    script = tmp_path / "held.py"
    script.write_text(
        "import threading, time, os, signal\n"
        "from cortex_tasks import testing\n"
        "from cortex_tasks.cli import main\n"
        "import cortex_tasks.cli.run as module\n"
        # A shell that starts the tests in the background has it ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "with testing.fleet() as fleet:\n"
        "    fleet.hold()\n"
        "    module.open_client = fleet.client\n"
        "    def press():\n"
        "        while len(fleet.jobs) < 2: time.sleep(0.01)\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    threading.Thread(target=press).start()\n"
        "    try:\n"
        "        main(['run', 'embed', '--json'])\n"
        "    finally:\n"
        "        print(len(fleet.revoked) == len(fleet.jobs))\n"
    )
    lines = "".join(f"text {n}\n" for n in range(200))
    done = subprocess.run([sys.executable, str(script)], input=lines, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "True\n", "cortex: interrupted\n")


# ------------------------------------------------------------------------------------------------------ for people


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (("embed", "one"), [f"{DIMENSIONS} dimensions, length"]),
        (("features", "one"), [f"shape 1 x {DIMENSIONS}"]),
        (("annotate", "Ada met Bob."), ["[Ada ECHO] met [Bob. ECHO]", "entity", "3 tokens, 1 sentences, 2 entities"]),
        (("classify", "fine"), ["POSITIVE", "NEGATIVE", "█"]),
        (("zero_shot", "fine", "-p", 'labels=["up", "down"]'), ["up", "down"]),
        (("fill_mask", "a [MASK] b", "-p", "top_k=2"), ["0.500  a echo0 b", "0.250  a echo1 b"]),
        (("forecast", json.dumps(SERIES), "-p", "horizon=3"), ["┤", "2024-01-03", "2024-01-06"]),
        (("forecast", json.dumps(SERIES), "-p", "include_history=true"), ["┤"]),
        (("decompose", json.dumps(SERIES)), ["trend", "residual", "▁"]),
        (("detect_anomalies", json.dumps(SERIES)), ["0 anomalies in 3 points"]),
    ],
)
def test_answers_for_people(cortex: Cortex, arguments: tuple[str, ...], shown: list[str]) -> None:
    result = cortex(*arguments)
    assert result.exit_code == 0, result.output
    for text in shown:
        assert text in result.stdout
    assert "forward" in result.stdout
    assert "\033" not in result.stdout


def test_floats_tell_each_float32_from_the_next() -> None:
    import numpy as np

    values = np.random.default_rng(1).standard_normal(1_000).astype("<f4")
    assert (np.array(floats(values.tobytes()), dtype="<f4") == values).all()
