"""Cortex's tasks as Celery's own: signatures, canvas, callbacks, revocation, foreign apps, eager mode, absent parts."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import redis
from celery import Celery, Task, chain, chord, current_app, group
from celery.exceptions import TaskRevokedError
from celery.exceptions import TimeoutError as CeleryTimeoutError

from cortex_tasks import (
    BrokerUnavailable,
    Cortex,
    Embedding,
    InferenceFailed,
    InvalidInput,
    NoConsumer,
    RequestError,
    UnknownModel,
    parse,
)
from cortex_tasks.app import make_app
from cortex_tasks.config import FleetConfig
from cortex_tasks.echo import echo_vector
from cortex_tasks.settings import Settings
from cortex_tasks.tasks import register
from tests.support.redis_server import RedisServer
from tests.support.worker_process import QUEUES_FILE, ROOT, WorkerProcess, forget_answers, poll_until

pytestmark = pytest.mark.fleet

#: An address at which nobody listens.
NOWHERE = "redis://127.0.0.1:1/0"


class Bench(NamedTuple):
    """A worker that also knows a user's tasks, Cortex's tasks, and a user's app."""

    url: str
    embed: Task
    classify: Task
    #: A plain app of the user; its tasks (tests.support.extra_tasks) run in the same worker.
    own: Celery
    redis: Any
    gate: Path

    def mine(self, name: str, *args: Any) -> Any:
        return self.own.signature(f"tests.{name}", args=args, queue="echo")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, echo_fleet: FleetConfig) -> Iterator[Bench]:
    directory = tmp_path_factory.mktemp("native")
    gate = directory / "gate"
    with (
        RedisServer(directory=directory) as server,
        WorkerProcess(
            server.url,
            directory / "worker.log",
            env={"CORTEX_TEST_GATE": str(gate)},
            arguments=("-I", "tests.support.extra_tasks"),
        ),
        Celery("own", broker=server.url, backend=server.url, set_as_current=False) as own,
        redis.Redis.from_url(server.url) as client,
    ):
        tasks = native_tasks(server.url, echo_fleet)
        yield Bench(server.url, tasks["embed"], tasks["classify"], own, client, gate)
        tasks["embed"].app.close()


def native_tasks(url: str, fleet: FleetConfig) -> dict[str, Task]:
    settings = Settings.model_validate({"broker_url": url})
    return register(make_app(settings, fleet, fail_fast=True), settings, fleet)


@pytest.fixture(autouse=True)
def _nothing_known(bench: Bench) -> None:
    forget_answers(bench.url)


@pytest.fixture
def held(bench: Bench) -> Iterator[list[Any]]:
    """Model gated busy with as many jobs as a batch takes: the next ones wait. Ends when the gate is opened."""
    bench.gate.touch()
    jobs = [bench.embed.delay([f"held {n}"], model="gated") for n in range(4)]
    poll_until(bench.gate.with_suffix(".entered").exists, "a forward pass at the gate")
    yield jobs
    bench.gate.unlink(missing_ok=True)
    bench.gate.with_suffix(".entered").unlink(missing_ok=True)
    assert all(owns(job.get(timeout=20), f"held {n}") for n, job in enumerate(jobs))


def owns(answer: Any, *texts: str) -> bool:
    """Whether an answer holds the embeddings of these texts, in this order."""
    values = parse(answer).values()
    return [value.vector.tolist() for value in values] == [pytest.approx(echo_vector(text)) for text in texts]


# -------------------------------------------------------------------------------------------------- a program

#: A user's program: its own app is the current one, and stays that.
PROGRAM = """
from celery import Celery, current_app, shared_task
from celery.result import AsyncResult
import os

own = Celery("own", broker=os.environ["CORTEX_BROKER_URL"], backend=os.environ["CORTEX_BROKER_URL"])
own.conf.task_default_queue = "own"
own.conf.task_always_eager = True

@shared_task
def length(text):
    return len(text)

from cortex_tasks import parse
from cortex_tasks.echo import echo_vector
from cortex_tasks.tasks import embed

sent = embed.delay(inputs=["one", "two"], model="echo")
assert max(abs(parse(sent.get(timeout=20)).values()[1].vector - echo_vector("two"))) < 1e-6
assert current_app._get_current_object() is own
assert length.delay("four").get() == 4
assert embed.app is not own and "cortex.embed" not in own.tasks
assert AsyncResult(sent.id, app=own).get(timeout=20)["model"] == "echo"
assert own.AsyncResult(sent.id).state == "SUCCESS"
"""


#: A program that knows nothing of Cortex.
READER = """
import sys
from celery import Celery

url, job_id = sys.argv[1:]
answer = Celery(broker=url, backend=url).AsyncResult(job_id).get(timeout=20)
print([len(item["value"]["data"]) for item in answer["items"]])
"""


def test_a_programs_own_app_stays_what_it_is(bench: Bench) -> None:
    env = {"CORTEX_BROKER_URL": bench.url, "CORTEX_QUEUES_FILE": str(QUEUES_FILE)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------------------ results


def test_a_result_has_celerys_life(bench: Bench, held: list[Any]) -> None:
    waits = bench.embed.delay(["a text"], model="gated")
    assert not waits.ready()
    assert waits.state == "PENDING"
    bench.gate.unlink()
    assert owns(waits.get(timeout=20), "a text")
    assert (waits.state, waits.successful()) == ("SUCCESS", True)
    waits.forget()
    assert waits.state == "PENDING"


def test_any_app_reads_the_answer_as_json(bench: Bench) -> None:
    sent = bench.embed.delay(["one", "two"], model="echo")
    answer = bench.own.AsyncResult(sent.id).get(timeout=20)
    assert owns(answer, "one", "two")
    assert answer["timings"]["queue_ms"] > 0


def test_any_program_beside_cortex_reads_what_a_client_asked_for(
    bench: Bench, echo_fleet: FleetConfig, tmp_path: Path
) -> None:
    # As the package's installation would: these tests run from the source tree.
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]
    info = tmp_path / "beside-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: beside\nVersion: 1\n")
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()) for group, points in declared.items()]
    (info / "entry_points.txt").write_text("".join(lines))
    with Cortex(bench.url, fleet=echo_fleet) as cortex:
        job = cortex.submit("embed", ["one", "two"], "echo")
        assert owns(bench.own.AsyncResult(job.id).get(timeout=20), "one", "two")
    done = subprocess.run(
        [sys.executable, "-c", READER, bench.url, job.id],
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.strip() == f"[{4 * 8}, {4 * 8}]", done.stderr


def test_a_bad_input_is_refused_here_or_by_the_worker(bench: Bench) -> None:
    """Cortex's own task looks before it sends, an app that knows but the name cannot."""
    with pytest.raises(InvalidInput, match="input 1"):
        bench.embed.delay(["one", "", "three"], model="echo")
    sent = bench.own.send_task("cortex.embed", kwargs={"inputs": ["one", "", 3], "model": "echo"}, queue="echo")
    answer = parse(sent.get(timeout=20))
    assert isinstance(answer[0], Embedding)
    assert [type(error) for error in answer[1:]] == [InvalidInput, InvalidInput]


def test_failures_keep_their_type(bench: Bench) -> None:
    """Sent by an app that checks nothing, read by it and by Cortex's own."""
    sent = bench.own.send_task("cortex.embed", kwargs={"inputs": ["a"], "model": "ecoh"}, queue="echo")
    for result in (sent, bench.embed.AsyncResult(sent.id)):
        with pytest.raises(UnknownModel, match="did you mean 'echo'") as raised:
            result.get(timeout=20)
        assert raised.value.details == {"model": "ecoh"}
    partly = parse(bench.embed.delay(["fine", "[[echo:fail]]"], model="echo").get(timeout=20))
    assert isinstance(partly[0], Embedding)
    assert isinstance(partly[1], InferenceFailed)


# ------------------------------------------------------------------------------------------------------- canvas


def test_groups_of_jobs_and_of_chains(bench: Bench) -> None:
    texts = [f"text {n}" for n in range(30)]
    answers = group(bench.embed.s([text], model="echo") for text in texts)().get(timeout=20, interval=0.02)
    assert all(map(owns, answers, texts))
    both = group(
        bench.embed.s(["beside"], model="echo"),
        chain(bench.mine("same", ["inner"]), bench.embed.s(model="echo")),
    )
    assert all(map(owns, both().get(timeout=20, interval=0.02), ("beside", "inner")))


def test_a_users_app_may_have_the_tasks_beside_its_own(bench: Bench, echo_fleet: FleetConfig) -> None:
    embed = register(bench.own, Settings.model_validate({"broker_url": bench.url}), echo_fleet)["embed"]
    mixed = group(embed.s(["a text"], model="echo"), bench.mine("same", "a user's own"), embed.s("b", model="slow"))
    first, own, last = mixed().get(timeout=20, interval=0.02)
    assert owns(first, "a text")
    assert own == "a user's own"
    assert owns(last, "b")
    header = [embed.s(["c", "d"], model="echo"), chain(bench.mine("same", ["e"]), embed.s(model="echo"))]
    assert chord(header, app=bench.own)(bench.mine("total_items")).get(timeout=20) == 3
    assert embed.app is bench.own
    assert bench.embed.app is not bench.own


def test_a_chain_goes_through_a_users_tasks_and_back(bench: Bench) -> None:
    """The worker sends the later links: they find their queues by their models."""
    linked = chain(
        bench.mine("same", ["one", "two"]),
        bench.embed.s(model="slow"),
        bench.mine("count_items"),
        bench.embed.si(["the end"], model="gated"),
    )()
    assert owns(linked.get(timeout=20), "the end")
    assert linked.parent.get(timeout=20) == 2
    assert owns(linked.parent.parent.get(timeout=20), "one", "two")


def test_a_chain_ends_at_a_failure(bench: Bench) -> None:
    unknown = bench.own.signature("cortex.embed", kwargs={"model": "ecoh"}, queue="echo")
    linked = chain(bench.mine("same", "a text"), unknown, bench.mine("note", "chain:after"))()
    with pytest.raises(UnknownModel):
        linked.parent.get(timeout=20)
    with pytest.raises(UnknownModel):
        linked.get(timeout=20)
    assert bench.redis.llen("chain:after") == 0


def test_chords_before_and_behind(bench: Bench) -> None:
    header = [bench.embed.s([f"part {n}", "and another"], model="echo") for n in range(8)]
    assert chord(header)(bench.mine("total_items")).get(timeout=20) == 16
    texts = [bench.mine("same", f"text {n}") for n in range(5)]
    joined = chord(texts, app=bench.own)(bench.embed.s(model="echo"))
    assert owns(joined.get(timeout=20), *(f"text {n}" for n in range(5)))


def test_callbacks_of_success_and_failure(bench: Bench) -> None:
    sent = bench.embed.apply_async((["a"],), {"model": "echo"}, link=bench.mine("note", "native:ok"))
    assert owns(sent.get(timeout=20), "a")
    poll_until(lambda: bench.redis.llen("native:ok") == 1, "the success callback")
    failed = bench.embed.apply_async((["a"],), {"model": "absent"}, link_error=bench.mine("note_error", "native:bad"))
    poll_until(lambda: bench.redis.lrange("native:bad", 0, -1) == [failed.id.encode()], "the failure callback")


# --------------------------------------------------------------------------------------------- jobs that do not run


def test_a_waiting_job_can_be_revoked_and_another_expires(bench: Bench, held: list[Any]) -> None:
    revoked = bench.embed.delay(["never"], model="gated")
    late = bench.embed.apply_async((["late"],), {"model": "gated"}, expires=0.3)
    waits = bench.embed.apply_async((["waits"],), {"model": "gated"}, expires=60)
    revoked.revoke(wait=True, timeout=1)
    deadline_s = time.time() + 0.4
    poll_until(lambda: time.time() > deadline_s, "the deadline")
    bench.gate.unlink()
    with pytest.raises(TaskRevokedError, match="revoked"):
        revoked.get(timeout=20)
    with pytest.raises(TaskRevokedError, match="expired"):
        late.get(timeout=20)
    assert owns(waits.get(timeout=20), "waits")


def test_a_countdown_is_kept(bench: Bench) -> None:
    before = time.time()
    assert owns(bench.embed.apply_async((["later"],), {"model": "echo"}, countdown=1).get(timeout=20), "later")
    assert time.time() - before >= 1


# ------------------------------------------------------------------------------------------------------ eager mode


def test_cortexs_own_tasks_do_not_run_eagerly(echo_fleet: FleetConfig) -> None:
    embed = native_tasks(NOWHERE, echo_fleet)["embed"]
    embed.app.conf.task_always_eager = True
    result = embed.delay(["text"], model="echo")
    with pytest.raises(RequestError, match=r"without task_always_eager; .* cortex_tasks\.testing"):
        result.get()


def test_the_workers_app_computes_eagerly(echo_fleet: FleetConfig) -> None:
    from workers.app import build

    app = build(Settings.model_validate({"broker_url": NOWHERE}), echo_fleet)
    app.conf.task_always_eager = True
    embed = app.tasks["cortex.embed"]
    answer = embed.delay(["one", "", "three"], model="echo").get()
    assert isinstance(parse(answer)[1], InvalidInput)
    assert owns(embed.delay("alone", model="echo").get(), "alone")
    with pytest.raises(UnknownModel):
        embed.delay(["one"], model="ecoh").get()


# ---------------------------------------------------------------------------------------------------- what is absent


def test_a_job_of_a_queue_without_a_worker_waits_for_one(
    bench: Bench, echo_fleet: FleetConfig, worker_log: Path
) -> None:
    native = bench.embed.delay(["patient"], model="orphan")
    with Cortex(bench.url, fleet=echo_fleet) as cortex:
        job = cortex.submit("embed", "patient too", "orphan")
        with pytest.raises(NoConsumer, match="no worker consumes queue 'orphan'") as raised:
            job.result(timeout_s=0.2)
        assert raised.value.details["depth"] == 2
        with pytest.raises(CeleryTimeoutError):
            native.get(timeout=0.2)
        with WorkerProcess(bench.url, worker_log, queues="orphan"):
            assert owns(native.get(timeout=20), "patient")
            assert isinstance(job.result()[0], Embedding)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("silent", [False, True], ids=["refused", "silent"])
@pytest.mark.parametrize("client", ["native", "cortex"])
def test_an_absent_redis_is_an_error_within_five_seconds(echo_fleet: FleetConfig, client: str, silent: bool) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if silent:
            listener.listen()
        at = f"127.0.0.1:{listener.getsockname()[1]}/0"
        url = f"redis://me:s3cret@{at}"
        embed = (
            native_tasks(url, echo_fleet)["embed"].delay if client == "native" else Cortex(url, fleet=echo_fleet).embed
        )
        began = time.monotonic()
        with pytest.raises(BrokerUnavailable) as raised:
            embed("text", model="echo")
        assert time.monotonic() - began < 5
    assert f"redis://me:***@{at}" in str(raised.value)
    assert "s3cret" not in repr(raised.value)


def test_nothing_here_became_the_current_app(bench: Bench) -> None:
    assert current_app._get_current_object() not in (bench.own, bench.embed.app)
