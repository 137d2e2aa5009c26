"""The table of tasks."""

from __future__ import annotations

import pytest

from cortex_tasks import payloads
from cortex_tasks.catalog import TASKS, InputKind, nearest, task_spec
from cortex_tasks.errors import UnknownTask


def test_every_row_is_found_by_both_names() -> None:
    for name, row in TASKS.items():
        assert row.name == name
        assert task_spec(name) is task_spec(row.celery_name) is row
        assert row.celery_name == f"cortex.{name}"


def test_parameters_and_results_belong_to_their_input() -> None:
    for row in TASKS.values():
        base = payloads.TextParams if row.input is InputKind.TEXT else payloads.SeriesParams
        assert issubclass(row.params, base)
        assert issubclass(row.result, payloads.Result)
        assert row.result.kind != payloads.Result.kind


def test_parameters_tell_tasks_apart() -> None:
    """A task's answer is chosen by the class of its parameters."""
    assert len({row.params for row in TASKS.values()}) == len(TASKS)


@pytest.mark.parametrize("name", ["emebd", "cortex.emebd"])
def test_an_unknown_task_names_the_nearest(name: str) -> None:
    with pytest.raises(UnknownTask, match="did you mean 'embed'") as caught:
        task_spec(name)
    assert caught.value.details == {"task": name}


@pytest.mark.parametrize(
    ("name", "known", "hint"),
    [
        ("miniml", ["minilm", "spacy"], "; did you mean 'minilm'?"),
        ("zzz", ["b", "a"], "; there are: a, b"),
        ("zzz", [], "; there are none"),
    ],
)
def test_hints(name: str, known: list[str], hint: str) -> None:
    assert nearest(name, known) == hint


def test_the_table_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        TASKS["new"] = TASKS["embed"]  # type: ignore[index]
