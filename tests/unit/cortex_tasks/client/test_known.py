"""Clients whose cache knows some inputs: what is queued, what is answered, and what an interruption leaves behind."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from cortex_tasks import AsyncCortex, ClientClosed, Cortex, ModelUnavailable, testing
from cortex_tasks.cache import Shelf
from cortex_tasks.client.core import Core
from cortex_tasks.config import FleetConfig
from cortex_tasks.payloads import Embedding, Timings
from cortex_tasks.testing.wires import AsyncMemoryWire, MemoryWire
from tests.support.stub_models import PATIENCE_S

KNOWN = Embedding(data=b"1234", model="echo", revision="r", timings=Timings(cached="l2"))


class Knowing:
    """A cache that knows every text with "known" in it."""

    def __init__(self) -> None:
        self.shelf = Shelf(0, 1)
        self.looks: list[list[str]] = []
        self.forgotten: list[str] = []
        self.on_look: Callable[[], None] = lambda: None

    def nearby(self, question: Any, value: Any) -> None:
        return None

    def look_up(self, question: Any, values: Sequence[Any]) -> list[Any]:
        self.looks.append(list(values))
        self.on_look()
        return [KNOWN if "known" in value and "unknown" not in value else None for value in values]

    def forget(self, question: Any, values: Sequence[Any]) -> None:
        self.forgotten += values

    def close(self) -> None: ...


class AsyncKnowing(Knowing):
    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()
        self.gate.set()

    async def look_up(self, question: Any, values: Sequence[Any]) -> list[Any]:  # type: ignore[override]
        await self.gate.wait()
        return super().look_up(question, values)

    async def close(self) -> None: ...  # type: ignore[override]


@pytest.fixture
def fleet() -> Iterator[testing.LocalFleet]:
    with testing.fleet() as fleet:
        yield fleet


@pytest.fixture
def cache() -> Knowing:
    return Knowing()


@pytest.fixture
def client(fleet: testing.LocalFleet, cache: Any) -> Iterator[Cortex]:
    client = Cortex.__new__(Cortex)
    client._set_up(lambda: MemoryWire(fleet), lambda: Core(cached(fleet.fleet), 5.0), "memory", lambda: cache)
    with client:
        yield client


def cached(config: FleetConfig) -> FleetConfig:
    """The same with answers cached, which those of the echo adapter are not by themselves."""
    models = {alias: model.model_copy(update={"cache": "always"}) for alias, model in config.models.items()}
    return config.model_copy(update={"models": models})


def queued(fleet: testing.LocalFleet) -> list[str]:
    return [text for job in fleet.jobs for text in job.inputs]


def test_only_what_is_unknown_is_queued(client: Cortex, fleet: testing.LocalFleet, cache: Knowing) -> None:
    texts = ["known 1", "unknown 1", "", "known 2", "unknown 2"]
    found = client.embed(texts, model="echo")
    assert queued(fleet) == ["unknown 1", "unknown 2"]
    assert [item is KNOWN for item in found] == [True, False, False, True, False]
    assert list(found.errors) == [2]
    assert cache.looks == [["known 1", "unknown 1", "known 2", "unknown 2"]]


def test_a_map_asks_for_many_at_once_and_keeps_the_order(
    client: Cortex, fleet: testing.LocalFleet, cache: Knowing
) -> None:
    texts = [f"{'unknown' if n % 10 == 0 else 'known'} {n}" for n in range(1000)]
    found = list(client.map("embed", texts, "echo", errors="raise"))
    assert [item is KNOWN for item in found] == [n % 10 != 0 for n in range(1000)]
    assert queued(fleet) == texts[::10]
    assert len(cache.looks) <= 4
    assert len(fleet.jobs) <= 4


def test_a_call_that_is_wholly_known_queues_nothing(client: Cortex, fleet: testing.LocalFleet) -> None:
    result = client.embed(["known 1", "known 2"], model="echo")
    assert (result.model, result.revision, result.timings.cached) == ("echo", "r", "l2")
    job = client.submit("embed", "known", "echo")
    assert job.done()
    assert job.state == "SUCCESS"
    assert job.result()[0] is KNOWN
    assert client.embed("known", model="echo") is KNOWN
    assert fleet.jobs == []


def test_off_does_not_ask_and_refresh_forgets(client: Cortex, fleet: testing.LocalFleet, cache: Knowing) -> None:
    client.embed("known", model="echo", cache="off")
    client.embed("known", model="echo", cache="refresh")
    assert [job.cache for job in fleet.jobs] == ["off", "refresh"]
    assert cache.looks == []
    assert cache.forgotten == ["known"]


def test_known_inputs_are_given_although_the_job_of_the_others_failed(cache: Knowing) -> None:
    def gone(*_: Any) -> Any:
        raise ModelUnavailable("gone")

    with testing.fleet(gone) as fleet:
        client = Cortex.__new__(Cortex)
        core = Core(cached(fleet.fleet), 5.0)
        client._set_up(lambda: MemoryWire(fleet), lambda: core, "memory", lambda: cache)  # type: ignore[arg-type,return-value]
        with client:
            found = client.embed(["known", "unknown"], model="echo")
            assert found[0] is KNOWN
            assert isinstance(found[1], ModelUnavailable)
            with pytest.raises(ModelUnavailable):
                client.embed(["unknown", "unknown too"], model="echo")


def test_threads_share_a_look_and_each_gets_its_own(client: Cortex, fleet: testing.LocalFleet) -> None:
    with ThreadPoolExecutor(8) as threads:
        texts = [f"{'known' if n % 2 else 'unknown'} {n}" for n in range(100)]
        found = list(threads.map(lambda text: client.embed(text, model="echo"), texts))
    assert [item is KNOWN for item in found] == [n % 2 == 1 for n in range(100)]
    assert sorted(queued(fleet)) == sorted(texts[::2])


def test_ctrl_c_during_a_look_leaves_other_threads_with_their_answers(client: Cortex, cache: Knowing) -> None:
    looking, go_on = threading.Event(), threading.Event()

    def interrupted() -> None:
        cache.on_look = lambda: None
        looking.set()
        assert go_on.wait(PATIENCE_S)
        raise KeyboardInterrupt

    cache.on_look = interrupted
    with ThreadPoolExecutor(3) as threads:
        first = threads.submit(client.embed, "unknown 1", model="echo")
        assert looking.wait(PATIENCE_S)
        others = [threads.submit(client.embed, f"unknown {n}", model="echo") for n in (2, 3)]
        go_on.set()
        with pytest.raises(KeyboardInterrupt):
            first.result(PATIENCE_S)
        assert all(isinstance(other.result(PATIENCE_S), Embedding) for other in others)


async def test_coroutines_share_a_look_and_closing_during_it_tells_them(fleet: testing.LocalFleet) -> None:
    cache: Any = AsyncKnowing()
    client = AsyncCortex.__new__(AsyncCortex)
    client._set_up(lambda: AsyncMemoryWire(fleet), lambda: Core(cached(fleet.fleet), 5.0), "memory", lambda: cache)
    texts = [f"{'known' if n % 2 else 'unknown'} {n}" for n in range(20)]
    found = await asyncio.gather(*(client.embed(text, model="echo") for text in texts))
    assert [item is KNOWN for item in found] == [n % 2 == 1 for n in range(20)]
    assert cache.looks == [texts]
    cache.gate.clear()
    waiting = [asyncio.create_task(client.embed(text, model="echo")) for text in texts]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    await client.aclose()
    ended = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(error, ClientClosed) for error in ended)
