"""What every adapter owes its caller (workers/adapters/base.py), checked over all of them.

To add an adapter: one entry in tests/support/adapter_cases.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cortex_tasks.catalog import TASKS
from cortex_tasks.errors import CortexError
from cortex_tasks.payloads import Params, Timings
from tests.support.adapter_cases import CASES, AdapterCase
from workers.adapters import Adapter, Item, WireValue, adapter_class

Loaded = tuple[AdapterCase, Adapter]


@pytest.fixture(
    scope="module",
    params=[pytest.param(case, id=case.name, marks=[pytest.mark.models] if case.heavy else []) for case in CASES],
)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    case: AdapterCase = request.param
    if case.requires and not os.environ.get("CI"):
        pytest.importorskip(case.requires, reason=f"{case.requires} is not installed")
    adapter = adapter_class(case.adapter).load(case.context(tmp_path_factory.mktemp(case.name)))
    yield case, adapter
    adapter.close()


def _run(adapter: Adapter, task: str, inputs: Sequence[Any], params: Params) -> list[WireValue]:
    prepared = adapter.prepare(task, inputs, params)
    assert len(prepared) == len(inputs)
    items: list[Item] = []
    for entry in prepared:
        assert not isinstance(entry, CortexError), entry
        assert entry.cost_tokens >= 1
        items.append(entry)
    raw = adapter.forward(task, items, params)
    assert len(raw) == len(items)
    values = adapter.finish(task, items, raw, params)
    assert len(values) == len(items)
    return values


def _case_inputs(case: AdapterCase, adapter: Adapter, task: str) -> tuple[Sequence[Any], Params]:
    if task in case.inputs:
        return case.inputs[task], TASKS[task].params.model_validate(dict(case.params.get(task, {})))
    return adapter.example(task)


def _assert_close(got: Any, expected: Any, tolerance: float) -> None:
    if isinstance(expected, bytes):
        assert np.allclose(np.frombuffer(got, "<f4"), np.frombuffer(expected, "<f4"), atol=tolerance)
    elif isinstance(expected, float):
        assert got == pytest.approx(expected, abs=tolerance)
    elif isinstance(expected, dict):
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            _assert_close(got[key], value, tolerance)
    elif isinstance(expected, (list, tuple)):
        assert len(got) == len(expected)
        for mine, theirs in zip(got, expected, strict=True):
            _assert_close(mine, theirs, tolerance)
    else:
        assert got == expected


def test_the_example_of_each_task_is_answered_with_a_valid_result(loaded: Loaded) -> None:
    case, adapter = loaded
    for task in case.tasks:
        inputs, params = adapter.example(task)
        assert isinstance(params, TASKS[task].params)
        for value in _run(adapter, task, inputs, params):
            TASKS[task].result.model_validate({**value, "model": case.name, "revision": "r", "timings": Timings()})


def test_an_empty_batch_is_answered_with_nothing(loaded: Loaded) -> None:
    case, adapter = loaded
    for task in case.tasks:
        _, params = adapter.example(task)
        assert _run(adapter, task, [], params) == []


def test_each_answer_of_a_batch_is_the_answer_alone_in_order(loaded: Loaded) -> None:
    case, adapter = loaded
    for task in case.tasks:
        inputs, params = _case_inputs(case, adapter, task)
        batched = _run(adapter, task, inputs, params)
        for value, source in zip(batched, inputs, strict=True):
            _assert_close(value, _run(adapter, task, [source], params)[0], case.tolerance)


def test_reversing_a_batch_reverses_its_answers(loaded: Loaded) -> None:
    case, adapter = loaded
    for task in case.tasks:
        inputs, params = _case_inputs(case, adapter, task)
        forwards = _run(adapter, task, inputs, params)
        backwards = _run(adapter, task, list(reversed(inputs)), params)
        _assert_close(list(reversed(backwards)), forwards, case.tolerance)


def test_it_says_what_it_weighs_and_what_computes_its_answers(loaded: Loaded) -> None:
    case, adapter = loaded
    assert adapter.size_bytes > 0
    assert adapter.version
    assert bool(adapter.library) == case.heavy


def test_closing_twice_does_no_harm(loaded: Loaded, tmp_path: Path) -> None:
    case, _ = loaded
    mine = adapter_class(case.adapter).load(case.context(tmp_path))
    mine.close()
    mine.close()
