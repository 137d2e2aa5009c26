"""What the benchmarks count with, and what they leave behind."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as everything
from benchmarks import latency, overhead, startup, texts, throughput
from benchmarks.card import Benchmark, Row, command_line
from benchmarks.cpu import cpu_s
from benchmarks.plot import draw
from benchmarks.processes import Peer
from benchmarks.report import END, START, machine, table, with_table
from benchmarks.stats import percentile, rounded
from cortex_tasks.demo.material import sentences
from cortex_tasks.local_fleet import session_members


def test_percentile_is_a_value_that_was_measured() -> None:
    values = [float(value) for value in range(100, 0, -1)]
    assert [percentile(values, at) for at in (50, 95, 99, 100)] == [50.0, 95.0, 99.0, 100.0]
    assert percentile([7.0], 99) == 7.0
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)


def test_rounding_keeps_four_digits() -> None:
    assert [rounded(value) for value in (13220.4, 0.912345, 0.0)] == [13220.0, 0.9123, 0.0]


def test_cpu_time_counts_what_a_session_computes() -> None:
    session = {"here": os.getsid(0)}
    before = cpu_s(session)["here"]
    until = time.process_time() + 0.1
    while time.process_time() < until:
        pass
    # The kernel counts in ticks of 10 ms.
    assert cpu_s(session)["here"] - before >= 0.08


@pytest.mark.parametrize("kind", [texts.short, texts.varied])
def test_texts_are_unique_and_the_same_on_every_run(kind: Any) -> None:
    first, again, other = (list(islice(kind(seed), 2_000)) for seed in (1, 1, 2))
    assert first == again
    assert len({*first, *other}) == 4_000


def test_the_first_texts_of_many_seeds_are_of_all_sentences() -> None:
    begun = [next(texts.short(seed)).partition(": ")[2] for seed in range(100, 100 + len(sentences()))]
    assert sorted(begun) == sorted(sentences())


def test_every_block_of_texts_has_the_same_mix() -> None:
    block = [text.count(".") for text in islice(texts.varied(3), 20)]
    assert min(block) == 1
    assert max(block) >= 8


def test_a_peer_obeys_and_leaves_nothing() -> None:
    with Peer("benchmarks.client", {}) as peer:
        assert peer.ask("hello") == {"pid": peer.pid}
    assert not session_members({peer.pid})


def test_a_peer_that_fails_says_why() -> None:
    with Peer("benchmarks.client", {}) as peer, pytest.raises(RuntimeError, match="KeyError: 'dance'"):
        peer.ask("dance")


def _measured(seconds: float, say: Any) -> dict[str, Any]:
    say("something")
    return {"rate_per_s": 1234.5678 * seconds, "most_ms": 3.0, "took_ms": 2.5}


TOY = Benchmark(
    "toy",
    "A toy",
    (
        Row("rate_per_s", "a rate", "/s", at_least=10_000),
        Row("took_ms", "a duration", "ms", at_most="most_ms"),
        Row("most_ms", "its bound", "ms"),
    ),
    _measured,
)


def test_a_card_says_what_was_met_and_the_last_line_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    command_line(TOY, ["--seconds", "2"])
    shown = capsys.readouterr()
    assert "toy: something" in shown.err
    lines = shown.out.splitlines()
    assert json.loads(lines[-1])["rate_per_s"] == 2469.0
    assert "≥ 10,000 MISSED" in shown.out
    assert "≤ 3 met" in shown.out


@pytest.mark.parametrize(("spread", "verdict"), [(1.25, "MISSED"), (1.26, "not judged: disturbed")])
def test_a_disturbed_run_is_not_judged(spread: float, verdict: str) -> None:
    quiet = Row("spread", "is it quiet?", at_most=1.25, condition=True)
    card = dataclasses.replace(TOY, rows=(quiet, *TOY.rows)).card(
        {"spread": spread, "rate_per_s": 2.0, "took_ms": 2.0, "most_ms": 3.0}
    )
    assert f"≥ 10,000 {verdict}" in card
    assert ("≤ 3 met" in card) == (verdict == "MISSED")
    assert ("≤ 1.25 met" in card, "≤ 1.25 MISSED" in card) == (spread == 1.25, spread != 1.25)


def test_json_only_prints_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    command_line(TOY, ["--json-only"])
    shown = capsys.readouterr()
    assert shown.err == ""
    assert json.loads(shown.out)["seconds"] == 20.0


@pytest.fixture
def results() -> dict[str, Any]:
    """A run in which every figure of every card is 0.5."""
    benchmarks = (overhead.BENCHMARK, throughput.BENCHMARK, latency.BENCHMARK, startup.BENCHMARK)
    figures = {each.name: {row.field: 0.5 for row in each.rows} for each in benchmarks}
    return {"machine": machine(), **figures}


def test_the_readme_gets_its_table_between_the_markers(results: dict[str, Any]) -> None:
    readme = f"# Cortex\n\nBefore.\n\n{START}\nold\n{END}\n\nAfter.\n"
    renewed = with_table(readme, table(results))
    assert "old" not in renewed
    assert renewed.startswith("# Cortex\n\nBefore.\n")
    assert renewed.endswith("\n\nAfter.\n")
    assert with_table(renewed, table(results)) == renewed


def test_what_an_older_run_did_not_measure_is_a_dash(results: dict[str, Any]) -> None:
    results["latency"] = {"p50_ms": {"30": 20.69, "60": 51.32, "90": 1441.0}}
    shown = table(results)
    assert "| 20.7 / 51.3 / 1,441; — / — / — ms |" in shown
    assert "| — ms, — ms |" in shown


def test_a_disturbed_run_says_so_in_the_table(results: dict[str, Any]) -> None:
    assert "not quiet" not in table(results)
    results["throughput"]["raw_spread"] = 1.4
    assert "while it was not quiet (the raw engine varied by 1.4 ×)" in " ".join(table(results).split())


def test_a_readme_without_markers_gets_a_section(results: dict[str, Any]) -> None:
    renewed = with_table("# Cortex\n", table(results))
    assert renewed.startswith("# Cortex\n\n## Measured\n")
    assert with_table(renewed, table(results)) == renewed


def test_the_last_run_is_drawn_again_without_measuring(
    results: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "latest.json"
    kept.write_text(json.dumps(results))
    (tmp_path / "README.md").write_text("# Cortex\n")
    monkeypatch.setattr(everything, "ROOT", tmp_path)
    monkeypatch.setattr(everything, "RESULTS", kept)
    monkeypatch.setattr("sys.argv", ["benchmarks", "--redraw"])
    everything.main()
    assert START in (tmp_path / "README.md").read_text()
    assert (tmp_path / "docs" / "figures" / "performance.png").exists()
    assert json.loads(kept.read_text()) == results


def test_nothing_tells_whose_machine_it_was(results: dict[str, Any]) -> None:
    assert os.uname().nodename not in json.dumps(results) + table(results)


def test_the_plot_is_drawn_and_the_same_twice(results: dict[str, Any], tmp_path: Path) -> None:
    first, second = draw(results, tmp_path / "a"), draw(results, tmp_path / "b")
    assert [path.name for path in first] == ["performance.png", "performance.svg"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
