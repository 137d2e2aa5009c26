"""Claims: renewed while held, given back in order, acknowledged even after the connection was lost."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from kombu import Connection, Exchange, Queue

from cortex_tasks.codec import queue_key
from tests.support.consuming import Consuming, consuming, message, push
from workers.celery_hooks import leases
from workers.celery_hooks.leases import LeasedQoS, LeaseKeeper, flush_acks, keep, let_go


@pytest.fixture
def client(redis_url: str) -> Iterator[Any]:
    with redis.Redis.from_url(redis_url) as made:
        yield made


@pytest.fixture
def worker(redis_url: str) -> Iterator[Consuming]:
    for left in (leases._late_acks, leases._orphans):
        left.clear()
    with consuming(redis_url) as made:
        yield made
    for left in (leases._late_acks, leases._orphans):
        left.clear()


@pytest.fixture
def keeper(redis_url: str) -> LeaseKeeper:
    return LeaseKeeper(lambda: redis.Redis.from_url(redis_url), 3.0, clock=lambda: 5_000.0)


def scores(client: Any) -> dict[str, float]:
    return {tag.decode(): score for tag, score in client.zrange("unacked_index", 0, -1, withscores=True)}


# ---------------------------------------------------------------------------------------------- renewing


def test_held_claims_are_renewed(worker: Consuming, client: Any, keeper: LeaseKeeper) -> None:
    push(client, "a", "b")
    worker.expect("a", "b")
    assert min(scores(client).values()) == pytest.approx(time.time(), abs=60)
    assert keeper.renew() == 2
    assert set(scores(client).values()) == {5_000.0}


def test_what_is_acknowledged_does_not_come_back(worker: Consuming, client: Any, keeper: LeaseKeeper) -> None:
    push(client, "a", "b")
    worker.expect("a", "b")
    worker.messages[0].ack()
    assert keeper.renew() == 1
    assert set(scores(client)) == set(worker.tags), "not yet sent"
    flush_acks()
    assert keeper.renew() == 1
    assert set(scores(client)) == {worker.tags[1]}


def test_a_claim_that_another_worker_took_over_is_not_taken_back(
    worker: Consuming, client: Any, keeper: LeaseKeeper
) -> None:
    push(client, "a")
    worker.expect("a")
    client.delete("unacked", "unacked_index")
    keeper.renew()
    assert not client.exists("unacked_index")


def test_a_message_that_is_let_go_is_not_renewed(worker: Consuming, client: Any, keeper: LeaseKeeper) -> None:
    push(client, "a")
    worker.expect("a")
    let_go(worker.messages[0])
    assert keeper.renew() == 0
    assert client.hlen("unacked") == 1, "it comes again when its lease ends"


def test_the_thread_renews_and_outlives_an_absent_redis(worker: Consuming, client: Any, redis_url: str) -> None:
    push(client, "a")
    worker.expect("a")
    tries: list[int] = []

    def connect() -> Any:
        tries.append(1)
        if len(tries) < 3:
            raise redis.ConnectionError("away")
        return redis.Redis.from_url(redis_url)

    keeper = LeaseKeeper(connect, 0.03, clock=lambda: 7_000.0)
    keeper.start()
    worker.turn_until(lambda: set(scores(client).values()) == {7_000.0}, "a renewal")
    keeper.stop()
    assert not keeper.is_alive()


# ------------------------------------------------------------------------------------------ acknowledging


def test_acknowledgements_of_one_turn_are_one_trip(worker: Consuming, client: Any) -> None:
    push(client, *(str(n) for n in range(50)))
    worker.turn_until(lambda: len(worker.messages) == 50, "all messages")
    before = (
        client.info("commandstats")["cmdstat_zrem"]["calls"] if "cmdstat_zrem" in client.info("commandstats") else 0
    )
    for one in worker.messages:
        one.ack()
    flush_acks()
    assert client.info("commandstats")["cmdstat_zrem"]["calls"] == before + 1
    assert client.hlen("unacked") == client.zcard("unacked_index") == 0


def test_an_acknowledgement_after_the_connection_was_lost_is_delivered_later(
    worker: Consuming, client: Any, keeper: LeaseKeeper
) -> None:
    push(client, "a")
    worker.expect("a")
    # As after a loss: the channel goes, the record stays.
    record = client.hgetall("unacked"), scores(client)
    worker.channel.close()
    client.delete("q")
    client.hset("unacked", mapping=record[0])
    client.zadd("unacked_index", record[1])
    worker.channel.qos.ack(worker.tags[0])
    assert client.hlen("unacked") == 1
    keeper.stop()
    assert client.hlen("unacked") == client.zcard("unacked_index") == 0


@pytest.mark.parametrize("end", ["acknowledged", "let go", "rejected"])
def test_what_is_computed_stays_this_workers_when_its_connection_is_lost(
    worker: Consuming, client: Any, keeper: LeaseKeeper, end: str
) -> None:
    push(client, "computed", "waits for its time")
    worker.expect("computed", "waits for its time")
    computed = worker.messages[0]
    keep(computed)
    worker.channel.close()
    # The other one, which nobody remembers, is back in its queue.
    assert client.llen("q") == 1
    assert set(scores(client)) == {computed.delivery_tag}
    assert keeper.renew() == 1
    assert scores(client) == {computed.delivery_tag: 5_000.0}
    if end == "acknowledged":
        worker.channel.qos.ack(computed.delivery_tag)
        keeper.stop()
        assert client.hlen("unacked") == client.zcard("unacked_index") == 0
    else:
        worker.channel.qos.reject(computed.delivery_tag, requeue=True) if end == "rejected" else let_go(computed)
        assert keeper.renew() == 0
        assert client.hlen("unacked") == 1, "another worker gets it when the lease ends"


def test_what_is_gone_from_redis_already_is_acknowledged_for_nothing(worker: Consuming, client: Any) -> None:
    push(client, "a", "b")
    worker.expect("a", "b")
    a, b = worker.messages
    assert leases.held_tag(a) == worker.tags[0]
    client.hdel("unacked", a.delivery_tag)
    client.zrem("unacked_index", a.delivery_tag)
    leases.acknowledged(a)
    a.ack()
    assert worker.channel.qos.acked == []
    assert worker.channel.qos.held_tags() == [b.delivery_tag]
    assert not worker.channel.qos.settled
    b.ack()
    assert worker.channel.qos.acked == [b.delivery_tag]


def test_a_stock_channels_message_has_no_tag_to_acknowledge_elsewhere(redis_url: str) -> None:
    with Connection(redis_url) as stock:
        channel = stock.channel()
        push(channel.client, "a")
        queue = Queue("q", Exchange("q", type="direct"), routing_key="q")(channel)
        message = queue.get()
        assert message is not None
        assert leases.held_tag(message) == ""
        message.ack()


def test_acknowledgements_that_redis_refuses_are_kept(
    worker: Consuming, client: Any, keeper: LeaseKeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(client, "a")
    worker.expect("a")
    worker.messages[0].ack()

    def refuse(*_: Any) -> None:
        raise redis.ResponseError("READONLY")

    with monkeypatch.context() as patched:
        patched.setattr(leases, "_acknowledge", refuse)
        flush_acks()
        with pytest.raises(redis.ResponseError):
            keeper.renew()
    assert list(leases._late_acks) == worker.tags
    keeper.renew()
    assert client.hlen("unacked") == 0
    assert not leases._late_acks


def test_a_rejection_after_the_connection_was_lost_is_no_error(worker: Consuming, client: Any) -> None:
    push(client, "a")
    worker.expect("a")
    worker.channel.close()
    qos = worker.channel.qos
    assert isinstance(qos, LeasedQoS)
    qos.reject(worker.tags[0], requeue=True)
    assert qos.held_tags() == []


# --------------------------------------------------------------------------------------------- giving back


def test_what_is_given_back_is_next_in_line_as_it_was(worker: Consuming, client: Any) -> None:
    push(client, "a", "b", priority=9)
    worker.expect("a", "b")
    push(client, "later", priority=9)
    worker.consumer.cancel()
    for one in reversed(worker.messages[:2]):
        keep(one)
        one.reject(requeue=True)
    raw = client.lrange(queue_key("q", 9), 0, -1)
    assert [json.loads(one)["headers"]["id"] for one in reversed(raw)][:2] == ["a", "b"]
    given_back = json.loads(raw[-1])
    assert "redelivered" not in given_back["headers"]
    assert "redelivered" not in given_back["properties"]["delivery_info"]
    assert worker.tags[0] not in scores(client)


def test_a_suspect_that_is_given_back_stays_one(worker: Consuming, client: Any) -> None:
    marked = json.loads(message("a"))
    marked["properties"]["delivery_info"]["redelivered"] = True
    client.lpush("q", json.dumps(marked))
    worker.expect("a")
    worker.consumer.cancel()
    keep(worker.messages[0])
    worker.messages[0].reject(requeue=True)
    (raw,) = client.lrange("q", 0, -1)
    assert json.loads(raw)["properties"]["delivery_info"]["redelivered"] is True


def test_what_another_worker_took_over_is_not_given_back_twice(worker: Consuming, client: Any) -> None:
    push(client, "a")
    worker.expect("a")
    client.delete("unacked", "unacked_index")
    worker.consumer.cancel()
    keep(worker.messages[0])
    worker.messages[0].reject(requeue=True)
    assert client.llen("q") == 0


def test_what_nobody_keeps_is_rejected_as_stock_does(worker: Consuming, client: Any) -> None:
    """Celery requeues what killed a process of its own pool, and by the mark it knows not to do so again."""
    push(client, "a")
    worker.expect("a")
    worker.consumer.cancel()
    worker.messages[0].reject(requeue=True)
    (raw,) = client.lrange("q", 0, -1)
    assert json.loads(raw)["properties"]["delivery_info"]["redelivered"] is True
    assert client.hlen("unacked") == client.zcard("unacked_index") == 0
    assert worker.channel.qos.held_tags() == []


def test_a_rejection_for_good_removes_the_record(worker: Consuming, client: Any) -> None:
    push(client, "a")
    worker.expect("a")
    worker.messages[0].reject()
    assert client.hlen("unacked") == client.llen("q") == 0


# ------------------------------------------------------------------------------------------------- sweeping


@pytest.mark.parametrize("record", [b'[not json,"","q"]', b'[,"","q"]', b'[1,2,"","q"]', b"nonsense", b""])
def test_a_record_that_cannot_be_read_is_swept_away(worker: Consuming, client: Any, record: bytes) -> None:
    client.hset("unacked", mapping={"bad": record, "good": b'[%s,"","q"]' % message("good")})
    client.zadd("unacked_index", {"bad": 2, "good": 1})
    worker.channel.qos.restore_visible(num=10, interval=1)
    worker.expect("good")
    assert client.zscore("unacked_index", "bad") is None
    assert not client.hexists("unacked", "bad")
