"""Snapshots in Redis: whole or a miss, every byte checked, the budget kept by whole snapshots."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import redis

from tests.support.redis_server import RedisServer
from tests.support.snapshots import snapshot
from workers.store.l2 import L2, Corrupt
from workers.store.manifest import FileEntry, digest_of, manifest

CHUNK = 4_096


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_000_000.0

    def __call__(self) -> float:
        self.now_s += 1.0
        return self.now_s


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as made:
        yield made


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def l2(client: redis.Redis, clock: Clock) -> L2:
    return L2(client, max_bytes=10**6, ttl_s=86_400, clock=clock, chunk_bytes=CHUNK)


class Kept:
    """A snapshot put into L2."""

    def __init__(self, l2: L2, root: Path, seed: int = 0, size_bytes: int = 10_000) -> None:
        self.root = root / f"origin-{seed}"
        self.entries: tuple[FileEntry, ...] = snapshot(self.root, seed, size_bytes)
        self.digest = digest_of(self.entries)
        self.accepted = l2.put(self.digest, self.entries, self.root, f"key-{seed}")


def fetched(l2: L2, digest: str, directory: Path) -> bool:
    """Whether a whole snapshot came out."""
    entries = l2.manifest(digest)
    if entries is None:
        return False
    directory.mkdir(exist_ok=True)
    l2.fetch(digest, entries, directory)
    return digest_of(manifest(directory)) == digest


def keys(client: redis.Redis, pattern: str) -> list[bytes]:
    return list(client.scan_iter(pattern))


# ------------------------------------------------------------------------------------------ there and back


@pytest.mark.parametrize("size_bytes", [0, 1, CHUNK - 4, CHUNK, 5 * CHUNK, 40_001])
def test_what_is_put_comes_back_byte_by_byte(l2: L2, tmp_path: Path, size_bytes: int) -> None:
    kept = Kept(l2, tmp_path, size_bytes=size_bytes)
    assert kept.accepted
    assert l2.digest_for("key-0") == kept.digest
    assert fetched(l2, kept.digest, tmp_path / "back")


def test_progress_counts_every_byte(l2: L2, tmp_path: Path) -> None:
    kept = Kept(l2, tmp_path)
    seen: list[int] = []
    (tmp_path / "back").mkdir()
    l2.fetch(kept.digest, kept.entries, tmp_path / "back", seen.append)
    assert sum(seen) == sum(entry.size_bytes for entry in kept.entries)


def test_what_nobody_put_is_a_miss(l2: L2) -> None:
    assert l2.digest_for("unheard") is None
    assert l2.manifest("0" * 64) is None
    assert l2.sizes() == {}


def test_no_chunk_is_larger_than_it_may_be(l2: L2, client: redis.Redis, tmp_path: Path) -> None:
    Kept(l2, tmp_path, size_bytes=50_000)
    chunks = keys(client, "cortex:store:chunk:*")
    assert len(chunks) == 13
    assert max(client.strlen(chunk) for chunk in chunks) == CHUNK


def test_everything_large_has_a_time_to_live(l2: L2, client: redis.Redis, tmp_path: Path) -> None:
    Kept(l2, tmp_path)
    large = [key for kind in ("chunk", "entry", "ref") for key in keys(client, f"cortex:store:{kind}:*")]
    assert large
    assert all(86_000 < client.ttl(key) <= 86_400 for key in large)


def test_a_use_renews_the_time_to_live_of_the_whole(l2: L2, client: redis.Redis, tmp_path: Path) -> None:
    kept = Kept(l2, tmp_path)
    parts = keys(client, "cortex:store:chunk:*") + keys(client, "cortex:store:entry:*")
    for key in parts:
        client.expire(key, 100)
    assert fetched(l2, kept.digest, tmp_path / "back")
    assert all(client.ttl(key) > 86_000 for key in parts)


# ------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("damage", ["flipped", "torn", "absent"])
def test_a_chunk_that_is_not_what_it_was_is_noticed(l2: L2, client: redis.Redis, tmp_path: Path, damage: str) -> None:
    kept = Kept(l2, tmp_path)
    chunk = f"cortex:store:chunk:{kept.digest}:1"
    content = client.get(chunk)
    assert isinstance(content, bytes)
    match damage:
        case "flipped":
            client.set(chunk, bytes([content[0] ^ 1]) + content[1:])
        case "torn":
            client.set(chunk, content[:-1])
        case "absent":
            client.delete(chunk)
    with pytest.raises(Corrupt):
        fetched(l2, kept.digest, tmp_path / "back")


@pytest.mark.parametrize("text", [b"", b"{}", b'{"files": [["a", 1, "0"]]}', b'{"files": [["../a", 1, "0"]]}'])
def test_a_manifest_that_is_not_the_snapshots_is_noticed(l2: L2, client: redis.Redis, text: bytes) -> None:
    client.set("cortex:store:entry:" + "0" * 64, text)
    with pytest.raises(Corrupt, match="manifest"):
        l2.manifest("0" * 64)


def test_what_is_dropped_leaves_nothing(l2: L2, client: redis.Redis, tmp_path: Path) -> None:
    kept = Kept(l2, tmp_path)
    assert l2.drop(kept.digest)
    assert not l2.drop(kept.digest)
    assert keys(client, "cortex:store:*") == [b"cortex:store:ref:key-0"]
    assert l2.manifest(kept.digest) is None


def test_a_file_that_is_cut_while_it_is_read_leaves_nothing(l2: L2, client: redis.Redis, tmp_path: Path) -> None:
    entries = snapshot(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(OSError, match="was cut"):
        l2.put(digest_of(entries), entries, tmp_path, "key")
    assert keys(client, "cortex:store:*") == []


# ------------------------------------------------------------------------------------------------- budget


def test_room_is_made_by_whole_snapshots_the_longest_unused_first(l2: L2, client: redis.Redis, tmp_path: Path) -> None:
    tight = L2(client, max_bytes=35_000, ttl_s=100, clock=Clock(), chunk_bytes=CHUNK)
    one, two, three = (Kept(tight, tmp_path, seed) for seed in range(3))
    assert fetched(tight, one.digest, tmp_path / "back")
    four = Kept(tight, tmp_path, 3)
    assert set(tight.sizes()) == {one.digest, three.digest, four.digest}
    assert keys(client, f"cortex:store:*{two.digest}*") == []
    for kept in (one, three, four):
        assert fetched(tight, kept.digest, tmp_path / f"back-{kept.digest}")
    assert tight.used_bytes() <= 35_000


def test_what_is_larger_than_the_budget_drops_nobody(client: redis.Redis, clock: Clock, tmp_path: Path) -> None:
    tight = L2(client, max_bytes=15_000, ttl_s=100, clock=clock, chunk_bytes=CHUNK)
    kept = Kept(tight, tmp_path, 0)
    assert not Kept(tight, tmp_path, 1, 20_000).accepted
    assert set(tight.sizes()) == {kept.digest}


def test_many_writers_at_once_keep_the_budget_and_leave_whole_snapshots(redis_url: str, tmp_path: Path) -> None:
    barrier = threading.Barrier(6)
    digests: list[str] = []

    def write(seed: int) -> None:
        with redis.Redis.from_url(redis_url) as own:
            writer = L2(own, max_bytes=35_000, ttl_s=100, clock=Clock(), chunk_bytes=1_000)
            barrier.wait(20)
            # Files of its own: who writes them anew would tear what a neighbour is reading.
            digests.append(Kept(writer, tmp_path / f"writer-{seed}", seed % 4).digest)

    # Two of them write the same snapshot as another.
    threads = [threading.Thread(target=write, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(digests) == 6
    with redis.Redis.from_url(redis_url) as own:
        reader = L2(own, max_bytes=35_000, ttl_s=100, chunk_bytes=1_000)
        assert 0 < reader.used_bytes() <= 35_000
        for digest in reader.sizes():
            assert fetched(reader, digest, tmp_path / f"back-{digest}")
        counted = sum(int(own.strlen(key)) for key in keys(own, "cortex:store:chunk:*"))
        assert counted == reader.used_bytes(), "a chunk that is not counted would stay until it expires"


def test_an_upload_that_lost_its_place_removes_its_chunks(l2: L2, client: redis.Redis, tmp_path: Path) -> None:
    entries = snapshot(tmp_path)

    class Robbed(L2):
        def _commit(self, name: str, value: bytes, count: int) -> bool:
            client.zrem("cortex:store:used", name)
            return super()._commit(name, value, count)

    robbed = Robbed(client, max_bytes=10**6, ttl_s=100, chunk_bytes=CHUNK)
    assert not robbed.put(digest_of(entries), entries, tmp_path, "key")
    assert keys(client, "cortex:store:chunk:*") == []


def test_the_place_of_an_upload_that_died_is_given_back(l2: L2, client: redis.Redis, clock: Clock) -> None:
    assert l2._reserve("dead", 500_000, 3)
    assert l2.used_bytes() == 500_000
    l2.clean()
    assert l2.used_bytes() == 500_000, "it may still be at work"
    clock.now_s += 601
    l2.clean()
    assert l2.sizes() == {}


def test_what_redis_evicted_by_itself_is_not_counted_for_long(
    l2: L2, client: redis.Redis, clock: Clock, tmp_path: Path
) -> None:
    kept = Kept(l2, tmp_path)
    client.delete(f"cortex:store:entry:{kept.digest}")
    clock.now_s += 601
    l2.clean()
    assert l2.used_bytes() == 0
    assert keys(client, "cortex:store:chunk:*") == []


def test_weights_leave_room_for_all_else_in_a_redis_with_a_limit(tmp_path: Path) -> None:
    options = ("--maxmemory", "4000000", "--maxmemory-policy", "volatile-lru")
    with RedisServer(*options, directory=tmp_path) as server, redis.Redis.from_url(server.url) as client:
        client.set("an answer", b"x" * 1_000_000, ex=100)
        l2 = L2(client, max_bytes=10**9, ttl_s=100)
        assert not Kept(l2, tmp_path, 0, 2_500_000).accepted
        assert Kept(l2, tmp_path, 1, 200_000).accepted
        assert client.exists("an answer")


# ------------------------------------------------------------------------------------------- small values


def test_small_values_share_the_budget(client: redis.Redis, clock: Clock, tmp_path: Path) -> None:
    tight = L2(client, max_bytes=12_000, ttl_s=100, clock=clock, chunk_bytes=CHUNK)
    assert tight.put_value("fit:one", b"1" * 4_000)
    assert tight.get_value("fit:one") == b"1" * 4_000
    assert tight.get_value("fit:two") is None
    assert not tight.put_value("fit:large", b"1" * (CHUNK + 1))
    Kept(tight, tmp_path)
    assert tight.get_value("fit:one") is None
    assert client.ttl("cortex:store:entry:fit:one") == -2


def test_keeping_a_small_value_looks_at_few_of_the_others(l2: L2, client: redis.Redis) -> None:
    """Redis serves nobody else meanwhile, and a fleet may keep a hundred thousand."""
    for number in range(300):
        assert l2.put_value(f"fit:{number}", b"1" * 100)
    client.config_resetstat()
    assert l2.put_value("fit:new", b"1" * 100)
    calls = client.info("commandstats")
    assert sum(calls.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("hget", "exists", "hmget")) < 20


@pytest.mark.parametrize("seed", range(5))
def test_the_sum_is_that_of_all_entries_whatever_happens(
    seed: int, client: redis.Redis, clock: Clock, tmp_path: Path
) -> None:
    random, l2 = Random(seed), L2(client, max_bytes=40_000, ttl_s=300, clock=clock, chunk_bytes=CHUNK)
    for _ in range(150):
        name = f"fit:{random.randrange(20)}"
        match random.randrange(8):
            case 0:
                l2.drop(name)
            case 1:
                client.delete(f"cortex:store:entry:{name}")
            case 2:
                Kept(l2, tmp_path, random.randrange(3))
            case 3:
                l2.clean()
            case 4:
                clock.now_s += 40
            case 5:
                l2.get_value(name)
            case _:
                assert l2.put_value(name, b"1" * random.randrange(4_000))
        assert int(client.hget("cortex:store:sizes", "") or 0) == l2.used_bytes() <= 40_000
        assert client.zcard("cortex:store:used") == len(l2.sizes())


def test_values_that_expired_are_counted_no_more_once_another_is_kept(
    l2: L2, client: redis.Redis, clock: Clock
) -> None:
    for name in ("fit:one", "fit:two"):
        l2.put_value(name, b"1" * 100)
        client.delete(f"cortex:store:entry:{name}")
    clock.now_s += 86_401
    l2.put_value("fit:three", b"1" * 50)
    assert l2.sizes() == {"fit:three": 50}
