"""The demo's material, and its scenes over the in-process fleet; ``tests/acceptance`` runs the real one."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from cortex_tasks import payloads as p
from cortex_tasks import testing
from cortex_tasks.demo import ProgressLine, Stage, _play, _verdict
from cortex_tasks.demo.material import ANOMALIES, DAYS, HOLDOUT, sentences, visits
from cortex_tasks.demo.scenes import SCENES, entities, forecast, masks, semantic_search
from cortex_tasks.errors import ModelUnavailable
from cortex_tasks.terminal import Style


def stage_for(fleet: testing.LocalFleet) -> Stage:
    return Stage(fleet.client(timeout_s=10.0), io.StringIO(), Style(), 80)


def said(stage: Stage) -> str:
    assert isinstance(stage.out, io.StringIO)
    return stage.out.getvalue()


def test_the_sentences_are_hundreds_of_different_ones_fit_for_the_screen() -> None:
    texts = sentences()
    assert len(texts) >= 300
    assert len(set(texts)) == len(texts)
    assert all(10 < len(text) < 110 and text.endswith(".") for text in texts)


def test_the_series_is_the_same_everywhere_and_has_what_is_looked_for() -> None:
    data = visits()
    assert (len(data.ds), len(data.y), len(data.future)) == (DAYS, DAYS, HOLDOUT)
    assert data.ds[:2] == ["2021-01-04", "2021-01-05"]
    assert data == visits()
    strange = visits(with_anomalies=True)
    assert {day for day in range(DAYS) if strange.y[day] != data.y[day]} == set(ANOMALIES)


def test_wrong_answers_are_told() -> None:
    """The echo's answers are nonsense: every scene must notice, and none may break."""
    with testing.fleet() as fleet:
        stage = stage_for(fleet)
        for scene in SCENES:
            before = len(stage.problems)
            _play(scene, stage)
            assert len(stage.problems) > before, scene.__name__
        assert _verdict(stage) == 1
        assert "not as expected" in said(stage)


def test_right_answers_are_praised() -> None:
    def answers(task: str, _model: str, inputs: Sequence[Any], _params: p.Params) -> list[Mapping[str, Any]]:
        assert task == "annotate"
        marks = ("1989", "4.5", "1911")
        found = [[(text.index(mark), mark) for mark in marks if mark in text] for text in inputs]
        return [
            {"entities": [{"text": mark, "label": "DATE", "start": at, "end": at + len(mark)} for at, mark in spans]}
            for spans in found
        ]

    with testing.fleet(answers) as fleet:
        stage = stage_for(fleet)
        _play(entities, stage)
        assert stage.problems == []
        assert "[1989 DATE]" in said(stage)
        assert _verdict(stage) == 0


def test_an_unavailable_model_is_no_failure_but_its_reason_is_shown() -> None:
    def answers(*_: Any) -> list[Any]:
        raise ModelUnavailable("the hub cannot be reached; put the files into /models")

    with testing.fleet(answers) as fleet:
        stage = stage_for(fleet)
        _play(masks, stage)
        assert stage.problems == []
        assert "unavailable: the hub cannot be reached; put the files into /models" in said(stage)
        _play(forecast, stage)
        assert stage.problems == ["ModelUnavailable: the hub cannot be reached; put the files into /models"]


def test_everything_fits_the_screen() -> None:
    with testing.fleet() as fleet:
        stage = stage_for(fleet)
        _play(semantic_search, stage)
        _play(forecast, stage)
    titles = [line for line in said(stage).splitlines() if line.startswith("──")]
    assert len(titles) == 2
    assert all(len(line) <= 80 for line in titles)
    assert max(len(line) for line in said(stage).splitlines()) <= 119


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_one_line_on_a_terminal_and_a_line_a_change_elsewhere(terminal: bool) -> None:
    out = io.StringIO()
    out.isatty = lambda: terminal  # type: ignore[method-assign]
    progress = ProgressLine(out)
    for waited_s, state in ((0.0, "starting"), (0.1, "starting"), (2.0, "ready")):
        progress(waited_s, {"nlp": state})
    progress.end()
    assert out.getvalue().count("\n") == (1 if terminal else 2)
    assert "2 s  nlp ready" in out.getvalue()
