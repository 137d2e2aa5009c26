"""Results of a batch in one round trip, over a real Redis."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from celery import Celery, states
from celery.app.task import Context

from cortex_tasks.codec import (
    SERIALIZER,
    Answer,
    loads,
    read_reply,
    register_serializer,
    reply_channel,
    result_key,
)
from cortex_tasks.errors import InferenceFailed, UnknownModel
from cortex_tasks.payloads import Timings
from tests.support.redis_server import RedisServer
from workers.celery_hooks.backend import BatchedRedisBackend

REPLY = reply_channel("client")


def backend_of(url: str) -> BatchedRedisBackend:
    register_serializer()
    app = Celery("t", set_as_current=False)
    app.conf.update(
        result_backend=f"workers.celery_hooks.backend:BatchedRedisBackend+{url}",
        result_serializer=SERIALIZER,
        result_accept_content=["json", SERIALIZER],
        result_expires=600,
    )
    made = app.backend
    assert isinstance(made, BatchedRedisBackend)
    return made


@pytest.fixture
def backend(redis_url: str) -> BatchedRedisBackend:
    return backend_of(redis_url)


@pytest.fixture
def client(redis_url: str) -> Iterator[Any]:
    with redis.Redis.from_url(redis_url) as made:
        yield made


def answer(size: int = 1, packed: bool = True) -> Answer:
    return Answer("embed", "m", "rev", Timings().model_dump(), [{"value": {"data": b"x" * size}}], packed)


def store(backend: BatchedRedisBackend, *job_ids: str, result: Any = None, **request: Any) -> None:
    for job_id in job_ids:
        context = Context({"id": job_id, **request})
        backend.mark_as_done(job_id, result or answer(), request=context)


def heard(pubsub: Any) -> list[tuple[str, bytes]]:
    told = []
    while (message := pubsub.get_message(timeout=0.2)) is not None:
        if message["type"] == "message":
            told.append((message["channel"].decode(), message["data"]))
    return told


def test_what_is_collected_waits_for_the_flush(backend: BatchedRedisBackend, client: Any) -> None:
    with backend.collecting():
        store(backend, "a", "b")
    assert client.keys() == []
    backend.flush()
    for job_id in ("a", "b"):
        meta = loads(client.get(result_key(job_id)))
        assert (meta["status"], meta["task_id"]) == ("SUCCESS", job_id)
        assert meta["result"]["items"] == [{"value": {"data": b"x"}}]
        assert 0 < client.ttl(result_key(job_id)) <= 600
    backend.flush()


def test_a_stock_client_reads_what_was_flushed(backend: BatchedRedisBackend) -> None:
    with backend.collecting():
        store(backend, "a", result=answer(packed=False))
        error = UnknownModel("unknown model 'x'", {"model": "x"})
        backend.mark_as_failure("b", error, request=Context({"id": "b"}))
    backend.flush()
    assert backend.get_state("a") == states.SUCCESS
    failure = backend.get_result("b")
    assert isinstance(failure, UnknownModel)
    assert failure.details == {"model": "x"}


def test_each_client_is_told_once_and_each_key_announced(backend: BatchedRedisBackend, client: Any) -> None:
    with client.pubsub() as pubsub:
        pubsub.subscribe(REPLY, result_key("a"), result_key("c"))
        with backend.collecting():
            store(backend, "a", "b", reply_to=REPLY)
            store(backend, "c", reply_to="some-stock-client")
        backend.flush()
        told = heard(pubsub)
    assert [channel for channel, _ in told] == [result_key("a"), result_key("c"), REPLY]
    assert read_reply(told[-1][1]) == [(job_id, client.get(result_key(job_id))) for job_id in "ab"]
    assert told[0][1] == client.get(result_key("a"))


@pytest.mark.parametrize("size", [100_000, 300_000])
def test_a_long_answer_is_announced_and_not_carried(backend: BatchedRedisBackend, client: Any, size: int) -> None:
    with client.pubsub() as pubsub:
        pubsub.subscribe(REPLY, result_key("long"))
        with backend.collecting():
            store(backend, "short", reply_to=REPLY)
            store(backend, "long", result=answer(size), reply_to=REPLY)
        backend.flush()
        told = heard(pubsub)
    announced = dict(one for channel, data in told if channel == REPLY for one in read_reply(data))
    assert announced == {"short": client.get(result_key("short")), "long": None}
    assert (result_key("long"), client.get(result_key("long"))) in told
    assert 0 < client.ttl(result_key("long")) <= 600


def test_more_answers_than_one_call_carries_are_all_stored_once(
    backend: BatchedRedisBackend, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.celery_hooks.backend._CALL_BYTES", 1_000)
    job_ids = [f"job-{n}" for n in range(20)]
    with client.pubsub() as pubsub:
        pubsub.subscribe(REPLY)
        with backend.collecting():
            store(backend, *job_ids, result=answer(200), reply_to=REPLY)
        backend.flush()
        told = heard(pubsub)
    assert len(told) > 1
    assert [job_id for _, data in told for job_id, _ in read_reply(data)] == job_ids
    assert client.exists(*map(result_key, job_ids)) == 20


def test_a_result_that_never_expires_has_no_ttl(backend: BatchedRedisBackend, client: Any) -> None:
    backend.expires = None
    with backend.collecting():
        store(backend, "kept")
    backend.flush()
    assert client.ttl(result_key("kept")) == -1


@pytest.mark.parametrize("reply_to", [5, [1], None, "cortex:reply:\ud800", {"a": 1}])
def test_an_odd_reply_channel_is_no_channel(backend: BatchedRedisBackend, client: Any, reply_to: Any) -> None:
    with backend.collecting():
        store(backend, "odd", reply_to=reply_to)
        store(backend, "plain")
    backend.flush()
    assert client.exists(result_key("odd"), result_key("plain")) == 2


def test_parts_of_chords_are_not_held_back(
    backend: BatchedRedisBackend, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "on_chord_part_return", lambda *_, **__: None)
    with backend.collecting(), client.pubsub() as pubsub:
        pubsub.subscribe(REPLY)
        store(backend, "a", reply_to=REPLY, group="g", chord={"task": "t"})
        assert client.exists(result_key("a"))
        assert heard(pubsub) == [(REPLY, b"a")]


def test_a_request_without_a_group_is_stored(backend: BatchedRedisBackend, client: Any) -> None:
    """Celery's stand-in for the request of a task that nobody knows."""
    request = SimpleNamespace(chord=None, errbacks=None, root_id=None, correlation_id=None, reply_to=None)
    backend.mark_as_failure("a", LookupError("no.such"), request=request)
    assert loads(client.get(result_key("a")))["status"] == "FAILURE"


def test_outside_a_batch_a_late_failure_never_overwrites_a_success(backend: BatchedRedisBackend) -> None:
    store(backend, "a", result=answer(packed=False))
    backend.mark_as_failure("a", RuntimeError("late"), request=Context({"id": "a"}))
    assert backend.get_state("a") == states.SUCCESS


@pytest.mark.parametrize("packed", [False, True])
def test_nor_does_it_within_a_batch(backend: BatchedRedisBackend, client: Any, packed: bool) -> None:
    client.set(result_key("broken"), b"\xff no result")
    with backend.collecting():
        store(backend, "a", result=answer(packed=packed))
    backend.flush()
    listener = client.pubsub()
    listener.subscribe(result_key("a"))
    with backend.collecting():
        for job_id in ("a", "fresh", "broken"):
            backend.mark_as_failure(job_id, RuntimeError("late"), request=Context({"id": job_id}))
    backend.flush()
    states_of = {job_id: loads(client.get(result_key(job_id)))["status"] for job_id in ("a", "fresh", "broken")}
    assert states_of == {"a": states.SUCCESS, "fresh": states.FAILURE, "broken": states.FAILURE}
    assert heard(listener) == []


def test_a_success_replaces_a_failure(backend: BatchedRedisBackend, client: Any) -> None:
    with backend.collecting():
        backend.mark_as_failure("a", RuntimeError("a broken host"), request=Context({"id": "a"}))
    backend.flush()
    with backend.collecting():
        store(backend, "a", result=answer(packed=True))
    backend.flush()
    assert loads(client.get(result_key("a")))["status"] == states.SUCCESS


def test_an_answer_that_redis_would_not_take_is_an_error(
    backend: BatchedRedisBackend, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BatchedRedisBackend, "answer_max_bytes", 2_000)
    with backend.collecting():
        with pytest.raises(InferenceFailed, match="fewer inputs"):
            store(backend, "large", result=answer(2_000))
        store(backend, "small", result=answer(100))
    backend.flush()
    assert client.keys() == [result_key("small").encode()]


def test_what_could_not_be_stored_is_kept_for_the_next_try(tmp_path: Path) -> None:
    with RedisServer(directory=tmp_path) as server:
        backend = backend_of(server.url)
        with backend.collecting():
            store(backend, "a", "b")
        server.kill()
        with pytest.raises((redis.RedisError, OSError)):
            backend.flush()
        server.start()
        with backend.collecting():
            store(backend, "c")
        backend.flush()
        with redis.Redis.from_url(server.url) as client:
            assert client.exists(*(result_key(job_id) for job_id in "abc")) == 3


def test_a_redis_that_is_full_is_waited_for(tmp_path: Path) -> None:
    with RedisServer(directory=tmp_path) as server, redis.Redis.from_url(server.url) as client:
        backend = backend_of(server.url)
        client.config_set("maxmemory", "1")
        with backend.collecting():
            store(backend, "a")
        with pytest.raises(redis.ResponseError):
            backend.flush()
        client.config_set("maxmemory", "0")
        backend.flush()
        assert client.exists(result_key("a"))


def test_an_announcement_that_is_not_allowed_is_no_loss(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An ACL user without channels: clients poll."""
    with RedisServer(directory=tmp_path) as server, redis.Redis.from_url(server.url) as client:
        client.acl_setuser("worker", enabled=True, passwords=["+secret"], commands=["+@all"], keys=["*"],
                           reset_channels=True)  # fmt: skip
        backend = backend_of(server.url.replace("://", "://worker:secret@"))
        for job_id in ("a", "b"):
            with backend.collecting():
                store(backend, job_id, reply_to=REPLY)
            backend.flush()
        assert client.exists(result_key("a"), result_key("b")) == 2
    assert caplog.text.count("refuses to announce") == 1


class Rider:
    """Entries of the cache that go along with results."""

    def __init__(self, *command: Any) -> None:
        self.command, self.waiting, self.back = command, True, 0
        self.replies: list[Any] = []

    def board(self, pipe: Any) -> int:
        if not self.waiting:
            return 0
        self.waiting = False
        pipe.execute_command(*self.command)
        return 1

    def arrived(self, replies: Sequence[Any]) -> None:
        self.replies += replies

    def turned_back(self) -> None:
        self.back += 1


def collect(backend: BatchedRedisBackend, job_id: str, size: int = 1) -> None:
    backend.collect_success(job_id, answer(size), REPLY)


def claim(client: Any, *tags: str) -> None:
    client.hset("unacked", mapping=dict.fromkeys(tags, "record"))
    client.zadd("unacked_index", dict.fromkeys(tags, 1.0))


def claims(client: Any) -> set[str]:
    tags = {tag.decode() for tag in client.hkeys("unacked")}
    assert tags == {tag.decode() for tag in client.zrange("unacked_index", 0, -1)}
    return tags


@pytest.mark.parametrize("riding", [False, True], ids=["alone", "with entries of the cache"])
def test_a_message_is_acknowledged_with_its_answer(backend: BatchedRedisBackend, client: Any, riding: bool) -> None:
    claim(client, "tag-1", "tag-2", "tag-3")
    if riding:
        backend.rider = Rider("SET", "entry", "1")
    for job_id, tag in (("1", "tag-1"), ("2", ""), ("3", "tag-3")):
        backend.collect_success(job_id, answer(), REPLY, tag)
    assert claims(client) == {"tag-1", "tag-2", "tag-3"}
    assert backend.flush() == {"tag-1", "tag-3"}
    assert claims(client) == {"tag-2"}
    assert backend.flush() == set()


@pytest.mark.parametrize("riding", [False, True], ids=["alone", "with entries of the cache"])
def test_one_answer_is_stored_at_once(backend: BatchedRedisBackend, client: Any, riding: bool) -> None:
    claim(client, "tag-1", "tag-2")
    if riding:
        backend.rider = Rider("SET", "entry", "1")
    collect(backend, "waits")
    with client.pubsub() as pubsub:
        pubsub.subscribe(REPLY)
        assert backend.store_success("1", answer(), REPLY, "tag-1") is True
        assert [read_reply(message) for _, message in heard(pubsub)] == [[("1", client.get(result_key("1")))]]
    assert claims(client) == {"tag-2"}
    assert client.get("entry") == (b"1" if riding else None)
    assert loads(client.get(result_key("1")))["status"] == states.SUCCESS
    assert backend.store_success("2", answer(), REPLY) is False
    assert backend.store_success("3", answer(), REPLY, "another's") is False
    assert not client.exists(result_key("waits"))
    backend.flush()
    assert client.exists(result_key("waits"))


def test_a_long_answer_is_not_stored_at_once_nor_while_others_are_sent(
    backend: BatchedRedisBackend, client: Any
) -> None:
    assert backend.store_success("1", answer(300_000), REPLY) is None
    with backend._sending:
        assert backend.store_success("2", answer(), REPLY) is None
    assert client.keys() == []


def test_an_answer_that_could_not_be_stored_at_once_is_not_kept(tmp_path: Path) -> None:
    with RedisServer(directory=tmp_path) as server:
        backend = backend_of(server.url)
        server.kill()
        with pytest.raises(redis.RedisError):
            backend.store_success("1", answer(), REPLY)
        assert not backend._stored
        server.start()
        assert backend.store_success("1", answer(), REPLY) is False


def test_a_message_that_is_not_here_is_left_to_celery(backend: BatchedRedisBackend, client: Any) -> None:
    """As when the broker in use is another Redis, or another worker took the message over."""
    claim(client, "here")
    for job_id, tag in (("1", "here"), ("2", "elsewhere")):
        backend.collect_success(job_id, answer(), REPLY, tag)
    assert backend.flush() == set()
    assert claims(client) == set()
    assert client.exists(result_key("1"), result_key("2")) == 2


def test_a_user_of_the_results_alone_can_store_them(tmp_path: Path) -> None:
    """Without delivery tags nothing of the broker's is touched."""
    with RedisServer(directory=tmp_path) as server, redis.Redis.from_url(server.url) as admin:
        rules = ("on", "nopass", "~celery-task-meta-*", "resetchannels", "&*", "+@all")
        admin.execute_command("ACL", "SETUSER", "results", *rules)
        backend = backend_of(server.url.replace("redis://", "redis://results:x@"))
        collect(backend, "1")
        assert backend.flush() == set()
        assert admin.exists(result_key("1"))


def test_a_long_answers_message_is_left_to_celery(backend: BatchedRedisBackend, client: Any) -> None:
    claim(client, "short", "long")
    backend.collect_success("1", answer(), REPLY, "short")
    backend.collect_success("2", answer(300_000), REPLY, "long")
    assert backend.flush() == {"short"}
    assert claims(client) == {"long"}


def test_no_message_is_acknowledged_whose_answer_could_not_be_stored(tmp_path: Path) -> None:
    options = ("--maxmemory", "3mb", "--maxmemory-policy", "noeviction")
    with RedisServer(*options, directory=tmp_path) as server, redis.Redis.from_url(server.url) as client:
        claim(client, "tag")
        backend = backend_of(server.url)
        backend.collect_success("1", answer(), REPLY, "tag")
        with suppress(redis.OutOfMemoryError):
            while True:
                client.rpush("filler", b"x" * 10_000)
        with pytest.raises(redis.ResponseError):
            backend.flush()
        assert claims(client) == {"tag"}
        client.delete("filler")
        assert backend.flush() == {"tag"}
        assert claims(client) == set()
        assert client.exists(result_key("1"))


@pytest.mark.parametrize("size", [1, 300_000], ids=["in the script", "large"])
def test_entries_of_the_cache_go_along_with_the_results(backend: BatchedRedisBackend, client: Any, size: int) -> None:
    backend.rider = Rider("SET", "entry", "1")
    collect(backend, "1", size)
    backend.flush()
    assert client.get("entry") == b"1"
    assert loads(client.get(result_key("1")))["status"] == states.SUCCESS
    collect(backend, "2", size)
    backend.flush()
    assert client.exists(result_key("2"))


@pytest.mark.parametrize("size", [1, 300_000], ids=["in the script", "large"])
def test_an_entry_that_is_refused_fails_no_result(backend: BatchedRedisBackend, client: Any, size: int) -> None:
    backend.rider = rider = Rider("NOSUCHCOMMAND")
    collect(backend, "1", size)
    backend.flush()
    (refusal,) = rider.replies
    assert isinstance(refusal, redis.ResponseError)
    assert client.exists(result_key("1"))
    assert not backend._stored


def test_entries_are_told_that_their_pipeline_was_not_sent(tmp_path: Path) -> None:
    with RedisServer(directory=tmp_path) as server:
        backend = backend_of(server.url)
        backend.rider = rider = Rider("SET", "entry", "1")
        collect(backend, "1")
        server.kill()
        with pytest.raises(redis.RedisError):
            backend.flush()
        assert rider.back == 1
        assert len(backend._stored) == 1
        server.start()
        backend.flush()
        assert not backend._stored
