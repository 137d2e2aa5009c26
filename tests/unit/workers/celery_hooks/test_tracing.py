"""Which jobs need Celery's own tracer, and that the others come out the same."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from billiard.einfo import ExceptionInfo
from celery import Celery, Task, signals
from celery.app import trace

from cortex_tasks.codec import SERIALIZER, Answer, loads, register_serializer, result_key
from cortex_tasks.errors import InferenceFailed
from cortex_tasks.payloads import Timings
from workers.celery_hooks.backend import BatchedRedisBackend
from workers.celery_hooks.tracing import Tracer
from workers.tasks import slot

ANSWER = Answer("embed", "m", "rev", Timings().model_dump(), [{"value": {"data": b"x"}}], packed=True)
NOTHING_FOLLOWS: dict[str, Any] = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
HEADERS: dict[str, Any] = {"group": None, "parent_id": None, "ignore_result": False, "stamps": {}, "reply_to": None}


def app_of(url: str, **conf: Any) -> Celery:
    register_serializer()
    app = Celery("t", set_as_current=False)
    app.conf.update(
        result_backend=f"workers.celery_hooks.backend:BatchedRedisBackend+{url}",
        result_serializer=SERIALIZER,
        result_accept_content=["json", SERIALIZER],
        **conf,
    )
    return app


def task_of(app: Celery, base: type[Task] = Task, **options: Any) -> Any:
    def body() -> Answer:
        return ANSWER

    return app.task(body, name="t.answer", base=base, shared=False, **options)


def not_called(*_: Any) -> Any:
    raise AssertionError("Celery's tracer was called")


def arguments(job_id: str, **headers: Any) -> tuple[Any, ...]:
    """What Celery's tracer is called with."""
    return "t.answer", job_id, {**HEADERS, **headers}, ([], {}, NOTHING_FOLLOWS), None, None


@pytest.fixture
def app(redis_url: str) -> Celery:
    return app_of(redis_url)


@pytest.fixture
def client(redis_url: str) -> Iterator[Any]:
    with redis.Redis.from_url(redis_url) as made:
        yield made


def test_a_job_that_nothing_follows_is_plain(app: Celery) -> None:
    tracer, task = Tracer(app), task_of(app)
    assert tracer.takes_plain(task, ANSWER, NOTHING_FOLLOWS, HEADERS)
    assert tracer.takes_plain(task, ANSWER, None, {})


@pytest.mark.parametrize("follows", list(NOTHING_FOLLOWS))
def test_what_follows_a_job_takes_celerys_tracer(app: Celery, follows: str) -> None:
    assert not Tracer(app).takes_plain(task_of(app), ANSWER, {**NOTHING_FOLLOWS, follows: [{"task": "t"}]}, HEADERS)


@pytest.mark.parametrize("header", ["group", "parent_id", "ignore_result", "stamps"])
def test_what_changes_celerys_meta_takes_celerys_tracer(app: Celery, header: str) -> None:
    assert not Tracer(app).takes_plain(task_of(app), ANSWER, NOTHING_FOLLOWS, {**HEADERS, header: "g"})


def test_a_failure_takes_celerys_tracer(app: Celery) -> None:
    assert not Tracer(app).takes_plain(task_of(app), InferenceFailed("no"), NOTHING_FOLLOWS, HEADERS)


@pytest.mark.parametrize("name", ["task_prerun", "task_postrun", "task_success"])
def test_a_listener_takes_celerys_tracer_as_long_as_it_listens(app: Celery, name: str) -> None:
    tracer, task, signal = Tracer(app), task_of(app), getattr(signals, name)

    def listener(**_: Any) -> None: ...

    signal.connect(listener)
    try:
        assert not tracer.takes_plain(task, ANSWER, NOTHING_FOLLOWS, HEADERS)
    finally:
        signal.disconnect(listener)
    assert tracer.takes_plain(task, ANSWER, NOTHING_FOLLOWS, HEADERS)


@pytest.mark.parametrize("name", ["before_start", "on_success", "after_return"])
def test_a_tasks_own_code_takes_celerys_tracer(app: Celery, name: str) -> None:
    base = type("Own", (Task,), {name: lambda *_, **__: None})
    assert not Tracer(app).takes_plain(task_of(app, base), ANSWER, NOTHING_FOLLOWS, HEADERS)


@pytest.mark.parametrize("options", [{"ignore_result": True}, {"track_started": True}])
def test_a_task_that_stores_otherwise_takes_celerys_tracer(app: Celery, options: dict[str, Any]) -> None:
    assert not Tracer(app).takes_plain(task_of(app, **options), ANSWER, NOTHING_FOLLOWS, HEADERS)


@pytest.mark.parametrize("conf", [{"result_extended": True}, {"worker_deduplicate_successful_tasks": True}])
def test_unusual_settings_take_celerys_tracer(redis_url: str, conf: dict[str, Any]) -> None:
    app = app_of(redis_url, **conf)
    assert not Tracer(app).takes_plain(task_of(app), ANSWER, NOTHING_FOLLOWS, HEADERS)


def test_it_can_be_switched_off(app: Celery) -> None:
    assert not Tracer(app, always_stock=True).takes_plain(task_of(app), ANSWER, NOTHING_FOLLOWS, HEADERS)


def test_the_stored_meta_is_the_one_that_celerys_tracer_stores(app: Celery, client: Any) -> None:
    task = task_of(app)
    backend = app.backend
    assert isinstance(backend, BatchedRedisBackend)
    trace.build_tracer(task.name, task, app=app)("stock", (), {}, {**HEADERS, "id": "stock", "delivery_info": {}})
    with backend.collecting():
        returned = Tracer(app).trace(task, not_called, arguments("plain"), ANSWER, 0.25)
    backend.flush()
    assert Tracer(app).told(task, arguments("plain"), returned) == (0, repr(ANSWER), 0.25)
    stock, plain = (loads(client.get(result_key(job_id))) for job_id in ("stock", "plain"))
    for meta in (stock, plain):
        meta.pop("task_id"), meta.pop("date_done")
    assert plain == stock


def test_success_is_logged_as_celery_logs_it(
    app: Celery, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace.logger, "propagate", True)
    caplog.set_level(logging.INFO, logger=trace.logger.name)
    tracer, task, called = Tracer(app), task_of(app), arguments("plain", kwargsrepr="{'inputs': …}")
    returned = tracer.trace(task, not_called, called, ANSWER, 0.25)
    assert not caplog.records
    tracer.told(task, called, returned)
    [record] = caplog.records
    assert record.getMessage() == f"Task t.answer[plain] succeeded in 0.25s: {ANSWER!r}"
    assert record.data["kwargs"] == "{'inputs': …}"  # type: ignore[attr-defined]


def test_an_answer_that_cannot_be_stored_goes_to_celerys_tracer(app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BatchedRedisBackend, "answer_max_bytes", 10)
    seen: list[Any] = []

    def stock(*given: Any) -> tuple[int, str, float]:
        seen.append((given, slot.take()))
        return 1, "too long", 0.5

    given = arguments("long")
    assert Tracer(app).trace(task_of(app), stock, given, ANSWER, 0.25) == (1, "too long", 0.75)
    assert seen == [(given, ANSWER)]


def test_a_tracer_that_raises_is_told_of_and_leaves_nothing_behind(app: Celery) -> None:
    def broken(*_: Any) -> Any:
        raise LookupError("inside Celery")

    returned = Tracer(app, always_stock=True).trace(task_of(app), broken, arguments("a"), ANSWER, 0.0)
    assert isinstance(returned, ExceptionInfo)
    assert slot.take() is None
