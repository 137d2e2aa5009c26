"""What users may rely on: the names of ``cortex_tasks``, and the types that checkers and editors see."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
import types
from pathlib import Path

import pytest

import cortex_tasks
from cortex_tasks import AsyncCortex, Cortex, errors
from cortex_tasks.catalog import TASKS

ROOT = Path(__file__).resolve().parents[2]

SURFACE = {
    # clients
    "AsyncCortex", "AsyncJob", "Cortex", "Job", "JobResult", "parse",
    # configuration
    "FleetConfig", "Settings", "load_fleet",
    # inputs and results
    "Anomalies", "Anomaly", "Classification", "Decomposition", "Document", "Embedding", "Entity", "Features", "Fill",
    "FilledMask", "Forecast", "LabelScore", "Series", "Span", "Timings", "Token",
    # errors
    "BrokerUnavailable", "ClientClosed", "ConfigError", "CortexError", "DeadlineExceeded", "DeliveryError",
    "InferenceFailed",
    "InvalidInput", "InvalidParameter", "JobCancelled", "ModelError", "ModelUnavailable", "NoConsumer", "PoisonJob",
    "QueueFull", "RequestError", "ResultLost", "ResultTimeout", "UnknownModel", "UnknownTask",
}  # fmt: skip


def test_the_surface_is_pinned() -> None:
    assert set(cortex_tasks.__all__) == SURFACE
    assert cortex_tasks.__all__ == sorted(cortex_tasks.__all__)


def test_every_name_is_there_and_listed() -> None:
    for name in cortex_tasks.__all__:
        assert getattr(cortex_tasks, name).__name__ == name
    assert set(dir(cortex_tasks)) >= SURFACE
    with pytest.raises(AttributeError, match="no attribute 'Cortx'"):
        _ = cortex_tasks.Cortx  # type: ignore[attr-defined]


def test_every_error_of_the_tree_is_public() -> None:
    assert {name for name in errors.__all__ if name != "error_from_wire"} <= SURFACE


def test_type_checkers_see_the_same_names_as_the_interpreter() -> None:
    tree = ast.parse(Path(cortex_tasks.__file__).read_text())
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: str(node.module).removeprefix("cortex_tasks.")
        for node in guarded.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == cortex_tasks._ROOM_OF


@pytest.mark.parametrize("client", [Cortex, AsyncCortex])
def test_the_clients_have_a_verb_a_task_with_one_signature(client: type) -> None:
    for task in TASKS:
        verb = getattr(client, task)
        assert verb.__doc__
        assert inspect.signature(verb) == inspect.signature(getattr(Cortex, task))
        assert inspect.iscoroutinefunction(verb) is (client is AsyncCortex)


def test_both_clients_offer_the_same_methods() -> None:
    def public(client: type) -> set[str]:
        return {
            name for name, value in vars(client).items() if isinstance(value, types.FunctionType) and name[0] != "_"
        }

    assert public(Cortex) - {"close"} == public(AsyncCortex) - {"aclose"}
    for name in ("submit", "map"):
        ours, theirs = (inspect.signature(getattr(client, name)) for client in (Cortex, AsyncCortex))
        assert list(ours.parameters) == list(theirs.parameters)


def test_the_types_of_ordinary_use_are_exact() -> None:
    pytest.importorskip("mypy")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "tests/support/typed_usage.py"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
