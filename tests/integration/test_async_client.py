"""``AsyncCortex`` against a real worker: many answers in flight on one event loop and one thread."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import redis
from celery import Celery

from cortex_tasks import (
    AsyncCortex,
    BrokerUnavailable,
    CortexError,
    DeadlineExceeded,
    Embedding,
    JobCancelled,
    NoConsumer,
    ResultTimeout,
)
from cortex_tasks.codec import loads, result_key
from cortex_tasks.config import FleetConfig
from cortex_tasks.echo import echo_vector
from tests.support.redis_server import RedisServer
from tests.support.worker_process import QUEUES_FILE, ROOT, WorkerProcess, forget_answers

pytestmark = pytest.mark.fleet

IN_FLIGHT = 64


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """While this file exists, forward passes of model gated wait."""
    return tmp_path_factory.mktemp("gate") / "gate"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis that keeps its data over a restart."""
    directory = tmp_path_factory.mktemp("redis")
    with RedisServer("--appendonly", "yes", "--appendfsync", "always", directory=directory) as server:
        yield server


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory, server: RedisServer, gate: Path) -> Iterator[WorkerProcess]:
    log = tmp_path_factory.mktemp("worker") / "worker.log"
    with WorkerProcess(server.url, log, env={"CORTEX_TEST_GATE": str(gate)}) as worker:
        yield worker


@pytest.fixture(autouse=True)
def _nothing_known(worker: WorkerProcess) -> None:
    forget_answers(worker.url)


@pytest.fixture
async def client(worker: WorkerProcess, echo_fleet: FleetConfig) -> AsyncIterator[AsyncCortex]:
    async with AsyncCortex(worker.url, fleet=echo_fleet) as client:
        yield client


@pytest.fixture
def closed(gate: Path) -> Iterator[Path]:
    """The gate, closed for a test's time."""
    gate.touch()
    yield gate
    gate.unlink(missing_ok=True)
    gate.with_suffix(".entered").unlink(missing_ok=True)


async def until(condition: Callable[[], object], what: str, timeout_s: float = 20.0) -> None:
    """Poll on the event loop; fails, saying ``what``, after a deadline."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {timeout_s} s: {what}"
        await asyncio.sleep(0.01)


def is_own(answer: Embedding | CortexError, text: str) -> bool:
    return isinstance(answer, Embedding) and bool(np.allclose(answer.vector, echo_vector(text), atol=1e-6))


async def test_many_in_flight_get_their_own_answers_on_one_thread(client: AsyncCortex) -> None:
    threads = threading.active_count()
    most_threads = 0
    crossed: list[str] = []

    async def ask_on(which: int) -> None:
        nonlocal most_threads
        for n in range(30):
            text = f"coroutine {which}, text {n}"
            if not is_own(await client.embed(text, model="echo"), text):
                crossed.append(text)
            most_threads = max(most_threads, threading.active_count())
        return crossed

    await asyncio.gather(*(ask_on(which) for which in range(IN_FLIGHT)))
    assert crossed == []
    assert most_threads == threads


async def test_jobs_in_flight_share_forward_passes(client: AsyncCortex) -> None:
    jobs = await asyncio.gather(*(client.submit("embed", f"text {n}", "slow") for n in range(IN_FLIGHT)))
    answers = [(await job.result()).timings.batch_items for job in jobs]
    assert max(answers) == 8, "the largest batch of model slow"


async def test_map_reads_an_async_source_only_as_far_as_it_must(client: AsyncCortex) -> None:
    read = 0

    async def source() -> AsyncIterator[str]:
        nonlocal read
        for read in range(1, 2_001):
            if read % 100 == 0:
                await asyncio.sleep(0)
            yield f"text {read}"

    threads, done = threading.active_count(), 0
    async for answer in client.map("embed", source(), "echo", chunk=10, window=8):
        done += 1
        assert is_own(answer, f"text {done}")
        # In flight (8 jobs), read ahead for the next two, handed out (this job): never the whole source.
        assert read - done <= 10 * (8 + 2 + 1)
    assert done == 2_000
    assert threading.active_count() == threads


async def test_map_gives_what_a_slow_source_gave_at_once(client: AsyncCortex) -> None:
    """The second text comes only after the first answer was seen."""
    seen = asyncio.Event()

    async def source() -> AsyncIterator[str]:
        yield "first"
        await asyncio.wait_for(seen.wait(), 20)
        yield "second"

    found = []
    async for answer in client.map("embed", source(), "echo"):
        found.append(answer)
        seen.set()
    assert [is_own(answer, text) for answer, text in zip(found, ("first", "second"), strict=True)] == [True, True]


async def test_a_cancelled_job_is_revoked(client: AsyncCortex, worker: WorkerProcess, closed: Path) -> None:
    # As many as a batch of model gated takes: the next one waits in the worker.
    held = [await client.submit("embed", f"held {n}", "gated") for n in range(4)]
    await until(closed.with_suffix(".entered").exists, "a forward pass at the gate")
    waits = [await client.submit("embed", f"waits {n}", "gated") for n in range(8)]
    assert await waits[-1].cancel()
    with pytest.raises(JobCancelled):
        await waits[-1].result()
    assert await waits[-1].state() == "REVOKED"
    # The worker was told as well: it stores no answer, but that the job was revoked.
    plain = Celery("plain", broker=worker.url, set_as_current=False)
    await until(lambda: waits[-1].id in str(plain.control.inspect(timeout=0.5).revoked()), "a worker that was told")
    with redis.Redis.from_url(worker.url) as stored:
        closed.unlink()
        assert all([(await job.result()).ok for job in (*held, *waits[:-1])])
        await until(lambda: stored.get(result_key(waits[-1].id)), "the worker's word on the cancelled job")
        assert loads(stored.get(result_key(waits[-1].id)))["status"] == "REVOKED"  # type: ignore[arg-type]


async def test_a_job_past_its_deadline_is_not_computed(client: AsyncCortex, closed: Path) -> None:
    held = [await client.submit("embed", f"held {n}", "gated") for n in range(4)]
    await until(closed.with_suffix(".entered").exists, "a forward pass at the gate")
    late = await client.submit("embed", "late", "gated", deadline_s=0.3)
    in_time = await client.submit("embed", "in time", "gated", deadline_s=60)
    deadline_s = time.time() + 0.4
    await until(lambda: time.time() > deadline_s, "the deadline")
    closed.unlink()
    with pytest.raises(DeadlineExceeded):
        await late.result()
    assert all([(await job.result()).ok for job in (*held, in_time)])


async def test_a_cancelled_coroutine_leaves_a_usable_client(client: AsyncCortex, closed: Path) -> None:
    waiting = asyncio.create_task(client.embed("given up", model="gated"))
    await until(closed.with_suffix(".entered").exists, "a forward pass at the gate")
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    closed.unlink()
    assert is_own(await client.embed("next", model="gated"), "next")


async def test_a_timeout_says_what_waits_and_the_job_goes_on(client: AsyncCortex, closed: Path) -> None:
    job = await client.submit("embed", "patience", "gated")
    await until(closed.with_suffix(".entered").exists, "a forward pass at the gate")
    with pytest.raises(ResultTimeout, match="the job itself goes on") as raised:
        await job.result(timeout_s=0.2)
    assert not isinstance(raised.value, NoConsumer)
    closed.unlink()
    assert is_own((await job.result())[0], "patience")


async def test_a_queue_without_a_worker_is_named(client: AsyncCortex) -> None:
    job = await client.submit("embed", "text", "orphan")
    assert await job.state() == "PENDING"
    with pytest.raises(NoConsumer, match="no worker consumes queue 'orphan'"):
        await job.result(timeout_s=0.2)


async def test_a_restart_of_redis_is_survived_by_those_who_wait(
    client: AsyncCortex, server: RedisServer, closed: Path
) -> None:
    texts = [f"over a restart {n}" for n in range(20)]
    waiting = asyncio.gather(*(client.embed(text, model="gated", timeout_s=60) for text in texts))
    await until(closed.with_suffix(".entered").exists, "a forward pass at the gate")
    await asyncio.to_thread(server.restart)
    closed.unlink()
    assert all(map(is_own, await waiting, texts))
    assert is_own(await client.embed("afterwards", model="echo"), "afterwards")


@pytest.mark.parametrize("silent", [False, True], ids=["refused", "silent"])
async def test_an_absent_redis_is_an_error_within_five_seconds(echo_fleet: FleetConfig, silent: bool) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if silent:
            listener.listen()
        port = listener.getsockname()[1]
        async with AsyncCortex(f"redis://:s3cret@127.0.0.1:{port}/0", fleet=echo_fleet) as client:
            async with asyncio.timeout(5):
                with pytest.raises(BrokerUnavailable) as raised:
                    await client.embed("text", model="echo")
    assert f"redis://:***@127.0.0.1:{port}/0" in str(raised.value)
    assert "s3cret" not in repr(raised.value)


async def test_a_stream_left_early_cancels_what_has_not_started(worker: WorkerProcess, echo_fleet: FleetConfig) -> None:
    """Also where the client is closed right after it."""

    def revoked() -> set[bytes]:
        keys = list(stored.scan_iter(result_key("*"), count=1_000))
        return {key for key, raw in zip(keys, stored.mget(keys), strict=True) if loads(raw)["status"] == "REVOKED"}

    with redis.Redis.from_url(worker.url) as stored:
        before = revoked()
        async with AsyncCortex(worker.url, fleet=echo_fleet) as client:
            async for _ in client.map("embed", (f"text {n}" for n in range(1_000)), "slow", chunk=1, window=512):
                break
        await until(lambda: revoked() - before, "jobs that the worker dropped")


#: Uses the client in every way, leaves maps early, and ends.
PROGRAM = """
import asyncio, pathlib, sys
from cortex_tasks import AsyncCortex, load_fleet

async def main(url, queues_file):
    async with AsyncCortex(url, fleet=load_fleet(pathlib.Path(queues_file))) as client:
        await asyncio.gather(*(client.embed(f"text {n}", model="echo") for n in range(64)))
        async for answer in client.map("embed", (f"text {n}" for n in range(5_000)), "echo", chunk=8):
            break
        await client.submit("embed", "nobody waits for this", "slow")
        async for answer in client.map("embed", (f"text {n}" for n in range(5_000)), "echo", chunk=8):
            break
    await client.embed("opened again", model="echo")
    await client.aclose()

asyncio.run(main(*sys.argv[1:]))
"""


def test_a_program_ends_without_a_warning(worker: WorkerProcess) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, worker.url, str(QUEUES_FILE)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
