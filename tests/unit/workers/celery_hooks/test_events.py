"""Task events leave once a turn of the hub, not every 24, and not at all while nobody listens."""

from __future__ import annotations

import json
import time
from base64 import b64decode
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import Mock

import pytest
import redis
from celery import Celery
from kombu import Connection
from kombu.asynchronous import set_event_loop

from tests.support.redis_server import RedisServer
from workers.celery_hooks import events
from workers.celery_hooks.events import TurnDispatcher
from workers.celery_hooks.transport import register_transport


def test_events_wait_for_the_end_of_the_turn() -> None:
    sent: list[Any] = []
    app = Celery("t", set_as_current=False, broker="memory://")
    with app.connection() as connection:
        dispatcher = TurnDispatcher(connection, hostname="h", app=app, enabled=True, buffer_group={"task"})
        dispatcher._publish = lambda event, *_, **__: sent.append(event)  # type: ignore[method-assign]
        turn_over: list[bool] = []
        dispatcher.on_send_buffered = lambda: turn_over.append(True)
        for n in range(200):
            dispatcher.send("task-succeeded", uuid=str(n))
        assert sent == []
        assert turn_over, "the hub is asked to flush at the end of its turn"
        dispatcher.flush()
    (together,) = sent
    assert [event["uuid"] for event in together] == [str(n) for n in range(200)]


def test_a_message_of_events_stays_bounded() -> None:
    app = Celery("t", set_as_current=False, broker="memory://")
    dispatcher = TurnDispatcher(None, hostname="h", app=app, enabled=False, buffer_limit=24)
    assert dispatcher.buffer_limit == 1_000


class Bench:
    """A dispatcher at a real Redis, and a monitor that comes and goes."""

    def __init__(self, url: str, transport: str | None = None) -> None:
        app = Celery("t", set_as_current=False, broker=url)
        self.turns = 0
        self.later: list[tuple[float, Callable[[], None]]] = []
        self.connection = Connection(url, transport=transport or register_transport())
        self.dispatcher = TurnDispatcher(
            self.connection,
            hostname="h",
            app=app,
            enabled=True,
            buffer_group={"task"},
            on_send_buffered=self._buffered,
            call_later=lambda after_s, call: self.later.append((after_s, call)),
        )
        self.redis = redis.Redis.from_url(url)
        self.monitor: Any = None

    def _buffered(self) -> None:
        self.turns += 1

    def listen(self) -> None:
        self.monitor = self.redis.pubsub()
        self.monitor.psubscribe("/0.celeryev/*")
        while self.monitor.get_message(timeout=5) is None:
            pass

    def moment_over(self) -> None:
        """What was to be done later is done now."""
        later, self.later = self.later, []
        for _, call in later:
            call()

    def turn(self, *names: str) -> list[str]:
        """Tell of as many jobs, end the turn and let a moment pass; what the monitor got of it."""
        for name in names:
            self.dispatcher.send("task-received", uuid=name)
        self.dispatcher.flush()
        self.moment_over()
        self.dispatcher.flush()
        heard = []
        while self.monitor is not None and (message := self.monitor.get_message(timeout=0.2)):
            heard += [event["uuid"] for event in json.loads(b64decode(json.loads(message["data"])["body"]))]
        return heard

    def close(self) -> None:
        self.redis.close()
        self.connection.release()


@pytest.fixture
def bench(redis_url: str) -> Iterator[Bench]:
    bench = Bench(redis_url)
    yield bench
    bench.close()


def published(bench: Bench) -> int:
    stats = bench.redis.info("commandstats")
    return int(stats["cmdstat_publish"]["calls"]) if "cmdstat_publish" in stats else 0


def test_while_nobody_listens_a_moment_asks_once_and_tells_nothing(bench: Bench) -> None:
    bench.turn("first")
    before = published(bench)
    assert bench.dispatcher._group_buffer["task"] == []
    for _ in range(3):
        for turn in range(4):
            for n in range(25):
                bench.dispatcher.send("task-received", uuid=f"{turn}-{n}")
            bench.dispatcher.flush()
        ((after_s, _),) = bench.later
        assert after_s <= 0.2
        bench.moment_over()
    assert published(bench) - before == 3
    assert bench.dispatcher.clock.value < 100, "no event was made"


def test_what_was_held_back_says_when_it_happened(bench: Bench) -> None:
    bench.turn("first")
    bench.listen()
    before_s = time.time()
    bench.dispatcher.send("task-received", uuid="second")
    after_s = time.time()
    bench.moment_over()
    (event,) = bench.dispatcher._group_buffer["task"]
    assert before_s <= event["timestamp"] <= after_s
    assert event["type"] == "task-received"


def test_a_monitor_hears_of_the_very_next_event(bench: Bench) -> None:
    bench.turn("first")
    bench.turn("second")
    bench.listen()
    assert bench.turn("third", "fourth") == ["third", "fourth"]
    assert bench.turn("fifth") == ["fifth"]
    bench.monitor.close()
    bench.monitor = None
    bench.turn("sixth")
    bench.turn("seventh")
    bench.listen()
    assert bench.turn("eighth") == ["eighth"]


def test_a_job_waits_for_no_question(bench: Bench) -> None:
    bench.turn("first")
    before, turns = published(bench), bench.turns
    bench.dispatcher.send("task-received", uuid="second")
    bench.dispatcher.flush()
    assert published(bench) == before
    assert bench.turns == turns, "the hub has no turn to end for it"
    bench.moment_over()
    assert published(bench) == before + 1


def test_without_a_hub_to_wait_on_the_question_is_asked_at_once(bench: Bench) -> None:
    bench.turn("first")
    bench.dispatcher._call_later = events._on_the_hub
    set_event_loop(None)
    before = published(bench)
    bench.dispatcher.send("task-received", uuid="second")
    assert published(bench) == before + 1
    assert bench.dispatcher._held == []


def test_what_is_held_back_stays_bounded(bench: Bench) -> None:
    bench.turn("first")
    before = published(bench)
    for n in range(2_500):
        bench.dispatcher.send("task-received", uuid=str(n))
        assert len(bench.dispatcher._held) < 1_000
    assert published(bench) == before + 2
    bench.listen()
    assert bench.turn("last")[-1] == "last"


def test_the_workers_own_events_are_sent_whoever_listens(bench: Bench) -> None:
    bench.turn("first")
    before = published(bench)
    bench.dispatcher.send("worker-heartbeat", active=0)
    assert published(bench) - before == 1


def test_without_a_hub_every_event_goes_out(bench: Bench) -> None:
    bench.dispatcher.on_send_buffered = None
    before = published(bench)
    for _ in range(3):
        bench.turn("one")
    assert published(bench) - before == 3


def test_a_transport_that_does_not_count_receivers_gets_every_event(redis_url: str) -> None:
    stock = Bench(redis_url, transport="redis")
    before = published(stock)
    for _ in range(3):
        stock.turn("one")
    assert published(stock) - before == 3
    stock.close()


def test_while_redis_is_away_events_are_kept_and_the_question_is_not(tmp_path: Any) -> None:
    with RedisServer(directory=tmp_path) as server:
        bench = Bench(server.url)
        bench.turn("first")
        assert not bench.dispatcher._heard
        server.kill()
        bench.dispatcher.send("task-received", uuid="kept")
        bench.moment_over()
        bench.dispatcher.flush()
        kept = [event for event, _ in bench.dispatcher._outbound_buffer]
        assert [[one["uuid"] for one in event] for event in kept] == [["kept"]]
        bench.close()


def test_a_heartbeat_that_cannot_be_sent_is_kept_and_holds_nobody_up() -> None:
    """Celery sends it with endless retries, on the hub's thread."""
    dispatcher = TurnDispatcher(app=Celery("t", set_as_current=False), hostname="h", enabled=False)
    dispatcher.producer, dispatcher.enabled = Mock(), True
    dispatcher.producer.publish.side_effect = redis.ConnectionError("gone")
    dispatcher.send("worker-heartbeat", retry=True)
    assert dispatcher.producer.publish.call_args.kwargs["retry"] is False
    assert [key for _, key in dispatcher._outbound_buffer] == ["worker.heartbeat"]
