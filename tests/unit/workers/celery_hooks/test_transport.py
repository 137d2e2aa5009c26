"""Fetching in bulk, waiting, and what survives a loss: over a real Redis, with kombu's own hub."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from kombu import Connection, Exchange, Queue
from kombu.asynchronous import get_event_loop
from kombu.asynchronous.hub import _Waker
from kombu.transport import redis as kombu_redis
from kombu.transport import virtual

from cortex_tasks.codec import queue_key, queue_keys
from tests.support.consuming import PATIENCE_S, Consuming, consuming, message, push
from tests.support.redis_server import RedisServer
from tests.support.worker_process import poll_until
from workers.celery_hooks import transport
from workers.celery_hooks.reading import PlainMessage


@pytest.fixture
def client(redis_url: str) -> Iterator[Any]:
    with redis.Redis.from_url(redis_url) as made:
        yield made


@pytest.fixture
def worker(redis_url: str) -> Iterator[Consuming]:
    with consuming(redis_url) as made:
        yield made


def left(client: Any, queue: str = "q") -> int:
    return sum(client.llen(key) for key in queue_keys(queue))


# ---------------------------------------------------------------------------------------------- fetching


def test_messages_come_in_the_order_of_their_priorities(worker: Consuming, client: Any) -> None:
    for priority in (9, 6, 3, 0):
        push(client, f"{priority}a", f"{priority}b", priority=priority)
    worker.expect("0a", "0b", "3a", "3b", "6a", "6b", "9a", "9b")


def test_no_more_is_taken_than_there_is_room_for(redis_url: str, client: Any) -> None:
    push(client, *(str(n) for n in range(10)))
    with consuming(redis_url, prefetch=3) as worker:
        worker.expect("0", "1", "2")
        worker.turn(5)
        assert (len(worker.messages), left(client), client.hlen("unacked")) == (3, 7, 3)
        worker.messages[0].ack()
        worker.expect("0", "1", "2", "3")
        assert client.hlen("unacked") == 3


def test_each_queue_gets_its_turn(redis_url: str, client: Any) -> None:
    push(client, *(f"a{n}" for n in range(6)), queue="a")
    push(client, *(f"b{n}" for n in range(6)), queue="b")
    with consuming(redis_url, "a", "b", prefetch=2) as worker:
        while len(worker.messages) < 12:
            worker.turn_until(lambda: any(not one.acknowledged for one in worker.messages), "messages")
            for one in worker.messages:
                if not one.acknowledged:
                    one.ack()
        assert {name[0] for name in worker.names[:4]} == {"a", "b"}


def test_of_many_queues_not_every_order_is_kept(redis_url: str, client: Any) -> None:
    names = [f"q{number}" for number in range(6)]
    with consuming(redis_url, *names) as worker:
        # All orders but a few come up: each queue that gave something goes to the end.
        for count, order in enumerate(permutations(names), 1):
            worker.channel._queue_cycle.items = list(order)
            worker.channel._plan(1, 1)
            assert len(worker.channel._lists) <= min(count, transport._ORDERS)


def test_tags_are_unique_and_recorded(redis_url: str, client: Any) -> None:
    push(client, *(str(n) for n in range(700)))
    with consuming(redis_url, prefetch=400) as first, consuming(redis_url, prefetch=400) as second:
        first.turn_until(lambda: len(first.messages) == 400, "a full worker")
        second.turn_until(lambda: len(second.messages) == 300, "the rest")
        tags = {*first.tags, *second.tags}
        assert len(tags) == 700
        assert {tag.decode() for tag in client.hkeys("unacked")} == tags
        assert {tag.decode() for tag in client.zrange("unacked_index", 0, -1)} == tags
        assert sorted(map(int, [*first.names, *second.names])) == list(range(700))


def test_a_record_is_kombus_own(worker: Consuming, client: Any, redis_url: str) -> None:
    """A stock worker can give the message back to its queue."""
    push(client, "a", priority=3)
    worker.expect("a")
    (tag,) = worker.tags
    record = json.loads(client.hget("unacked", tag))
    assert record == [json.loads(message("a", 3)), "", "q"]
    with Connection(redis_url) as stock:
        stock.channel().qos.restore_by_tag(tag)
    (raw,) = client.lrange(queue_key("q", 3), 0, -1)
    assert json.loads(raw)["properties"]["delivery_info"]["redelivered"] is True
    assert client.hlen("unacked") == client.zcard("unacked_index") == 0


def test_a_message_that_cannot_be_read_is_parked_between_its_neighbours(worker: Consuming, client: Any) -> None:
    client.lpush("q", message("a"), b"not json", message("b"))
    worker.expect("a", "b")
    assert client.hlen("unacked") == 2
    assert json.loads(client.lindex("cortex:dead:q", 0))["message"] == "not json"


def test_white_space_around_a_message_is_no_part_of_it(worker: Consuming, client: Any) -> None:
    client.lpush("q", b" \n" + message("a") + b"\r\n")
    worker.expect("a")


def test_a_bulk_message_that_cannot_be_read_takes_no_room(redis_url: str, client: Any) -> None:
    client.lpush(queue_key("q", 9), *[b"not json"] * 50)
    push(client, "a", priority=9)
    with consuming(redis_url, prefetch=4) as worker:
        worker.expect("a")
    assert client.llen("cortex:dead:q") == 50


@pytest.mark.parametrize(
    "body",
    [
        '[[], {"inputs": ["é"]}, null]',
        '{"at": {"__type__": "datetime", "__value__": "2026-01-02T03:04:05+00:00"}}',
        '{"n": {"__type__": "decimal", "__value__": "1.5"}}',
        '{"__type__": "nobody knows", "__value__": 1}',
        '"__type__"',
        "[1, 2",
        " \n[1, 2]\t",
        "[1] [2]",
        "",
        "null",
        "NaN",
        "[" * 100_000,
    ],
)
@pytest.mark.parametrize(
    "given",
    [{}, {"content_type": "application/x-python-serialize"}, {"accept": ["application/x-yaml"]}],
    ids=["JSON", "pickle", "not accepted"],
)
def test_a_body_is_decoded_as_stock_does(body: str, given: dict[str, Any]) -> None:
    def decoded(cls: type[Any]) -> Any:
        kind = given.get("content_type", "application/json")
        raw = {
            "body": body,
            "content-type": kind,
            "content-encoding": "utf-8",
            "properties": {"delivery_tag": "t", "body_encoding": None},
        }
        one = cls(raw, channel=SimpleNamespace(decode_body=lambda body, encoding: body))
        one.accept = given.get("accept")
        try:
            return repr(one.decode())
        except Exception as error:
            return type(error)

    assert decoded(PlainMessage) == decoded(virtual.Message)


# ----------------------------------------------------------------------------------------------- waiting


@pytest.mark.parametrize("priority", [0, 3, 6, 9])
def test_an_idle_worker_is_woken_by_a_push(worker: Consuming, client: Any, priority: int) -> None:
    worker.turn(3)
    push(client, "a", priority=priority)
    worker.expect("a")
    worker.turn(3)
    push(client, "b", priority=priority)
    worker.expect("a", "b")


def test_waiting_takes_nothing_and_keeps_the_order(worker: Consuming, client: Any, redis_url: str) -> None:
    worker.turn(3)
    with redis.Redis.from_url(redis_url) as other:
        push(other, "a", "b", "c")
    worker.expect("a", "b", "c")


def without_fetching(worker: Consuming, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on nothing arrives but what waits take."""
    monkeypatch.setattr(worker.channel, "_fetch", lambda *_: pytest.fail("fetched"))


def recorded(client: Any) -> int:
    return int(client.hlen("unacked"))


def test_the_end_of_a_wait_brings_what_ended_it(
    worker: Consuming, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker.turn(3)
    without_fetching(worker, monkeypatch)
    for name in ("a", "b"):
        push(client, name, priority=9)
        push(client, name.upper(), priority=0)
        worker.turn_until(lambda: {name, name.upper()} <= set(worker.names), "both messages")  # noqa: B023
        assert recorded(client) == len(worker.messages)


def test_more_than_a_wait_may_take_is_fetched(worker: Consuming, client: Any) -> None:
    worker.turn(3)
    names = [str(n) for n in range(100)]
    push(client, *names)
    worker.expect(*names)


@pytest.mark.parametrize("prefetch", [1, 2, 8, 32, 128])
def test_what_a_wait_takes_counts_as_taken(redis_url: str, client: Any, prefetch: int) -> None:
    def acknowledge() -> None:
        for one in worker.messages:
            if not one.acknowledged:
                one.ack()

    with consuming(redis_url, "a", "b", prefetch=prefetch) as worker:
        for round_ in range(1, 6):
            worker.turn(3)
            for queue in ("a", "b"):
                for priority in (0, 9):
                    push(client, *(f"{n}" for n in range(prefetch + 10)), queue=queue, priority=priority)
            while len(worker.messages) < round_ * 4 * (prefetch + 10):
                worker.turn(2)
                assert recorded(client) <= prefetch
                acknowledge()
        worker.turn_until(lambda: recorded(client) == 0, "the acknowledgements")
        assert left(client, "a") == left(client, "b") == 0


def test_a_wait_for_interactive_messages_takes_no_bulk(redis_url: str, client: Any) -> None:
    with consuming(redis_url, prefetch=64) as worker:
        worker.turn(3)
        promised = {key: wait.fetch for key, wait in worker.channel._waits.items()}
        assert {key: fetch and fetch.bulk_room for key, fetch in promised.items()} == {
            queue_key("q", 0): 0,
            queue_key("q", 9): 8,
            queue_key("q", 3): None,
            queue_key("q", 6): None,
        }


def test_a_room_too_small_to_divide_is_promised_to_nobody(redis_url: str, client: Any) -> None:
    with consuming(redis_url, prefetch=1) as worker:
        worker.turn(3)
        assert {wait.fetch for wait in worker.channel._waits.values()} == {None}
        push(client, "a", "b")
        worker.expect("a")
        worker.messages[0].ack()
        worker.expect("a", "b")


@pytest.mark.parametrize("places", [1, 2, 4])
def test_bulk_fills_a_worker_without_places_of_interactive_jobs_which_overtake_it_still(
    redis_url: str, client: Any, places: int
) -> None:
    """As one with a pool of Celery's own, whose places are processes."""
    push(client, *(f"bulk {n}" for n in range(places + 1)), priority=9)
    with consuming(redis_url, prefetch=places, interactive_share=0.0) as worker:
        taken = [f"bulk {n}" for n in range(places)]
        worker.expect(*taken)
        push(client, "now")
        worker.turn(3)
        assert worker.names == taken
        worker.messages[0].ack()
        worker.expect(*taken, "now")
        worker.messages[1].ack()
        worker.expect(*taken, "now", f"bulk {places}")


@pytest.mark.parametrize("prefetch", [1, 2, 8, 64])
def test_bulk_gets_a_turn_though_interactive_messages_fill_the_worker(
    redis_url: str, client: Any, prefetch: int
) -> None:
    with consuming(redis_url, prefetch=prefetch) as worker:
        push(client, *(f"bulk {n}" for n in range(2 * prefetch)), priority=9)
        fed = 0
        while sum(name.startswith("bulk") for name in worker.names) < 2 * prefetch:
            assert fed < 200 * prefetch, "bulk starves"
            if client.llen("q") < 2 * prefetch:
                push(client, *(str(fed + n) for n in range(4 * prefetch)))
                fed += 4 * prefetch
            worker.turn()
            assert recorded(client) <= prefetch
            for one in worker.messages[-prefetch:]:
                if not one.acknowledged:
                    one.ack()
        # Interactive messages keep most of the places.
        assert len(worker.names) >= (2 + 12) * prefetch


def test_no_place_is_left_to_bulk_that_is_not_there(redis_url: str, client: Any) -> None:
    with consuming(redis_url, prefetch=8) as worker:
        for round_ in range(1, 11):
            push(client, *(str(n) for n in range(8)))
            worker.turn_until(lambda: len(worker.messages) == 8 * round_, "all that there are places for")  # noqa: B023
            assert recorded(client) == 8
            for one in worker.messages[-8:]:
                one.ack()
        assert worker.channel.qos.left_to_bulk() == 4


def test_a_script_that_redis_forgot_is_brought_again(worker: Consuming, client: Any) -> None:
    worker.turn(3)
    client.script_flush()
    push(client, "a")
    worker.expect("a")
    assert recorded(client) == 1


@pytest.mark.parametrize("end", ["cancel", "cancel another", "consume another", "close"])
def test_what_a_wait_took_and_nobody_read_goes_back_in_its_order(redis_url: str, client: Any, end: str) -> None:
    with consuming(redis_url, "q", "other") as worker:
        worker.turn(3)
        push(client, "a", "b", "c", priority=9)
        push(client, "A", "B")
        poll_until(lambda: recorded(client) == 5, "both waits to take")
        if end == "close":
            worker.channel.close()
        elif end == "consume another":
            worker.consumer.add_queue(Queue("third", Exchange("third"), routing_key="third"))
            worker.consumer.consume()
        else:
            worker.consumer.cancel_by_queue("q" if end == "cancel" else "other")
        assert (recorded(client), client.zcard("unacked_index")) == (0, 0)
        assert worker.messages == []
        for priority, names in ((9, "abc"), (0, "AB")):
            raws = [json.loads(raw) for raw in client.lrange(queue_key("q", priority), 0, -1)]
            assert [raw["headers"]["id"] for raw in reversed(raws)] == list(names)
            assert not any(raw["properties"]["delivery_info"].get("redelivered") for raw in raws)
        if end not in ("cancel", "close"):
            worker.turn_until(lambda: set(worker.names) == set("abcAB"), "all of them")


def test_what_is_promised_leaves_no_busy_worker_looking(redis_url: str, client: Any) -> None:
    """A worker whose last room is promised to a wait that stands looks no more until there is room."""
    with consuming(redis_url, prefetch=64) as worker:
        worker.turn(3)
        push(client, *(str(n) for n in range(500)))
        worker.turn_until(lambda: len(worker.messages) >= 56, "a full worker")
        before = client.info("commandstats")["cmdstat_blmove"]["calls"]
        worker.turn(30)
        assert client.info("commandstats")["cmdstat_blmove"]["calls"] - before <= 4
        for one in worker.messages[:20]:
            one.ack()
        worker.turn_until(lambda: len(worker.messages) >= 76, "the next ones")


def test_a_priority_in_between_is_fetched_whenever_there_is_room(redis_url: str, client: Any) -> None:
    with consuming(redis_url, prefetch=64) as worker:
        worker.turn(3)
        push(client, *(str(n) for n in range(400)), priority=3)
        push(client, "first")
        turns = 0
        while len(worker.messages) < 401:
            worker.turn()
            turns += 1
            for one in worker.messages:
                if not one.acknowledged:
                    one.ack()
        assert turns < 200


def reset(size_bytes: int) -> bytes:
    raise ConnectionResetError("reset by peer")


@pytest.mark.parametrize("receive", [reset, lambda size_bytes: b"", lambda size_bytes: b"-LOADING its data\r\n"])
def test_a_wait_whose_answer_is_lost_is_given_back(
    worker: Consuming, client: Any, monkeypatch: pytest.MonkeyPatch, receive: Callable[[int], bytes]
) -> None:
    def lost(sock: socket.socket) -> Any:
        return SimpleNamespace(recv=receive, fileno=sock.fileno)

    worker.turn(3)
    push(client, "a", "b")
    poll_until(lambda: recorded(client) == 2, "the wait to take")
    for wait in worker.channel._waits.values():
        monkeypatch.setattr(wait, "sock", lost(wait.sock))
    with pytest.raises(worker.connection.connection_errors):
        worker.turn_until(lambda: False, "an error")
    assert recorded(client) == 0
    assert left(client) == 2


def test_what_cannot_be_read_is_parked_when_waits_are_closed(worker: Consuming, client: Any) -> None:
    worker.turn(3)
    client.lpush("q", message("a"), b"not json", message("b"))
    poll_until(lambda: recorded(client) == 3, "the wait to take")
    worker.channel.close()
    assert recorded(client) == 0
    assert left(client) == 2
    assert json.loads(client.lindex("cortex:dead:q", 0))["message"] == "not json"


def test_each_connection_has_the_hub_for_its_timers(redis_url: str) -> None:
    with consuming(redis_url) as first:
        first.hub.reset()
        assert get_event_loop() is not first.hub
    with consuming(redis_url) as second:
        assert get_event_loop() is second.hub


def test_a_lease_is_never_shorter_for_a_wait(worker: Consuming, client: Any) -> None:
    worker.turn(3)
    before_s = time.time()
    push(client, "a")
    worker.expect("a")
    ((_, claimed_s),) = client.zrange("unacked_index", 0, -1, withscores=True)
    assert before_s <= claimed_s <= time.time() + 1.0


def test_a_cancelled_queue_is_left_alone(redis_url: str, client: Any) -> None:
    with consuming(redis_url, "a", "b") as worker:
        worker.turn(3)
        worker.consumer.cancel_by_queue("a")
        push(client, "a1", queue="a")
        push(client, "b1", queue="b")
        worker.expect("b1")
        worker.turn(3)
        assert client.llen("a") == 1


def test_acknowledgements_go_out_though_nothing_is_consumed_any_more(worker: Consuming, client: Any) -> None:
    push(client, "a")
    worker.expect("a")
    worker.consumer.cancel_by_queue("q")
    worker.messages[0].ack()
    worker.turn_until(lambda: client.hlen("unacked") == 0, "the acknowledgement")


# --------------------------------------------------------------------------------------------- in trouble


def test_a_killed_connection_is_a_connection_error_and_loses_nothing(redis_url: str, client: Any) -> None:
    with consuming(redis_url) as worker:
        push(client, "held")
        worker.expect("held")
        client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        with pytest.raises(worker.connection.connection_errors):
            worker.turn_until(lambda: False, "an error")
    with consuming(redis_url) as another:
        push(client, "fresh")
        another.turn_until(lambda: "fresh" in another.names, "the fresh message")
        held = client.hlen("unacked") - 1 + left(client) + another.names.count("held")
        assert held >= 1, "the held message is recorded, in line or here"


def test_an_overdue_wait_gives_the_connection_up(worker: Consuming, monkeypatch: pytest.MonkeyPatch) -> None:
    worker.turn(3)
    monkeypatch.setattr(transport, "_OVERDUE_S", -1_000.0)
    with pytest.raises(worker.connection.connection_errors, match="has not answered"):
        worker.turn_until(lambda: False, "an error")


def test_an_answer_that_was_only_not_read_yet_keeps_the_connection(
    worker: Consuming, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a stall of the whole process."""
    worker.turn(3)
    push(client, "late")
    # Every wait ends within a second, by the message or by itself; nobody reads the answers meanwhile.
    waits = worker.channel._waits.values()
    poll_until(
        lambda: all(kombu_redis._socket_readable(wait.connection._sock) for wait in waits), "an answer to each wait"
    )
    monkeypatch.setattr(transport, "_OVERDUE_S", -1_000.0)
    worker.channel._drop_overdue()
    monkeypatch.undo()
    worker.expect("late")


def test_a_key_of_another_type_is_waited_out(
    redis_url: str, client: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(transport, "_BACK_OFF_S", 0.01)
    with consuming(redis_url, "a", "b") as worker:
        client.set("b", "no list")
        push(client, "a1", queue="a")
        worker.expect("a1")
        worker.turn_until(lambda: "refuses" in caplog.text, "a warning")
        client.delete("b")
        push(client, "b1", queue="b")
        worker.expect("a1", "b1")


def test_a_full_redis_hands_out_its_messages(tmp_path: Path) -> None:
    """Out of memory, a script that has popped may still record: nothing is lost, and the queue drains."""
    options = ("--maxmemory", "4mb", "--maxmemory-policy", "noeviction")
    with (
        RedisServer(*options, directory=tmp_path) as server,
        redis.Redis.from_url(server.url) as client,
        consuming(server.url, prefetch=8) as worker,
    ):
        worker.turn(3)
        push(client, *(str(n) for n in range(20)))
        with suppress(redis.OutOfMemoryError):
            while True:
                client.rpush("filler", b"x" * 10_000)
        worker.turn_until(lambda: len(worker.messages) == 8, "a full worker")
        assert client.hlen("unacked") == 8
        for one in list(worker.messages):
            one.ack()
        worker.turn_until(lambda: len(worker.messages) == 16, "the next ones")
        assert client.hlen("unacked") == 8
        assert left(client) == 4


# ------------------------------------------------------------------------------------------- beside others


def test_who_looked_for_messages_before_they_came_looks_again(redis_url: str, client: Any) -> None:
    """As prefork's pool does; it would wait for the end of the poll otherwise, a second mostly."""
    push(client, "a")
    with consuming(redis_url, prefetch=2) as worker:
        seen: dict[int, int] = {}

        def look(number: int) -> None:
            seen[number] = len(worker.messages)

        # Some of them lie before the transport's own tick in the hub's set, some behind it.
        worker.hub.on_tick |= {partial(look, number) for number in range(8)}
        worker.turn()
        assert seen == dict.fromkeys(range(8), 1)


def test_a_closed_connection_leaves_nothing_to_the_hub(worker: Consuming, redis_url: str) -> None:
    before = len(worker.hub.on_tick)
    worker.connection.close()
    for _ in range(3):
        with Connection(redis_url, transport=transport.register_transport()) as again:
            again.connect()
            again.channel()
            again.transport.register_with_event_loop(again.connection, worker.hub)
            assert len(worker.hub.on_tick) == before


def test_what_is_called_soon_in_the_hubs_turn_ends_its_poll(
    redis_url: str, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So are jobs acknowledged that expired: the next ones find room at once, not after half a second."""
    woken: list[Any] = []
    real = _Waker.wake
    monkeypatch.setattr(_Waker, "wake", lambda self: (woken.append(self), real(self)))
    push(client, "a")
    with consuming(redis_url, prefetch=1) as worker:
        done: list[Any] = []

        def received(one: Any) -> None:
            worker.messages.append(one)
            worker.hub.call_soon(done.append, one)

        worker.consumer.on_message = received
        worker.turn()
        assert (worker.names, done, woken) == (["a"], [], [worker.hub._waker])
        worker.turn()
        assert done == worker.messages
        assert len(woken) == 1


def test_jobs_that_wait_for_their_time_take_no_place_of_bulk(redis_url: str, client: Any) -> None:
    """Celery makes a place more for each of them."""

    def later(name: str) -> bytes:
        raw = json.loads(message(name, 9))
        raw["headers"]["eta"] = "2099-01-01T00:00:00+00:00"
        return json.dumps(raw).encode()

    with consuming(redis_url, prefetch=4) as worker:
        qos = worker.channel.qos

        def received(one: Any) -> None:
            worker.messages.append(one)
            qos.prefetch_count += bool(one.headers.get("eta"))

        worker.consumer.on_message = received
        client.lpush(queue_key("q", 9), *(later(f"later {n}") for n in range(40)))
        worker.turn_until(lambda: len(worker.messages) == 40, "all that are for later")
        push(client, "now", "then", "next", "too many", priority=9)
        worker.turn_until(lambda: len(worker.messages) == 43, "as many as bulk may have")
        worker.turn(3)
        assert worker.names[40:] == ["now", "then", "next"]
        for one in worker.messages:
            one.ack()
        worker.turn_until(lambda: "too many" in worker.names, "the last one")
        assert qos.scheduled == set()


def test_what_redis_refuses_to_park_waits_for_its_lease(
    worker: Consuming, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker.turn(3)
    refused: list[Any] = []

    def full(*arguments: Any) -> None:
        refused.append(arguments)
        raise redis.ResponseError("OOM")

    monkeypatch.setattr(transport.malformed, "park", full)
    client.lpush("q", b"not json")
    worker.turn_until(lambda: refused, "an attempt to park it")
    assert client.hlen("unacked") == 1
    push(client, "a")
    worker.expect("a")


def test_events_are_drained_as_stock_does_while_the_loop_stands_still(worker: Consuming, client: Any) -> None:
    """As Celery's mingle does, when the transport has its loop already."""
    with suppress(TimeoutError):
        worker.connection.drain_events(timeout=0.01)
    push(client, "a")
    worker.connection.drain_events(timeout=PATIENCE_S)
    assert worker.names == ["a"]
    worker.messages[0].ack()
    push(client, "b")
    worker.connection.drain_events(timeout=PATIENCE_S)
    assert client.hlen("unacked") == 1, "acknowledgements go out without a loop, too"
    push(client, "c")
    worker.expect("a", "b", "c")
