"""Putting parked jobs back, and forgetting them, over a real Redis."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
from click.testing import CliRunner, Result

from cortex_tasks.cli import main
from cortex_tasks.codec import queue_key
from cortex_tasks.config import load_fleet
from cortex_tasks.dead_letters import attempts_key, by_job, dead_letter_key, drop, read_dead_letters, requeue
from tests.support.redis_server import RedisServer
from workers import dead_letters as workers

pytestmark = pytest.mark.fleet


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer() as running:
        yield running


@pytest.fixture
def client(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[redis.Redis]:
    monkeypatch.setenv("CORTEX_BROKER_URL", server.url)
    with redis.Redis.from_url(server.url) as connected:
        connected.flushall()
        yield connected
        connected.config_set("maxmemory", 0)


def message(job_id: str, **properties: Any) -> dict[str, Any]:
    # What Lua's own JSON would not keep: empty lists, large integers, long fractions.
    return {
        "body": "é", "headers": {"id": job_id, "task": "cortex.embed", "kwargsrepr": "{'inputs': <1 text>}", "x": []},
        "properties": {"delivery_tag": 2**60 + 1, "sent_at": 0.1234567890123456, **properties},
    }  # fmt: skip


@pytest.fixture
def park(client: redis.Redis) -> Callable[..., Any]:
    """Park as the workers do; returns what was parked."""

    def put(job_id: str, queue: str = "minilm", given: Any = None, at_s: float = 0.0, **properties: Any) -> Any:
        parked = message(job_id, **properties) if given is None else given
        with client.pipeline() as pipe:
            workers.add_dead_letter(pipe, queue, job_id, f"{job_id} died", parked, at_s)
            pipe.execute()
        client.hset(attempts_key(job_id), "0", "3")
        return parked

    return put


def cortex(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["dead", *arguments])


def queued(client: redis.Redis, queue: str = "minilm", priority: int = 0) -> list[Any]:
    """Messages of a list, the next one first."""
    return [json.loads(raw) for raw in reversed(client.lrange(queue_key(queue, priority), 0, -1))]


def parked_ids(client: redis.Redis) -> set[str]:
    return {letter.id for letter in read_dead_letters(client, load_fleet().queues)}


# ------------------------------------------------------------------------------------------------------- steps


@pytest.mark.parametrize(("priority", "step"), [(0, 0), (9, 9), (4, 3), (None, 0), ("9", 0), (-5, 0)])
def test_a_job_goes_back_to_the_head_of_its_lane(
    client: redis.Redis, park: Callable[..., Any], priority: Any, step: int
) -> None:
    client.lpush(queue_key("minilm", step), '"waiting"')
    parked = park("a", priority=priority)
    assert requeue(client, read_dead_letters(client, ["minilm"]))
    assert queued(client, priority=step) == [parked, "waiting"]
    assert not client.exists(dead_letter_key("minilm"), attempts_key("a"))


def test_a_full_redis_loses_nothing(client: redis.Redis, park: Callable[..., Any]) -> None:
    park("a")
    letters = read_dead_letters(client, ["minilm"])
    client.config_set("maxmemory", 1)
    with pytest.raises(redis.RedisError, match="OOM"):
        requeue(client, letters)
    assert read_dead_letters(client, ["minilm"]) == letters
    assert client.exists(attempts_key("a"))
    assert queued(client) == []


def test_a_job_that_another_operator_put_back_is_not_put_back_twice(
    client: redis.Redis, park: Callable[..., Any]
) -> None:
    park("a")
    letters = read_dead_letters(client, ["minilm"])
    assert [requeue(client, letters), requeue(client, letters), drop(client, letters)] == [True, False, False]
    assert len(queued(client)) == 1


def test_a_job_parked_for_two_of_its_inputs_goes_back_once(client: redis.Redis, park: Callable[..., Any]) -> None:
    park("a", at_s=1.0)
    park("a", at_s=2.0)
    (job,) = by_job(read_dead_letters(client, ["minilm"]))
    assert requeue(client, job)
    assert len(queued(client)) == 1
    assert not client.exists(dead_letter_key("minilm"))


# ----------------------------------------------------------------------------------------------------- command


def test_list(client: redis.Redis, park: Callable[..., Any]) -> None:
    assert cortex("list").stdout == "nothing is parked\n"
    park("a", at_s=86_400.0)
    park("b", queue="prophet")
    park("", given="no\x1bjson")
    client.lpush(dead_letter_key("spacy"), "not ours")
    header, *lines = cortex("list").stdout.splitlines()
    assert header.split() == ["id", "queue", "parked", "(UTC)", "task", "reason"]
    assert ["a", "minilm", "1970-01-02", "00:00:00", "cortex.embed", "a", "died"] in [line.split() for line in lines]
    assert len(lines) == 4
    rows = json.loads(cortex("list", "--json").stdout)
    assert [(row["id"], row["queue"], row["readable"]) for row in rows] == [
        ("", "minilm", False), ("a", "minilm", True), ("", "spacy", False), ("b", "prophet", True),
    ]  # fmt: skip
    assert rows[1]["arguments"] == "{'inputs': <1 text>}"
    assert [row["id"] for row in json.loads(cortex("list", "prophet", "--json").stdout)] == ["b"]


def test_list_writes_no_control_characters(client: redis.Redis, park: Callable[..., Any]) -> None:
    park("\x1b[2J", at_s=1e300)
    assert "\x1b" not in cortex("list").stdout


def test_a_mistyped_queue(client: redis.Redis) -> None:
    result = cortex("list", "minlm")
    assert result.exit_code == 2
    assert "did you mean 'minilm'" in result.stderr
    client.lpush(dead_letter_key("retired"), "x")
    assert cortex("list", "retired").exit_code == 0


def test_requeue_one(client: redis.Redis, park: Callable[..., Any]) -> None:
    park("a")
    park("b")
    assert cortex("requeue", "a").stdout == "a  minilm  back in its queue\n"
    assert parked_ids(client) == {"b"}
    again = cortex("requeue", "a")
    assert (again.exit_code, again.stderr) == (
        1, "cortex: no job a is parked on any queue: see `cortex dead list`\n",
    )  # fmt: skip


def test_requeue_all_keeps_order_and_what_cannot_be_read(client: redis.Redis, park: Callable[..., Any]) -> None:
    for job_id in "abc":
        park(job_id)
    park("", given="no json")
    park("p", queue="prophet")
    result = cortex("requeue", "--all", "--queue", "minilm")
    assert result.exit_code == 1
    assert "1 cannot be read as jobs and stay parked" in result.stderr
    assert [sent["headers"]["id"] for sent in queued(client)] == ["a", "b", "c"]
    assert parked_ids(client) == {"", "p"}
    assert cortex("drop", "-").stdout == "-  minilm  dropped\n"
    assert cortex("requeue", "--all").exit_code == 0
    assert cortex("requeue", "--all").stdout == "nothing to do\n"
    assert parked_ids(client) == set()


def test_drop(client: redis.Redis, park: Callable[..., Any]) -> None:
    for job_id in "abc":
        park(job_id)
    assert cortex("drop", "b").exit_code == 0
    assert parked_ids(client) == {"a", "c"}
    assert not client.exists(attempts_key("b"))
    assert cortex("drop", "--all").exit_code == 0
    assert parked_ids(client) == set()
    assert queued(client) == []


@pytest.mark.parametrize("arguments", [("requeue",), ("drop",), ("requeue", "a", "--all"), ("drop", "a", "--all")])
def test_one_or_all_must_be_said(client: redis.Redis, park: Callable[..., Any], arguments: tuple[str, ...]) -> None:
    park("a")
    assert cortex(*arguments).exit_code == 2
    assert parked_ids(client) == {"a"}
