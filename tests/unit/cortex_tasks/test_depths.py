"""Queue depths, against messages that kombu itself put into a real Redis and took out of it."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import redis
from kombu import Connection, Consumer, Queue

from cortex_tasks.codec import priority_of
from cortex_tasks.depths import QueueDepth, read_depths
from tests.support.redis_server import RedisServer
from workers.dead_letters import add_dead_letter

pytestmark = pytest.mark.fleet
LEASE_S = 30.0


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer() as running:
        yield running


@pytest.fixture
def client(server: RedisServer) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(server.url) as connected:
        connected.flushall()
        yield connected


def publish(server: RedisServer, queue: str, *, interactive: int = 0, bulk: int = 0, body: str = "x") -> None:
    with Connection(server.url) as connection:
        producer = connection.Producer()
        for lane, count in (("interactive", interactive), ("bulk", bulk)):
            for _ in range(count):
                producer.publish(
                    {"text": body}, routing_key=queue, declare=[Queue(queue, routing_key=queue)],
                    priority=priority_of(lane),
                )  # fmt: skip


def take(connection: Connection, queue: str, count: int) -> list[object]:
    """Take messages without acknowledging them."""
    taken: list[object] = []
    with Consumer(
        connection.default_channel, [Queue(queue, routing_key=queue)], on_message=taken.append, prefetch_count=count
    ):
        while len(taken) < count:
            connection.drain_events(timeout=5)
    return taken


def test_ready_jobs_by_lane(server: RedisServer, client: redis.Redis) -> None:
    publish(server, "minilm", interactive=3, bulk=2)
    publish(server, "spacy", bulk=1)
    minilm, spacy, none = read_depths(client, ["minilm", "spacy", "prophet"], lease_s=LEASE_S, now_s=time.time())
    assert minilm == QueueDepth("minilm", interactive=3, bulk=2, unacked=0, orphaned=0, dead=0)
    assert (spacy.ready, spacy.total, none.total) == (1, 1, 0)


def test_taken_jobs_are_counted_until_they_are_answered(server: RedisServer, client: redis.Redis) -> None:
    publish(server, "minilm", interactive=3, body='a "quoted"] body' * 1_000)
    with Connection(server.url) as connection:
        taken = take(connection, "minilm", 2)
        (depth,) = read_depths(client, ["minilm"], lease_s=LEASE_S, now_s=time.time())
        assert (depth.ready, depth.unacked, depth.total, depth.orphaned) == (1, 2, 3, 0)
        for message in taken:
            message.ack()
        (depth,) = read_depths(client, ["minilm"], lease_s=LEASE_S, now_s=time.time())
        assert (depth.ready, depth.unacked) == (1, 0)


def test_claims_that_nobody_renews_are_orphans(server: RedisServer, client: redis.Redis) -> None:
    publish(server, "minilm", interactive=2)
    with Connection(server.url) as connection:
        take(connection, "minilm", 2)
        first, *_ = client.zrange("unacked_index", 0, -1)
        client.zadd("unacked_index", {first: time.time() - LEASE_S})
        (depth,) = read_depths(client, ["minilm"], lease_s=LEASE_S, now_s=time.time())
        assert (depth.unacked, depth.orphaned) == (2, 1)


def test_dead_letters_are_counted_where_the_workers_park_them(client: redis.Redis) -> None:
    with client.pipeline() as pipe:
        for job_id in ("a", "b"):
            add_dead_letter(pipe, "minilm", job_id, "it died", {}, 0.0)
        pipe.execute()
    (depth,) = read_depths(client, ["minilm"], lease_s=LEASE_S, now_s=time.time())
    assert depth.dead == 2
