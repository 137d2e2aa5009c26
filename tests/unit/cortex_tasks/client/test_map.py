"""map: in order, bounded, lazy, patient with full queues, and tidy when it is left early."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from typing import Any

import pytest

from cortex_tasks import (
    InferenceFailed,
    InvalidInput,
    InvalidParameter,
    NoConsumer,
    ResultTimeout,
    UnknownTask,
    testing,
)
from cortex_tasks.book import ThreadTicket
from cortex_tasks.client.core import Core
from cortex_tasks.client.map import Window
from cortex_tasks.client.progress import Progress
from cortex_tasks.config import FleetConfig
from cortex_tasks.echo import FAIL, echo_vector
from cortex_tasks.testing import LocalFleet, echo_fleet
from tests.support.worker_process import poll_until


@pytest.fixture
def fleet() -> Iterator[LocalFleet]:
    with testing.fleet() as fleet:
        yield fleet


def limited(jobs: int) -> FleetConfig:
    """The echo fleet, whose queue takes so many jobs."""
    raw = echo_fleet().model_dump(mode="json")
    raw["models"]["echo"]["limits"]["queue_jobs"] = jobs
    return FleetConfig.model_validate(raw)


class Source:
    """Texts, and how many of them were taken."""

    def __init__(self, count: int) -> None:
        self._count, self.taken = count, 0

    def __iter__(self) -> Iterator[str]:
        for number in range(self._count):
            self.taken += 1
            yield f"text {number}"


def test_ten_thousand_inputs_in_order_and_bounded(fleet: LocalFleet) -> None:
    source, waiting = Source(10_000), 0
    seen = []
    for number, item in enumerate(fleet.client().map("embed", source, "echo", chunk=10, window=8)):
        assert item.vector.tolist() == pytest.approx(echo_vector(f"text {number}"))
        waiting = max(waiting, source.taken - number)
        seen.append(item)
    assert len(seen) == 10_000
    assert waiting <= 10 * 8
    assert {len(job.inputs) for job in fleet.jobs} == {10}
    assert {job.lane for job in fleet.jobs} == {"bulk"}


def test_nothing_is_read_before_the_first_answer_is_asked_for(fleet: LocalFleet) -> None:
    source = Source(10)
    stream = fleet.client().map("embed", source)
    assert (source.taken, fleet.jobs) == (0, [])
    assert len(list(stream)) == 10


def test_bad_inputs_and_failures_keep_their_places(fleet: LocalFleet) -> None:
    texts = ["a", "", FAIL, "b", *[""] * 10, "c"]
    items = list(fleet.client().map("embed", texts, "echo", chunk=2))
    kinds = ["Embedding", "InvalidInput", "InferenceFailed", "Embedding", *["InvalidInput"] * 10, "Embedding"]
    assert [type(item).__name__ for item in items] == kinds


def test_errors_may_be_raised_and_then_the_rest_is_cancelled(fleet: LocalFleet) -> None:
    fleet.hold()
    stream = fleet.client().map("embed", ["a", FAIL, *["b"] * 100], "echo", chunk=1, window=4, errors="raise")
    asked = threading.Thread(target=lambda: poll_until(lambda: len(fleet._waiting) == 4, "a full window"))
    asked.start()
    threading.Thread(target=lambda: (asked.join(), fleet.release(), fleet.hold())).start()
    next(stream)
    with pytest.raises(InferenceFailed):
        next(stream)
    assert list(stream) == []
    assert len(fleet.jobs) < 100


def test_the_window_is_filled_before_any_answer_is_waited_for(fleet: LocalFleet) -> None:
    fleet.hold()
    with pytest.raises(ResultTimeout):
        next(fleet.client().map("embed", Source(1_000), "echo", chunk=1, window=40, timeout_s=0.01))
    assert len(fleet.jobs) == 40


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"chunk": 0}, "chunk must be"),
        ({"chunk": 1_001}, "over the model's limit of 1,000"),
        ({"window": 1.5}, "window must be"),
        ({"errors": "ignore"}, "errors must be"),
        ({"normalise": True}, "did you mean"),
    ],
)
def test_a_wrong_call_fails_at_the_call(fleet: LocalFleet, options: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidParameter, match=said):
        fleet.client().map("embed", ["a"], **options)
    with pytest.raises(UnknownTask):
        fleet.client().map("embedd", ["a"])


def test_leaving_early_cancels_what_has_not_started_in_one_broadcast(fleet: LocalFleet) -> None:
    stream = fleet.client().map("embed", Source(1_000), "echo", chunk=1, window=8)
    next(stream)
    fleet.hold()
    while len(fleet._waiting) == 0:
        next(stream)
    waiting = [job.id for job in fleet._waiting]
    stream.close()  # type: ignore[attr-defined]
    # And perhaps some whose answer was already on its way.
    assert set(waiting) <= set(fleet.revoked)
    assert fleet._waiting == []
    assert len(fleet.jobs) < 100


def test_a_stream_cancels_nothing_of_another_link(fleet: LocalFleet) -> None:
    """A forked child that leaves the loop body, or a client that was closed meanwhile: these jobs are not its own."""
    client = fleet.client()
    stream = client.map("embed", Source(1_000), "echo", chunk=1, window=8)
    next(stream)
    fleet.hold()
    while len(fleet._waiting) == 0:
        next(stream)
    client._after_fork()
    assert client._link() is not None
    stream.close()  # type: ignore[attr-defined]
    assert fleet.revoked == []


def test_an_error_of_the_source_comes_behind_the_answers_before_it(fleet: LocalFleet) -> None:
    class Broken:
        """Unlike a generator it would go on."""

        def __init__(self) -> None:
            self.count = 0

        def __iter__(self) -> Iterator[str]:
            return self

        def __next__(self) -> str:
            self.count += 1
            if self.count == 101:
                raise OSError("disk")
            return f"text {self.count}"

    found: list[Any] = []
    with pytest.raises(OSError, match="disk"):
        found.extend(fleet.client().map("embed", Broken(), chunk=8))
    assert len(found) == 100
    assert sum(len(job.inputs) for job in fleet.jobs) == 100


def test_nobody_there_to_answer_is_said(fleet: LocalFleet) -> None:
    with fleet.without_workers(), pytest.raises(NoConsumer):
        list(fleet.client().map("embed", ["a"], timeout_s=0.01))
    assert fleet.revoked == [fleet.jobs[0].id]


def test_a_full_queue_is_waited_for() -> None:
    with testing.fleet(fleet=limited(3)) as fleet:
        client = fleet.client()
        fleet.hold()
        blocked = [client.submit("embed", ["x"], "echo") for _ in range(3)]

        def free() -> None:
            poll_until(lambda: fleet.refused, "a refusal")
            fleet.release()

        threading.Thread(target=free).start()
        items = list(client.map("embed", Source(20), "echo", chunk=1, window=8))
    assert [item.vector[0] for item in items] == [pytest.approx(echo_vector(f"text {n}")[0]) for n in range(20)]
    assert len(fleet.jobs) == len(blocked) + 20


def test_a_window_pushes_a_part_and_keeps_the_rest() -> None:
    now = 0.0
    core = Core(limited(10), 5.0)
    flow = Window(core.plan("embed", model="echo"), ThreadTicket, chunk=1, window=8, errors="return", clock=lambda: now)
    assert flow.wants()
    for text in "abcd":
        flow.add([text])
    first = list(flow.unsent())
    assert len(first) == 4
    flow.pushed(3)
    flow.full(2.0)
    assert flow.unsent() == []
    assert flow.unfinished() == [chunk.draft.id for chunk in first[:3]]
    now = 2.5
    assert flow.unsent() == first[3:]
    # It may have arrived when the push is interrupted.
    assert flow.unfinished() == [chunk.draft.id for chunk in first]


def test_a_slow_source_is_published_as_it_comes() -> None:
    now = 0.0

    def slow() -> Iterator[str]:
        nonlocal now
        for number in range(100):
            now += 1.0
            yield str(number)

    core = Core(echo_fleet(), 5.0)
    flow = Window(
        core.plan("embed", model="echo"), ThreadTicket, chunk=50, window=8, errors="return", clock=lambda: now
    )
    flow.read(slow())
    assert [chunk.order.count for chunk in flow.chunks] == [1]


# ----------------------------------------------------------------------------------------------------- asyncio


async def test_async_map_over_a_plain_iterable(fleet: LocalFleet) -> None:
    source, count = Source(5_000), 0
    async with fleet.aclient() as client:
        async for item in client.map("embed", source, "echo", chunk=10, window=8):
            assert item.vector.tolist() == pytest.approx(echo_vector(f"text {count}"))
            count += 1
            assert source.taken - count <= 10 * 8 + 10 * 2 + 1
    assert count == 5_000


async def test_async_map_answers_while_its_source_is_still_open(fleet: LocalFleet) -> None:
    gate: asyncio.Queue[str | None] = asyncio.Queue()

    async def source() -> AsyncIterator[str]:
        while (text := await gate.get()) is not None:
            yield text

    async with fleet.aclient() as client:
        stream = client.map("embed", source(), "echo")
        for number in range(3):
            gate.put_nowait(f"text {number}")
            item = await anext(stream)
            assert item.vector.tolist() == pytest.approx(echo_vector(f"text {number}"))
        gate.put_nowait(None)
        assert [item async for item in stream] == []


async def test_async_map_bundles_what_is_there(fleet: LocalFleet) -> None:
    async def source() -> AsyncIterator[str]:
        for number in range(1_000):
            yield str(number)

    async with fleet.aclient() as client:
        assert len([item async for item in client.map("embed", source(), "echo", chunk=50)]) == 1_000
    assert len(fleet.jobs) < 100


@pytest.mark.parametrize("error", [OSError("disk"), asyncio.CancelledError("its own helper was cancelled")])
async def test_async_map_raises_its_sources_error_at_its_place(fleet: LocalFleet, error: BaseException) -> None:
    async def broken() -> AsyncIterator[str]:
        for number in range(100):
            yield f"text {number}"
        raise error

    found: list[Any] = []

    async def read(stream: AsyncIterator[Any]) -> None:
        async for item in stream:
            found.append(item)

    async with fleet.aclient() as client:
        with pytest.raises(type(error)):
            await read(client.map("embed", broken(), chunk=8))
    assert len(found) == 100


async def test_async_map_ends_chunks_of_long_texts_early(fleet: LocalFleet) -> None:
    async def source() -> AsyncIterator[str]:
        for number in range(64):
            yield f"{number} " + "x" * 9_000

    async with fleet.aclient() as client:
        assert len([item async for item in client.map("embed", source(), "echo")]) == 64
    assert max(len(job.inputs) for job in fleet.jobs) == 8


@pytest.mark.parametrize("leave", ["at once", "cancelled in between"])
async def test_a_source_that_swallows_a_cancellation_ends_all_the_same(
    fleet: LocalFleet, monkeypatch: pytest.MonkeyPatch, leave: str
) -> None:
    ended = asyncio.Event()

    async def source() -> AsyncIterator[str]:
        yield "a"
        try:
            with suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with fleet.aclient() as client:
        stream = client.map("embed", source(), "echo")
        await anext(stream)
        link = client._link()

        async def cancelled(*_: object) -> None:
            raise asyncio.CancelledError

        if leave == "cancelled in between":
            monkeypatch.setattr(link, "leave", cancelled)
        with suppress(asyncio.CancelledError):
            await asyncio.wait_for(stream.aclose(), 10)  # type: ignore[attr-defined]
        assert ended.is_set()


async def test_leaving_an_async_map_cancels_what_has_not_started(fleet: LocalFleet) -> None:
    async with fleet.aclient() as client:
        stream = client.map("embed", Source(1_000), "echo", chunk=1, window=8)
        await anext(stream)
        fleet.hold()
        while not fleet._waiting:
            await anext(stream)
        waiting = [job.id for job in fleet._waiting]
        await stream.aclose()  # type: ignore[attr-defined]
        assert set(waiting) <= set(fleet.revoked)


async def test_async_map_times_out_and_waits_for_room() -> None:
    with testing.fleet(fleet=limited(3)) as fleet:
        async with fleet.aclient() as client:
            fleet.hold()
            with pytest.raises(ResultTimeout):
                [item async for item in client.map("embed", Source(20), "echo", chunk=1, timeout_s=0.02)]
            fleet.release()
            items = [item async for item in client.map("embed", Source(20), "echo", chunk=1, window=8)]
            assert len(items) == 20


async def test_async_map_keeps_bad_inputs_in_their_places(fleet: LocalFleet) -> None:
    async with fleet.aclient() as client:
        items = [item async for item in client.map("embed", ["", "a", "", ""], "echo", chunk=2)]
    assert [isinstance(item, InvalidInput) for item in items] == [True, False, True, True]


# ---------------------------------------------------------------------------------------------------- progress


def test_progress_is_one_line_that_says_how_far_and_how_fast() -> None:
    now, out = 0.0, io.StringIO()
    progress = Progress("embed", 2_000, out, clock=lambda: now)
    progress.add(1)
    assert out.getvalue() == ""
    now = 0.5
    progress.add(999)
    now = 1.0
    progress.add(1_000)
    progress.close()
    lines = [line.removesuffix("\x1b[K") for line in out.getvalue().rstrip("\n").split("\r")[1:]]
    assert lines == ["embed 1,000 of 2,000 (50%), 2,000/s", *["embed 2,000 of 2,000 (100%), 2,000/s"] * 2]


def test_progress_shows_only_on_a_terminal_unless_asked_for(
    fleet: LocalFleet, capsys: pytest.CaptureFixture[str]
) -> None:
    list(fleet.client().map("embed", ["a"]))
    assert capsys.readouterr().err == ""
    list(fleet.client().map("embed", iter(["a"]), progress=True))
    assert capsys.readouterr().err.startswith("\rembed 1, ")


@pytest.mark.parametrize("wanted", [None, True, False])
def test_a_program_without_stderr_is_shown_no_progress(
    fleet: LocalFleet, monkeypatch: pytest.MonkeyPatch, wanted: bool | None
) -> None:
    monkeypatch.setattr("sys.stderr", None)
    assert len(list(fleet.client().map("embed", ["a"], progress=wanted))) == 1
