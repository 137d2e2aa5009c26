"""Wire answers become typed results; a strange one becomes an error, not a crash."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from kombu.utils import json as kombu_json

import cortex_tasks
from cortex_tasks import codec
from cortex_tasks.catalog import TASKS
from cortex_tasks.codec import Answer
from cortex_tasks.echo import echo, echo_vector
from cortex_tasks.errors import (
    CortexError,
    DeadlineExceeded,
    InferenceFailed,
    InvalidInput,
    JobCancelled,
    ModelError,
    ModelUnavailable,
)
from cortex_tasks.payloads import Embedding, Series, Timings
from cortex_tasks.results import JobResult, error_from_meta, parse

SERIES = Series(ds=("2024-01-01T00:00:00", "2024-01-02T00:00:00"), y=(1.0, 2.0))


def answer(task: str = "embed", *values: Any, **params: Any) -> Answer:
    checked = TASKS[task].params.model_validate(params)
    items = [{"value": echo(task, value, checked)} for value in values]
    return Answer(task, "echo", "r1", Timings(forward_ms=2.0).model_dump(), items)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("task", sorted(TASKS))
def test_every_tasks_answer_is_parsed_from_either_encoding(task: str, packed: bool) -> None:
    params = {"labels": ["a", "b"]} if task == "zero_shot" else {}
    value = SERIES if TASKS[task].input == "series" else "Some [MASK] text"
    stored = answer(task, value, value, **params)
    meta = {"status": "SUCCESS", "result": Answer(**{**_fields(stored), "packed": packed})}
    result = parse(codec.loads(codec.dumps(meta))["result"])
    assert [type(item) for item in result.values()] == [TASKS[task].result] * 2
    assert (result.task, result.model, result.revision, result.timings.forward_ms) == (task, "echo", "r1", 2.0)


def _fields(stored: Answer) -> dict[str, Any]:
    return {name: getattr(stored, name) for name in Answer.__slots__}


def test_parse_reads_what_a_foreign_celery_client_gets() -> None:
    plain = kombu_json.loads(kombu_json.dumps(answer("embed", "one")))
    embedding = cortex_tasks.parse(plain).values()[0]
    assert isinstance(embedding, Embedding)
    assert embedding.vector.tolist() == pytest.approx(echo_vector("one"))
    assert embedding.vector.dtype == "float32"


@pytest.mark.parametrize(
    "wrong",
    [None, 7, "text", {}, {"result": 1}, {"cortex": 1}, {"cortex": 1, "task": "embed", "model": "m", "revision": "r"}],
)
def test_parse_refuses_anything_else(wrong: Any) -> None:
    with pytest.raises(ValueError):
        parse(wrong)


def test_what_a_newer_worker_adds_is_ignored_and_what_it_lacks_is_said() -> None:
    plain = json.loads(json.dumps(answer().__json__()))
    plain["timings"]["new_ms"] = 1.0
    plain["items"] = [
        {"value": {"data": b"\x00" * 4, "new": True}},
        {"value": {"new": True}},
        {"error": {"code": "brand_new", "message": "of the future"}},
        {},
    ]
    good, bad, future, nothing = parse(plain)
    assert isinstance(good, Embedding)
    assert isinstance(bad, ModelError)
    assert "data" in str(bad)
    assert (type(future), str(future)) == (CortexError, "of the future")
    assert isinstance(nothing, CortexError)


def test_job_result_is_a_sequence_of_values_and_errors() -> None:
    error = InvalidInput("bad")
    result: JobResult[str] = JobResult("embed", ("a", error, "b"))
    assert list(result) == ["a", error, "b"]
    assert (len(result), result[0], result[-1], result[1:]) == (3, "a", "b", (error, "b"))
    assert (result.ok, result.errors) == (False, {1: error})
    with pytest.raises(InvalidInput, match="bad"):
        result.values()
    assert "3 items, 1 failed" in repr(result)
    whole: JobResult[str] = JobResult("embed", ("a",))
    assert (whole.ok, whole.errors, whole.values()) == (True, {}, ("a",))


def failure(name: str, module: str, message: Any, status: str = "FAILURE") -> CortexError:
    return error_from_meta(
        {"status": status, "result": {"exc_type": name, "exc_module": module, "exc_message": message}}
    )


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (failure("ModelUnavailable", "cortex_tasks.errors", ["no weights", {"a": 1}]), ModelUnavailable, "no weights"),
        (failure("ModelUnavailable", "cortex_tasks.errors", '["no weights", {}]'), ModelUnavailable, "no weights"),
        (failure("ModelUnavailable", "cortex_tasks.errors", "no weights"), ModelUnavailable, "no weights"),
        (failure("ModelUnavailable", "elsewhere", ["no"]), InferenceFailed, "ModelUnavailable: no"),
        (failure("error_from_wire", "cortex_tasks.errors", ["x"]), InferenceFailed, "error_from_wire"),
        (failure("NotRegistered", "celery.exceptions", ["cortex.embed"]), InferenceFailed, "cortex.embed"),
        (failure("TaskRevokedError", "celery.exceptions", ["expired"], "REVOKED"), DeadlineExceeded, "deadline"),
        (failure("TaskRevokedError", "celery.exceptions", ["revoked"], "REVOKED"), JobCancelled, "cancelled"),
        (error_from_meta({"status": "FAILURE", "result": None}), InferenceFailed, "failed"),
    ],
)
def test_a_failed_jobs_error_is_rebuilt(error: CortexError, kind: type[CortexError], text: str) -> None:
    assert type(error) is kind
    assert text in str(error)


def test_details_of_a_failed_job_come_along() -> None:
    assert failure("ModelUnavailable", "cortex_tasks.errors", ["no", {"extra": "nlp"}]).details == {"extra": "nlp"}


def test_vectors_survive_base64_of_stock_json() -> None:
    raw = kombu_json.dumps(answer("embed", "one"))
    data = json.loads(raw)["items"][0]["value"]["data"]
    assert base64.b64decode(data["__value__"]) == kombu_json.loads(raw)["items"][0]["value"]["data"]
