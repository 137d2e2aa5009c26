"""The tree of errors: codes, wire form, and how Celery rebuilds them."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
from celery import Celery
from celery.app.task import Context
from hypothesis import given
from hypothesis import strategies as st

from cortex_tasks import errors
from cortex_tasks.codec import SERIALIZER, loads, register_serializer
from cortex_tasks.errors import CortexError, QueueFull, error_from_wire

TREE = list(errors._walk(CortexError))
details = st.dictionaries(st.text(max_size=5), st.none() | st.booleans() | st.integers() | st.text(max_size=5))


def test_the_tree_is_complete_and_public() -> None:
    names = {cls.__name__ for cls in TREE}
    assert names | {"error_from_wire"} == set(errors.__all__)
    assert {cls.__module__ for cls in TREE} == {"cortex_tasks.errors"}


def test_each_class_has_a_code_of_its_own() -> None:
    codes = [cls.code for cls in TREE]
    assert len(set(codes)) == len(codes)
    assert all("code" in vars(cls) for cls in TREE), "an inherited code would come back as its parent"


@pytest.mark.parametrize("cls", TREE)
@given(message=st.text(), facts=details)
def test_an_error_survives_the_wire(cls: type[CortexError], message: str, facts: dict[str, Any]) -> None:
    error = cls(message, facts)
    back = error_from_wire(json.loads(json.dumps(error.to_wire())))
    assert type(back) is cls
    assert (str(back), back.details, back.retryable) == (message, facts, cls.retryable)


@given(st.dictionaries(st.sampled_from(["code", "message"]), st.none() | st.integers() | st.text()))
def test_an_unknown_code_becomes_a_plain_error(wire: dict[str, Any]) -> None:
    assert isinstance(error_from_wire(wire), CortexError)
    assert type(error_from_wire({"code": "of a newer version", "message": "m"})) is CortexError


@pytest.mark.parametrize("cls", TREE)
def test_celery_rebuilds_the_error_for_any_client(cls: type[CortexError]) -> None:
    """As it is stored by a worker and read by an AsyncResult."""
    register_serializer()
    app = Celery("t", set_as_current=False, backend="cache+memory://")
    app.conf.update(result_serializer=SERIALIZER, result_accept_content=["json", SERIALIZER])
    app.backend.mark_as_failure("id", cls("what happened", {"limit": 3}), request=Context({"id": "id"}))
    stored = loads(app.backend.get(app.backend.get_key_for_task("id")))
    assert stored["result"]["exc_type"] == cls.__name__
    assert stored["result"]["exc_module"] == "cortex_tasks.errors"
    back = app.AsyncResult("id").result
    assert type(back) is cls
    assert (str(back), back.message, back.details) == ("what happened", "what happened", {"limit": 3})


@pytest.mark.parametrize("cls", TREE)
def test_an_error_can_be_copied_between_processes(cls: type[CortexError]) -> None:
    """multiprocessing in a user's own program pickles exceptions; nothing of Cortex does."""
    back = pickle.loads(pickle.dumps(cls("m", {"a": 1})))  # noqa: S301
    assert (type(back), back.message, back.details) == (cls, "m", {"a": 1})


def test_the_bases_that_users_catch() -> None:
    assert issubclass(errors.RequestError, ValueError)
    assert issubclass(errors.BrokerUnavailable, ConnectionError)
    assert issubclass(errors.ResultTimeout, TimeoutError)
    assert issubclass(errors.NoConsumer, errors.ResultTimeout)
    assert issubclass(errors.DeadlineExceeded, TimeoutError)


def test_what_may_succeed_later_says_so() -> None:
    retryable = {cls.__name__ for cls in TREE if cls.retryable}
    assert "ModelUnavailable" in retryable
    assert {"BrokerUnavailable", "ClientClosed", "QueueFull", "ResultLost", "ResultTimeout"} <= retryable
    assert not retryable & {"DeadlineExceeded", "JobCancelled", "PoisonJob", "InvalidInput", "ConfigError"}


@pytest.mark.parametrize(("facts", "seconds"), [({}, 1.0), ({"retry_after_s": 2.5}, 2.5)])
def test_a_full_queue_says_when_to_come_again(facts: dict[str, Any], seconds: float) -> None:
    assert QueueFull("full", facts).retry_after_s == seconds


def test_details_are_the_errors_own() -> None:
    facts = {"a": 1}
    error = CortexError("m", facts)
    facts["a"] = 2
    assert error.details == {"a": 1}
    assert CortexError("m").to_wire() == {"code": "error", "message": "m"}
