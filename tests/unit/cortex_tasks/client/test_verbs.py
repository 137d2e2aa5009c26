"""The verbs of both clients, over the in-process fleet: one suite for threads and for asyncio."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cortex_tasks import (
    AsyncCortex,
    BrokerUnavailable,
    ConfigError,
    Cortex,
    CortexError,
    DeadlineExceeded,
    InferenceFailed,
    InvalidInput,
    InvalidParameter,
    JobCancelled,
    JobResult,
    ModelUnavailable,
    NoConsumer,
    QueueFull,
    ResultTimeout,
    Series,
    Settings,
    UnknownModel,
    UnknownTask,
    payloads,
    testing,
)
from cortex_tasks.client.cuts import JOB_CHARS
from cortex_tasks.config import FleetConfig
from cortex_tasks.echo import FAIL, echo_vector
from cortex_tasks.testing import LocalFleet, echo_fleet

SERIES = [("2024-01-01", 1.0), ("2024-01-02", 2.0)]
#: verb -> a call with one input, and the class of its result.
CALLS: dict[str, tuple[Any, dict[str, Any], type]] = {
    "embed": ("Some text", {}, payloads.Embedding),
    "annotate": ("Some text", {"include": ("entities",)}, payloads.Document),
    "classify": ("Some text", {"top_k": 1}, payloads.Classification),
    "zero_shot": ("Some text", {"labels": ["a", "b"]}, payloads.Classification),
    "fill_mask": ("Some [MASK]", {"top_k": 2}, payloads.FilledMask),
    "features": ("Some text", {"pooling": "mean"}, payloads.Features),
    "forecast": (SERIES, {"horizon": 3}, payloads.Forecast),
    "decompose": ({"ds": ["2024-01-01", "2024-01-02"], "y": [1, 2]}, {}, payloads.Decomposition),
    "detect_anomalies": (Series(ds=("2024-01-01", "2024-01-02"), y=(1, 2)), {}, payloads.Anomalies),
}


class Client:
    """Calls either client the same way; ``timeout_s`` is short, since nothing here needs to wait."""

    def __init__(self, fleet: LocalFleet, kind: str) -> None:
        self._kind = kind
        self._sync = fleet.client(timeout_s=5.0)
        self._make_async: Callable[[], AsyncCortex] = fleet.aclient

    def __call__(self, verb: str, *args: Any, **kwargs: Any) -> Any:
        if self._kind == "sync":
            return getattr(self._sync, verb)(*args, **kwargs)

        async def call() -> Any:
            async with self._make_async() as client:
                return await getattr(client, verb)(*args, **kwargs)

        return asyncio.run(call())


@pytest.fixture
def fleet() -> Iterator[LocalFleet]:
    with testing.fleet() as fleet:
        yield fleet


@pytest.fixture(params=["sync", "async"])
def call(fleet: LocalFleet, request: pytest.FixtureRequest) -> Client:
    return Client(fleet, request.param)


@pytest.mark.parametrize("verb", sorted(CALLS))
def test_one_input_gives_one_result_and_several_give_as_many(fleet: LocalFleet, call: Client, verb: str) -> None:
    value, params, kind = CALLS[verb]
    one = call(verb, value, model="echo", **params)
    assert type(one) is kind
    assert (one.model, one.revision) == ("echo", "echo-1")
    several = call(verb, [value, value], model="echo", **params)
    assert isinstance(several, JobResult)
    assert [type(item) for item in several.values()] == [kind, kind]
    assert [len(job.inputs) for job in fleet.jobs] == [1, 2]
    assert {job.task for job in fleet.jobs} == {verb}


def test_answers_are_of_their_own_inputs_in_order(call: Client) -> None:
    texts = [f"text {number}" for number in range(50)]
    vectors = [item.vector.tolist() for item in call("embed", texts).values()]
    assert vectors == [pytest.approx(echo_vector(text)) for text in texts]


def test_no_inputs_give_no_results_and_no_job(fleet: LocalFleet, call: Client) -> None:
    result = call("embed", [])
    assert (list(result), result.ok, result.model) == ([], True, "")
    assert fleet.jobs == []


def test_a_bad_input_is_found_here_and_its_neighbours_go_on(fleet: LocalFleet, call: Client) -> None:
    result = call("embed", ["one", "", "two", 7, f"three {FAIL}"])
    assert [type(item).__name__ for item in result] == [
        "Embedding", "InvalidInput", "Embedding", "InvalidInput", "InferenceFailed",
    ]  # fmt: skip
    assert fleet.jobs[0].inputs == ["one", "two", f"three {FAIL}"]
    assert sorted(result.errors) == [1, 3, 4]
    assert "not int" in str(result.errors[3])
    with pytest.raises(InvalidInput):
        result.values()


def test_one_bad_input_raises_and_nothing_travels(fleet: LocalFleet, call: Client) -> None:
    for value in ("", "x" * 10_001, None, 7, b"x"):
        with pytest.raises(InvalidInput):
            call("embed", value)
    with pytest.raises(InvalidInput, match="unsorted"):
        call("forecast", SERIES[::-1])
    assert fleet.jobs == []


def test_an_error_of_the_only_input_is_raised(call: Client) -> None:
    with pytest.raises(InferenceFailed, match="echo was asked to fail"):
        call("embed", FAIL)


@pytest.mark.parametrize(
    ("verb", "args", "options", "kind", "said"),
    [
        ("embed", ["x"], {"model": "minlm"}, UnknownModel, "did you mean 'minilm'"),
        ("embed", ["x"], {"model": "spacy"}, UnknownModel, "does not serve task 'embed'"),
        ("embed", ["x"], {"normalise": True}, InvalidParameter, "did you mean 'normalize'"),
        ("embed", ["x"], {"lane": "bulky"}, InvalidParameter, "did you mean 'bulk'"),
        ("embed", ["x"], {"cache": "no"}, InvalidParameter, "unknown cache 'no'"),
        ("embed", ["x"], {"deadline_s": 0}, InvalidParameter, "deadline_s"),
        ("embed", ["x"], {"deadline_s": math.nan}, InvalidParameter, "deadline_s"),
        ("embed", ["x"], {"timeout_s": -1}, InvalidParameter, "timeout_s"),
        ("embed", ["x"], {"timeout_s": True}, InvalidParameter, "timeout_s"),
        ("fill_mask", ["[MASK]"], {"top_k": 0}, InvalidParameter, "top_k"),
        ("zero_shot", ["x", []], {}, InvalidParameter, "labels"),
        ("zero_shot", ["x", ["\ud800"]], {}, InvalidParameter, "labels"),
        ("forecast", [SERIES], {"horizon": 3651}, InvalidParameter, "3,650"),
        ("submit", ["embedd", "x"], {}, UnknownTask, "did you mean 'embed'"),
    ],
)
def test_what_can_never_work_is_refused_before_it_travels(
    fleet: LocalFleet, call: Client, verb: str, args: list[Any], options: dict[str, Any], kind: type, said: str
) -> None:
    with pytest.raises(kind) as caught:
        call(verb, *args, **options)
    assert said in str(caught.value)
    assert fleet.jobs == []


def test_options_reach_the_fleet(fleet: LocalFleet, call: Client) -> None:
    call("zero_shot", "x", ["a", "b"], model="echo", lane="bulk", cache="refresh", multi_label=True, truncate=False)
    job = fleet.jobs[0]
    assert (job.lane, job.cache, job.queue, job.model) == ("bulk", "refresh", "echo", "echo")
    assert job.params == {"labels": ["a", "b"], "multi_label": True}
    assert job.expires_at is None


def test_more_inputs_than_a_job_holds_travel_as_several(fleet: LocalFleet, call: Client) -> None:
    texts = [f"t{number}" for number in range(600)]
    result = call("embed", [*texts, ""])
    assert [len(job.inputs) for job in fleet.jobs] == [256, 256, 88]
    assert [item.vector.tolist() for item in result[:600]] == [pytest.approx(echo_vector(text)) for text in texts]
    assert list(result.errors) == [600]


def test_long_texts_are_spread_over_jobs(fleet: LocalFleet, call: Client) -> None:
    texts = [f"{number:04}" * 2_000 for number in range(20)]
    result = call("embed", texts)
    assert result.ok
    assert max(sum(map(len, job.inputs)) for job in fleet.jobs) <= JOB_CHARS
    assert [text for job in fleet.jobs for text in job.inputs] == texts


def test_truncation_is_done_only_on_request(fleet: LocalFleet, call: Client) -> None:
    call("embed", "x" * 20_000, truncate=True)
    assert fleet.jobs[0].inputs == ["x" * 10_000]


# --------------------------------------------------------------------------------------------- what goes wrong


def test_a_queue_without_workers_is_named(fleet: LocalFleet, call: Client) -> None:
    with fleet.without_workers(), pytest.raises(NoConsumer) as caught:
        call("embed", "x", timeout_s=0.01)
    assert "queue 'minilm'" in str(caught.value)
    assert "celery -A workers.app worker -Q minilm" in str(caught.value)


def test_a_slow_queue_is_a_time_out(fleet: LocalFleet, call: Client) -> None:
    fleet.hold()
    with pytest.raises(ResultTimeout, match="1 jobs wait in queue 'minilm'") as caught:
        call("embed", "x", timeout_s=0.01)
    assert not isinstance(caught.value, NoConsumer)
    assert caught.value.details["depth"] == 1


def test_a_full_queue_refuses_the_whole_call(fleet: LocalFleet, call: Client) -> None:
    with fleet.full_queues(), pytest.raises(QueueFull) as caught:
        call("embed", ["x"] * 500)
    assert caught.value.retry_after_s > 0
    assert (fleet.jobs, fleet.refused) == ([], 2)


def test_a_broker_that_is_down_is_named(fleet: LocalFleet, call: Client) -> None:
    with fleet.broker_down(), pytest.raises(BrokerUnavailable, match="Redis at memory"):
        call("embed", "x")


def test_a_job_past_its_deadline_is_dropped(call: Client) -> None:
    now = 1_000.0
    with testing.fleet(clock=lambda: now) as fleet:
        fleet.hold()
        job = fleet.client().submit("embed", ["x"], deadline_s=5)
        assert fleet.jobs[0].expires_at == 1_005.0
        now = 1_006.0
        fleet.release()
        with pytest.raises(DeadlineExceeded):
            job.result()
        assert job.state == "REVOKED"


def test_a_job_that_fails_as_a_whole_raises_its_error() -> None:
    def unavailable(*_: Any) -> list[Any]:
        raise ModelUnavailable("no weights; put them there", {"path": "/models"})

    with testing.fleet(unavailable) as fleet:
        with pytest.raises(ModelUnavailable, match="no weights") as caught:
            fleet.client().embed(["a", "b"])
        assert caught.value.details == {"path": "/models"}


def test_of_a_call_in_several_jobs_one_may_fail_alone() -> None:
    def picky(task: str, model: str, inputs: Any, params: Any) -> list[Any]:
        if "poison" in inputs:
            raise RuntimeError("boom")
        return [{"data": b"\x00" * 4} for _ in inputs]

    with testing.fleet(picky) as fleet:
        result = fleet.client().embed(["a"] * 256 + ["poison"] + ["b"])
        assert sorted(result.errors) == [256, 257]
        assert "RuntimeError: boom" in str(result.errors[256])
        with pytest.raises(InferenceFailed, match="boom"):
            fleet.client().embed(["poison"] * 2)


@pytest.mark.parametrize("values", [[], [{"data": b""}] * 3, [{"wrong": 1}], [{"data": 7}], [InvalidInput("no")]])
def test_an_answer_that_does_not_fit_is_an_error(values: list[Any]) -> None:
    with testing.fleet(lambda *_: values) as fleet, pytest.raises(CortexError):
        fleet.client().embed("x")


# ------------------------------------------------------------------------------------------------------- jobs


def test_a_job_goes_from_pending_to_its_result(fleet: LocalFleet) -> None:
    fleet.hold()
    job = fleet.client().submit("embed", ["a", "", "b"], "echo", lane="bulk", normalize=False)
    assert (job.state, job.done()) == ("PENDING", False)
    assert (fleet.jobs[0].id, fleet.jobs[0].params) == (job.id, {"normalize": False})
    with pytest.raises(ResultTimeout):
        job.result(timeout_s=0.01)
    fleet.release()
    result = job.result()
    assert [type(item).__name__ for item in result] == ["Embedding", "InvalidInput", "Embedding"]
    assert (job.state, job.done(), job.result() == result) == ("SUCCESS", True, True)
    assert job.cancel() is False


def test_a_cancelled_job_raises_at_once(fleet: LocalFleet) -> None:
    fleet.hold()
    job = fleet.client().submit("embed", "a")
    assert job.cancel() is True
    with pytest.raises(JobCancelled):
        job.result()
    assert (job.state, job.done(), fleet.revoked) == ("REVOKED", True, [job.id])
    assert job.cancel() is False


def test_asking_again_for_what_failed_does_not_lengthen_its_traceback(fleet: LocalFleet) -> None:
    fleet.hold()
    client = fleet.client()
    job = client.submit("embed", "a")
    job.cancel()
    refused = client.submit("embed", [""]).result()

    def depth(call: Callable[[], object]) -> int:
        with pytest.raises(CortexError) as caught:
            call()
        return len(caught.traceback)

    assert [depth(job.result) for _ in range(3)] == [depth(job.result)] * 3
    assert [depth(refused.values) for _ in range(3)] == [depth(refused.values)] * 3


def test_callers_who_find_redis_down_raise_an_error_each(fleet: LocalFleet) -> None:
    fleet.hold()
    link = fleet.client()._link()
    plan = link.core.plan("embed")
    link.replies.down = BrokerUnavailable("gone", {"url": "memory"})
    first, second = link.why_late(plan, 1.0), link.why_late(plan, 1.0)
    assert first is not second
    assert (str(first), first.details, type(second)) == ("gone", {"url": "memory"}, BrokerUnavailable)


def test_a_job_of_bad_inputs_only_never_travels(fleet: LocalFleet) -> None:
    job = fleet.client().submit("embed", ["", ""])
    assert (job.done(), job.state, len(job.result().errors), fleet.jobs) == (True, "SUCCESS", 2, [])
    assert job.cancel() is False


def test_a_job_takes_no_more_inputs_than_its_model(fleet: LocalFleet) -> None:
    with pytest.raises(InvalidInput, match=r"1,001 inputs.*map\(\)"):
        fleet.client().submit("embed", ["x"] * 1_001)


async def test_async_jobs_do_the_same(fleet: LocalFleet) -> None:
    fleet.hold()
    async with fleet.aclient() as client:
        job, other = await client.submit("embed", ["a"]), await client.submit("embed", ["b"])
        assert (await job.state(), job.done()) == ("PENDING", False)
        with pytest.raises(ResultTimeout):
            await job.result(timeout_s=0.01)
        assert await other.cancel() is True
        fleet.release()
        assert len(await job.result()) == 1
        assert (await job.state(), await other.state(), await job.cancel()) == ("SUCCESS", "REVOKED", False)
        with pytest.raises(JobCancelled):
            await other.result()
        refused = await client.submit("embed", [""])
        assert (refused.done(), await refused.state(), len(await refused.result())) == (True, "SUCCESS", 1)


async def test_a_cancelled_call_leaves_nothing_awaited(fleet: LocalFleet) -> None:
    fleet.hold()
    async with fleet.aclient() as client:
        call = asyncio.create_task(client.embed("x"))
        while not fleet.jobs:
            await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert len(client._link().replies._book) == 0
        fleet.release()
        assert (await client.embed("y")).dimensions == 8


async def test_an_async_client_belongs_to_one_loop(fleet: LocalFleet) -> None:
    client = fleet.aclient()
    await client.embed("x")
    with pytest.raises(RuntimeError, match="one event loop"):
        await asyncio.to_thread(lambda: asyncio.run(client.embed("x")))
    await client.aclose()


# ----------------------------------------------------------------------------------------------- construction


def test_a_url_that_is_none_is_a_configuration_error() -> None:
    for url in ("http://me:secret@host", "nonsense", "redis://me:secret@"):
        with pytest.raises(ConfigError) as caught:
            Cortex(url, fleet=echo_fleet())
        assert "secret" not in str(caught.value)


def test_the_environment_says_where_the_fleet_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORTEX_BROKER_URL", "redis://user:secret@from-env:6379/1")
    monkeypatch.setenv("CORTEX_RESULT_URL", "redis://results:6379/2")
    fleet = echo_fleet()
    assert repr(Cortex(fleet=fleet)) == "<Cortex redis://user:***@from-env:6379/1>"
    assert repr(AsyncCortex("redis://given:6379", fleet=fleet)) == "<AsyncCortex redis://given:6379>"


def test_a_url_alone_means_one_server(monkeypatch: pytest.MonkeyPatch) -> None:
    from cortex_tasks.client.core import resolve

    monkeypatch.setenv("CORTEX_RESULT_URL", "redis://results:6379/2")
    fleet = echo_fleet()
    assert resolve("redis://given:6379", None, fleet)[0].results == "redis://given:6379"
    assert resolve(None, None, fleet)[0].results == "redis://results:6379/2"
    two = Settings.model_validate({"broker_url": "redis://a:1", "result_url": "redis://b:2"})
    settings, _ = resolve("redis://c:3", two, fleet)
    assert (settings.broker, settings.results) == ("redis://c:3", "redis://b:2")


def test_the_default_fleet_is_the_one_of_queues_yaml(fleet: LocalFleet) -> None:
    assert isinstance(fleet.fleet, FleetConfig)
    assert {"minilm", "spacy", "prophet", "echo"} <= set(fleet.fleet.models)
    assert fleet.client().embed("x").model == "minilm"
