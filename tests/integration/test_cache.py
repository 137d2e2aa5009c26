"""The result cache with real clients, workers and Redis: hits, single flight, changes of revision, purges, failures."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import pytest
import redis

from cortex_tasks import AsyncCortex, Cortex, InvalidParameter, Settings, parse
from cortex_tasks.app import make_app
from cortex_tasks.cache.names import ACTIVATE, activate_arguments, entry_prefix, flight_prefix, model_key, stats_key
from cortex_tasks.cache.report import purge
from cortex_tasks.config import FleetConfig
from cortex_tasks.echo import echo_vector
from cortex_tasks.payloads import Encoding
from cortex_tasks.tasks import register
from tests.support.redis_server import RedisServer
from tests.support.worker_process import WorkerProcess, poll_until

pytestmark = pytest.mark.fleet


@pytest.fixture
def client(echo_worker: WorkerProcess, echo_fleet: FleetConfig) -> Iterator[Cortex]:
    with redis.Redis.from_url(echo_worker.url) as raw:
        purge(raw, "echo")
        for alias in echo_fleet.models:
            raw.delete(stats_key(alias))
    with Cortex(echo_worker.url, fleet=echo_fleet) as client:
        yield client


@pytest.fixture
def raw(echo_worker: WorkerProcess) -> Iterator[Any]:
    with redis.Redis.from_url(echo_worker.url) as raw:
        yield raw


def items(worker: WorkerProcess) -> int:
    """How many inputs the worker has computed, as its next card says."""
    seen = time.time()
    card = poll_until(lambda: (card := worker.card()) and card.seen_at > seen and card, "a new card")
    return int(card.items)


def client_settings(worker: WorkerProcess) -> Settings:
    return Settings.model_validate({"broker_url": worker.url})


def right(text: str, item: Any) -> bool:
    return bool(item.vector.tolist() == pytest.approx(echo_vector(text)))


# ---------------------------------------------------------------------------------------------------- known inputs


def test_what_one_client_asked_another_one_finds_and_then_has(
    client: Cortex, echo_worker: WorkerProcess, echo_fleet: FleetConfig
) -> None:
    assert client.embed("known", model="echo").timings.cached is None
    with Cortex(echo_worker.url, fleet=echo_fleet) as other:
        found = [other.embed("known", model="echo") for _ in range(2)]
    assert [item.timings.cached for item in found] == ["l2", "near"]
    assert all(right("known", item) for item in found)


async def test_coroutines_find_it_too(client: Cortex, echo_worker: WorkerProcess, echo_fleet: FleetConfig) -> None:
    texts = [f"text {number}" for number in range(100)]
    client.embed(texts, model="echo")
    async with AsyncCortex(echo_worker.url, fleet=echo_fleet) as other:
        one = await other.embed("text 7", model="echo")
        many = await other.embed([*texts, "new"], model="echo")
        mapped = [item async for item in other.map("embed", texts, "echo")]
    assert one.timings.cached == "l2"
    assert [item.timings.cached for item in many.values()].count(None) == 1
    assert {item.timings.cached for item in mapped} == {"near"}
    assert all(right(text, item) for text, item in zip(texts, mapped, strict=True))


@pytest.mark.parametrize("verb", ["list", "map"])
def test_a_bulk_call_of_which_nine_tenths_are_known_queues_one_tenth(
    client: Cortex, echo_worker: WorkerProcess, verb: str
) -> None:
    texts = [f"{verb} {number}" for number in range(1000)]
    client.embed([text for number, text in enumerate(texts) if number % 10], model="echo")
    before = items(echo_worker)
    if verb == "list":
        found: list[Any] = list(client.embed(texts, model="echo").values())
    else:
        found = list(client.map("embed", texts, "echo", errors="raise"))
    assert all(right(text, item) for text, item in zip(texts, found, strict=True))
    assert [item.timings.cached for item in found].count("l2") == 900
    assert items(echo_worker) - before == 100


def test_bad_inputs_keep_their_places_among_known_and_new_ones(client: Cortex) -> None:
    client.embed("known", model="echo")
    found = client.embed(["new 1", "", "known", "new 2"], model="echo")
    assert list(found.errors) == [1]
    assert [found[index].timings.cached for index in (0, 2, 3)] == [None, "l2", None]  # type: ignore[union-attr]
    job = client.submit("embed", ["known", ""], "echo")
    assert job.done()
    assert list(job.result().errors) == [1]


def test_refresh_computes_and_off_neither_looks_nor_stores(
    client: Cortex, echo_worker: WorkerProcess, raw: Any
) -> None:
    before = items(echo_worker)
    client.embed("a text", model="echo", cache="off")
    assert client.embed("a text", model="echo").timings.cached is None
    assert client.embed("a text", model="echo", cache="refresh").timings.cached is None
    assert client.embed("a text", model="echo", cache="off").timings.cached is None
    assert items(echo_worker) - before == 4
    assert client.embed("a text", model="echo").timings.cached == "l2"
    assert raw.get("cortex:cache:bytes") is not None


def test_refresh_mends_an_entry_and_the_asker_does_not_see_the_old_one_again(client: Cortex, raw: Any) -> None:
    client.embed("a text", model="echo")
    [name] = raw.scan_iter(match=entry_prefix("echo") + b"*")
    frame = raw.get(name)
    raw.set(name, b"broken", ex=300)
    client.embed("a text", model="echo", cache="refresh")
    assert raw.get(name) == frame
    assert raw.ttl(name) > 3_000


def test_a_foreign_celery_client_is_answered_from_the_cache(client: Cortex, echo_worker: WorkerProcess) -> None:
    client.embed("a text", model="echo")
    app = make_app(Settings.model_validate({"broker_url": echo_worker.url}), client._link().core.fleet)
    before = items(echo_worker)
    answer = app.send_task("cortex.embed", kwargs={"inputs": ["a text"], "model": "echo"}).get(timeout=20)
    assert answer["timings"]["cached"] == "l2"
    assert items(echo_worker) == before
    app.close()


def test_duplicates_of_one_call_are_computed_once(client: Cortex, echo_worker: WorkerProcess) -> None:
    before = items(echo_worker)
    found = client.embed(["twin"] * 100 + ["single"], model="echo")
    assert all(right("twin", item) for item in found[:100])
    assert items(echo_worker) - before == 2


# ------------------------------------------------------------------------------------------------ derived forms

FORMS: list[dict[str, Any]] = [
    {"normalize": normalize, "dimensions": dimensions, "encoding": encoding}
    for normalize in (True, False)
    for dimensions in (None, 8)
    for encoding in get_args(Encoding)
]


def bits(item: Any) -> tuple[Any, ...]:
    return item.data, item.encoding, item.scale, item.dimensions


async def test_every_form_is_the_same_bits_computed_or_known_whoever_asks(
    client: Cortex, echo_worker: WorkerProcess, echo_fleet: FleetConfig
) -> None:
    app = make_app(client_settings(echo_worker), echo_fleet)
    embed = register(app, client_settings(echo_worker), echo_fleet)["embed"]
    async with AsyncCortex(echo_worker.url, fleet=echo_fleet) as other:
        for form in FORMS:
            computed = client.embed("a text", model="echo", cache="off", **form)
            client.embed("a text", model="echo", **form)
            found = [client.embed("a text", model="echo", **form), await other.embed("a text", model="echo", **form)]
            assert {item.timings.cached for item in found} <= {"l2", "near"}
            found += list(client.map("embed", ["a text"], "echo", **form))
            found += [item async for item in other.map("embed", ["a text"], "echo", **form)]
            native = await asyncio.to_thread(embed.delay(["a text"], model="echo", **form).get, timeout=20)
            found += parse(native).values()
            assert {bits(item) for item in found} == {bits(computed)}
    app.close()


def test_all_forms_of_a_text_cost_one_forward_pass_and_one_entry(
    client: Cortex, echo_worker: WorkerProcess, raw: Any
) -> None:
    before = items(echo_worker)
    for form in FORMS:
        if form["normalize"]:
            client.embed("a text", model="echo", **form)
    assert items(echo_worker) - before == 1
    assert len(list(raw.scan_iter(match=entry_prefix("echo") + b"*"))) == 1


def test_more_dimensions_than_the_model_has_are_refused_by_the_worker_which_knows_them(client: Cortex) -> None:
    for _ in range(2):
        with pytest.raises(InvalidParameter, match="dimensions is 9, over the 8 of model 'echo'"):
            client.embed("a text", model="echo", dimensions=9)
    found = client.embed(["a text", "another"], model="echo", dimensions=9)
    assert all(isinstance(item, InvalidParameter) for item in found)


# ------------------------------------------------------------------------------------------- revisions and purges


def test_no_client_serves_an_old_answer_a_second_after_a_change_of_revision(client: Cortex, raw: Any) -> None:
    def known() -> Any:
        link = client._link()
        plan = link.core.plan("embed", model="echo")
        return link.nearby(plan, "a text") or link.look_up(plan, ["a text"])[0]

    client.embed("a text", model="echo")
    assert [known().timings.cached for _ in range(2)] == ["l2", "near"]
    record = raw.get(model_key("echo"))
    raw.eval(ACTIVATE, 1, model_key("echo"), *activate_arguments("another", time.time(), loaded=True))
    changed_s = time.monotonic()
    last_old_s = 0.0
    while time.monotonic() - changed_s < 1.5:
        if known() is not None:
            last_old_s = time.monotonic() - changed_s
    raw.set(model_key("echo"), record)
    assert 0 < last_old_s < 1.0
    assert known() is not None


def test_a_purged_answer_is_not_served_by_a_warm_near_memory(client: Cortex, raw: Any) -> None:
    client.embed("a text", model="echo")
    assert [client.embed("a text", model="echo").timings.cached for _ in range(2)] == ["l2", "near"]
    assert purge(raw, "echo")[0] == 1
    assert client.embed("a text", model="echo").timings.cached is None
    assert client.embed("a text", model="echo").timings.cached == "l2"


def test_a_purge_leaves_other_models_alone_and_gives_its_bytes_back(client: Cortex, raw: Any) -> None:
    before = int(raw.get("cortex:cache:bytes") or 0)
    client.embed([f"text {number}" for number in range(300)], model="echo")
    client.embed("a text", model="slow")
    assert purge(raw, "echo")[0] == 300
    # The first job of a lazy model is stored as well.
    assert len(list(raw.scan_iter(match=entry_prefix("slow") + b"*"))) == 1
    purge(raw, "slow")
    assert int(raw.get("cortex:cache:bytes")) == before
    assert not raw.exists("cortex:cache:index")


# ---------------------------------------------------------------------------------------------------- single flight


class Pair:
    """Two workers of the gated model: only the first one's passes wait for the gate, only the second takes new jobs
    once ``turn_over`` was called."""

    def __init__(self, directory: Path, server: RedisServer, fleet: FleetConfig) -> None:
        self.gate = directory / "gate"
        self.gate.touch()
        self.first = WorkerProcess(
            server.url, directory / "1.log", queues="gated", env={"CORTEX_TEST_GATE": str(self.gate)}
        )
        self.url, self.fleet, self.directory = server.url, fleet, directory
        self.second: WorkerProcess | None = None

    def load(self, client: Cortex) -> None:
        """A lazy model has a revision only once it is loaded."""
        self.gate.unlink()
        client.embed("a warm text", model="gated")
        with redis.Redis.from_url(self.url) as raw:
            poll_until(lambda: raw.exists(model_key("gated")), "the model is announced")
        self.gate.touch()
        self.gate.with_suffix(".entered").unlink(missing_ok=True)

    def turn_over(self) -> WorkerProcess:
        card = self.first.card()
        assert card is not None
        app = make_app(Settings.model_validate({"broker_url": self.url}), self.fleet)
        app.control.cancel_consumer("gated", destination=[card.node], reply=True, timeout=10)
        app.close()
        self.second = WorkerProcess(self.url, self.directory / "2.log", queues="gated", env={"CORTEX_TEST_GATE": ""})
        return self.second

    def close(self) -> None:
        self.gate.unlink(missing_ok=True)
        for worker in (self.first, self.second):
            if worker is not None:
                worker.kill()


@pytest.fixture
def pair(tmp_path: Path, echo_fleet: FleetConfig) -> Iterator[Pair]:
    with RedisServer(directory=tmp_path) as server:
        pair = Pair(tmp_path, server, echo_fleet)
        try:
            yield pair
        finally:
            pair.close()


def in_flight(url: str) -> int:
    with redis.Redis.from_url(url) as raw:
        return len(list(raw.scan_iter(match=flight_prefix("gated") + b"*")))


def test_a_worker_waits_for_what_another_one_computes_and_gets_it_when_it_comes(
    pair: Pair, echo_fleet: FleetConfig
) -> None:
    with Cortex(pair.url, fleet=echo_fleet, timeout_s=60) as one, ThreadPoolExecutor(2) as threads:
        pair.load(one)
        first = threads.submit(one.embed, "a shared text", model="gated")
        poll_until(pair.gate.with_suffix(".entered").exists, "the first worker computes")
        second = pair.turn_over()
        with Cortex(pair.url, fleet=echo_fleet, timeout_s=60) as other:
            other.embed("a warm text of another kind", model="gated")
            waiting = threads.submit(other.embed, "a shared text", model="gated")
            poll_until(lambda: (card := second.card()) and card.in_flight.get("gated"), "the second worker has the job")
            computed = items(second)
            pair.gate.unlink()
            assert right("a shared text", waiting.result(30))
            assert right("a shared text", first.result(30))
            assert items(second) == computed
    assert in_flight(pair.url) == 0


def test_the_death_of_the_worker_that_computes_hands_over(pair: Pair, echo_fleet: FleetConfig) -> None:
    with Cortex(pair.url, fleet=echo_fleet, timeout_s=60) as one, ThreadPoolExecutor(2) as threads:
        pair.load(one)
        first = threads.submit(one.embed, "a shared text", model="gated")
        poll_until(pair.gate.with_suffix(".entered").exists, "the first worker computes")
        second = pair.turn_over()
        with Cortex(pair.url, fleet=echo_fleet, timeout_s=60) as other:
            other.embed("a warm text of another kind", model="gated")
            waiting = threads.submit(other.embed, "a shared text", model="gated")
            poll_until(lambda: (card := second.card()) and card.in_flight.get("gated"), "the second worker has the job")
            pair.first.kill()
            # Two seconds after the last sign of life; far sooner than the claim ends by itself.
            assert right("a shared text", waiting.result(20))
            # The dead worker's own job moves on with its lease, and finds the answer.
            assert right("a shared text", first.result(30))


# -------------------------------------------------------------------------------------------------------- failures


class Apart:
    """A worker and a client whose cache has a Redis of its own, to break."""

    def __init__(self, directory: Path, broker: RedisServer, cache: RedisServer, fleet: FleetConfig) -> None:
        self.cache = cache
        self.worker = WorkerProcess(
            broker.url, directory / "worker.log", queues="echo", env={"CORTEX_CACHE_URL": cache.url}
        )
        self.settings = Settings.model_validate({"broker_url": broker.url, "cache_url": cache.url})
        self.client = Cortex(settings=self.settings, fleet=fleet, timeout_s=30)

    def ask(self, text: str) -> Any:
        item = self.client.embed(text, model="echo")
        assert right(text, item)
        return item.timings.cached


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory, echo_fleet: FleetConfig) -> Iterator[Apart]:
    directory = tmp_path_factory.mktemp("apart")
    with RedisServer(directory=directory) as broker, RedisServer(directory=directory) as cache:
        apart = Apart(directory, broker, cache, echo_fleet)
        with apart.worker, apart.client:
            yield apart


def comes_back(apart: Apart, text: str) -> None:
    with redis.Redis.from_url(apart.cache.url) as raw:
        poll_until(lambda: raw.exists(model_key("echo")), "the worker names its revision")
    poll_until(lambda: apart.ask(text) in ("l2", "near"), "the cache is used again", 30)


def test_the_cache_may_have_a_redis_of_its_own(apart: Apart) -> None:
    apart.ask("own server")
    comes_back(apart, "own server")
    with redis.Redis.from_url(apart.worker.url) as broker:
        assert not [name for name in broker.keys("cortex:cache:*") if name != b"cortex:cache:o"]


def test_jobs_run_while_the_cache_is_down_and_it_is_used_again_afterwards(apart: Apart) -> None:
    apart.ask("before")
    comes_back(apart, "before")
    apart.cache.kill()
    try:
        assert [apart.ask(f"meanwhile {number}") for number in range(20)] == [None] * 20
        assert apart.client._link().cache.breaker.open  # type: ignore[union-attr]
    finally:
        apart.cache.start()
    comes_back(apart, "after")
    assert "is skipped until it answers again" in apart.worker.log.read_text()


def test_jobs_run_while_the_cache_hangs(apart: Apart) -> None:
    comes_back(apart, "a text")
    with redis.Redis.from_url(apart.cache.url) as raw:
        raw.client_pause(2_000)
        assert [apart.ask(f"while it hangs {number}") for number in range(5)] == [None] * 5
    comes_back(apart, "a text")


def test_jobs_run_while_the_cache_is_full(apart: Apart) -> None:
    comes_back(apart, "a text")
    with redis.Redis.from_url(apart.cache.url) as raw:
        raw.config_set("maxmemory", 1)
        assert [apart.ask(f"while it is full {number}") for number in range(5)] == [None] * 5
        raw.config_set("maxmemory", 0)
    comes_back(apart, "after it was full")


def test_corrupt_entries_are_misses(apart: Apart) -> None:
    with redis.Redis.from_url(apart.cache.url) as raw:
        purge(raw, "echo")
        comes_back(apart, "corrupt")
        for noise in (b"", b"CXE1", b"CXE1\x01\x00" + bytes(40), b"\xff" * 1_000):
            # A second client, whose near memory is empty.
            for name in raw.scan_iter(match=entry_prefix("echo") + b"*"):
                raw.set(name, noise, ex=300)
            with Cortex(settings=apart.settings, fleet=apart.client._link().core.fleet) as other:
                item = other.embed("corrupt", model="echo")
            assert item.timings.cached is None
            assert right("corrupt", item)
