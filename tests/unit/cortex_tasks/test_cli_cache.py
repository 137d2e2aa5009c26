"""``cortex cache`` against a real Redis."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from click.testing import CliRunner, Result

from cortex_tasks.cache.counters import FIELDS
from cortex_tasks.cache.names import (
    ENTRY_OVERHEAD_BYTES,
    INDEX,
    entry_prefix,
    generation_key,
    model_key,
    stats_key,
)
from cortex_tasks.cache.report import purge
from cortex_tasks.cache.shelf import FRESH_S
from cortex_tasks.cli import main
from cortex_tasks.presence import WORKERS_KEY, worker_key
from tests.support.fake_worker import write_card


@pytest.fixture
def raw(redis_url: str) -> Iterator[Any]:
    with redis.Redis.from_url(redis_url) as raw:
        yield raw


def cortex(url: str, *arguments: str, **env: str) -> Result:
    return CliRunner().invoke(main, ["cache", *arguments], env={"CORTEX_BROKER_URL": url, **env})


def store(raw: Any, alias: str, count: int) -> None:
    """Entries as a worker stores them."""
    for number in range(count):
        name = entry_prefix(alias) + b"%016d" % number
        raw.set(name, b"x" * 100, ex=600)
        raw.zadd(INDEX, {b"%08x" % (100 + ENTRY_OVERHEAD_BYTES) + name: 2e9})
    raw.incrby("cortex:cache:bytes", count * (100 + ENTRY_OVERHEAD_BYTES))


def count_up(raw: Any) -> None:
    counts = {
        "near_hits": 30,
        "l2_hits": 20,
        "misses": 50,
        "shared": 5,
        "computed": 45,
        "warmed": 12,
        "saved_tokens": 1_000,
    }
    raw.hset(stats_key("minilm"), mapping=counts)
    raw.hset(stats_key("*"), mapping={"evicted": 7})
    raw.set(model_key("minilm"), json.dumps({"revision": "abc", "at": 0}))


def test_stats_say_what_was_spared(redis_url: str, raw: Any) -> None:
    count_up(raw)
    store(raw, "minilm", 3)
    write_card(raw, "minilm")
    card = json.loads(raw.get(worker_key("fake@test")))
    card["models"] = [
        {"alias": "minilm", "queue": "minilm", "state": "ready", "size_bytes": 4_000, "precision": "fp32"}
    ]
    raw.set(worker_key("fake@test"), json.dumps(card))
    found = json.loads(cortex(redis_url, "stats", "--json").output)
    assert (found["entries"], found["bytes"], found["evicted"]) == (3, 3 * 350, 7)
    model = found["models"]["minilm"]
    assert (model["near_ratio"], model["l2_ratio"], model["revision"]) == (0.3, 0.2, "abc")
    assert model["saved_inputs"] == 55
    # A thousand weights, two operations each, for a thousand tokens.
    assert model["saved_flops"] == 2_000_000
    assert raw.zcard(WORKERS_KEY) == 1


def test_stats_for_people(redis_url: str, raw: Any) -> None:
    count_up(raw)
    lines = cortex(redis_url, "stats").output.splitlines()
    assert lines[0].startswith("0 answers, 0.0 MB of 5,000 MB")
    [row] = [line.split() for line in lines if line.startswith("minilm")]
    assert row == ["minilm", "abc", "100", "30.0%", "20.0%", "5", "45", "12", "55", "-"]


def test_stats_for_prometheus(redis_url: str, raw: Any) -> None:
    count_up(raw)
    lines = cortex(redis_url, "stats", "--prometheus").output.splitlines()
    assert 'cortex_cache_near_hits_total{model="minilm"} 30' in lines
    assert 'cortex_cache_misses_total{model="spacy"} 0' in lines
    assert "cortex_cache_evicted_total 7" in lines
    for name in FIELDS:
        assert f"# TYPE cortex_cache_{name}_total counter" in lines
    for line in lines:
        assert line.startswith("# ") or len(line.rsplit(" ", 1)) == 2


def test_purge_drops_one_models_answers_and_tells_clients(redis_url: str, raw: Any) -> None:
    store(raw, "minilm", 1_234)
    store(raw, "spacy", 2)
    done = cortex(redis_url, "purge", "minilm", "--json")
    assert json.loads(done.output) == {"model": "minilm", "entries": 1_234, "bytes": 1_234 * 350}
    assert [len(list(raw.scan_iter(match=entry_prefix(alias) + b"*"))) for alias in ("minilm", "spacy")] == [0, 2]
    assert int(raw.get("cortex:cache:bytes")) == 2 * 350
    assert raw.zcard(INDEX) == 2
    assert int(raw.get(generation_key("minilm"))) == 1
    assert raw.hget(stats_key("minilm"), "purged") == b"1234"


def test_a_purge_goes_in_small_steps(raw: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store(raw, "minilm", 3_000)
    dropped: list[int] = []
    plain = raw.eval

    def noting(script: str, count: int, *arguments: Any) -> Any:
        dropped.append(count - 2)
        return plain(script, count, *arguments)

    monkeypatch.setattr(raw, "eval", noting)
    assert purge(raw, "minilm", sleep=lambda _: None)[0] == 3_000
    assert max(dropped) <= 100


def test_a_purge_ends_when_no_client_can_serve_what_it_dropped(raw: Any) -> None:
    store(raw, "minilm", 3)
    waited: list[tuple[float, int, int]] = []

    def sleep(seconds: float) -> None:
        left = len(list(raw.scan_iter(match=entry_prefix("minilm") + b"*")))
        waited.append((seconds, left, int(raw.get(generation_key("minilm")))))

    purge(raw, "minilm", sleep=sleep)
    assert waited == [(FRESH_S, 0, 1)]


def test_a_model_that_is_not_there_is_refused_with_the_nearest_name(redis_url: str) -> None:
    done = cortex(redis_url, "purge", "minilmm")
    assert done.exit_code == 2
    assert "did you mean 'minilm'" in done.output
    assert cortex(redis_url, "purge", "*").exit_code == 2


def test_a_model_that_queues_yaml_no_longer_names_can_be_purged(redis_url: str, raw: Any) -> None:
    store(raw, "gone", 1)
    assert cortex(redis_url, "purge", "gone").output == "gone: 1 answers dropped, 0.0 MB\n"


def test_the_cache_is_looked_for_where_it_is(redis_url: str) -> None:
    done = cortex("redis://127.0.0.1:1/0", "purge", "minilm", CORTEX_CACHE_URL=redis_url)
    assert done.exit_code == 0
    done = cortex(redis_url, "purge", "minilm", CORTEX_CACHE_URL="redis://:s3cret@127.0.0.1:1/0")
    assert done.exit_code == 3
    assert "s3cret" not in done.output
