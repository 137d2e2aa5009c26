"""Down the tiers and up again: who is asked, what is filled, and what happens when one of them fails."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from cortex_tasks.errors import ModelUnavailable
from tests.support.fake_hub import FakeHub, fake_hub
from workers.store import remotes, sources
from workers.store.disk import Disk
from workers.store.l2 import L2
from workers.store.tiers import Store, key_of

SOURCE = "hub:org/name"
FILES = {"config.json": b"{}", "model.safetensors": b"weights" * 20_000, "vocab.txt": b"a\nb\n"}


def at_once(work: Callable[[], None]) -> None:
    work()


@pytest.fixture
def hub(hub_cache: Path, point_to: Callable[[str], None]) -> Iterator[FakeHub]:
    with fake_hub("org/name", FILES) as made:
        point_to(made.url)
        yield made


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as made:
        yield made


@pytest.fixture
def store(tmp_path: Path, client: redis.Redis) -> Callable[..., Store]:
    """The store of a host: one with the same name has the same disk."""

    def make(host: str = "one", l2: L2 | None = None, max_bytes: int = 10**9) -> Store:
        disk = Disk(tmp_path / host, max_bytes=max_bytes)
        l2 = l2 or L2(client, max_bytes=10**9, ttl_s=100, chunk_bytes=50_000)
        return Store(disks=[disk], l2=l2, wait_s=20.0, background=at_once)

    return make


def whole(path: Path | None) -> bool:
    assert path is not None
    return {name: (path / name).read_bytes() for name in FILES} == FILES


# -------------------------------------------------------------------------------------------- the walk


def test_a_miss_goes_down_and_fills_every_tier_on_the_way_up(hub: FakeHub, store: Callable[..., Store]) -> None:
    first = store("one").open(SOURCE)
    assert (first.tier, whole(first.snapshot.path)) == ("origin", True)
    assert sorted(hub.fetched) == sorted(FILES)
    hub.fetched.clear()
    again = store("one").open(SOURCE)
    assert (again.tier, again.snapshot) == ("disk", first.snapshot)
    elsewhere = store("two").open(SOURCE)
    assert (elsewhere.tier, whole(elsewhere.snapshot.path)) == ("l2", True)
    assert elsewhere.snapshot.digest == first.snapshot.digest
    assert store("two").open(SOURCE).tier == "disk"
    assert hub.fetched == [], "a new worker with an empty disk does not touch the hub"


def test_what_is_not_to_be_shared_never_reaches_redis(
    hub: FakeHub, store: Callable[..., Store], client: redis.Redis
) -> None:
    store().open(SOURCE, share=False)
    assert list(client.scan_iter("cortex:store:*")) == []


def test_a_directory_is_used_where_it_lies_and_helps_hosts_that_lack_it(
    tmp_path: Path, store: Callable[..., Store]
) -> None:
    origin = tmp_path / "model"
    origin.mkdir()
    for name, content in FILES.items():
        (origin / name).write_bytes(content)
    source = f"file:{origin}"
    here = store("one").open(source)
    assert (here.tier, here.snapshot.path) == ("local", origin)
    assert here.size_bytes == sum(map(len, FILES.values()))
    shutil.rmtree(origin)
    there = store("two").open(source)
    assert (there.tier, whole(there.snapshot.path)) == ("l2", True)
    with pytest.raises(ModelUnavailable, match="is not a directory on this machine"):
        store("three").open(f"{source}/other")


def test_a_builtin_model_asks_no_tier(store: Callable[..., Store]) -> None:
    opened = store().open("builtin:prophet")
    assert (opened.tier, opened.snapshot.path) == (None, None)


def test_each_revision_of_a_source_has_its_own_place(hub: FakeHub, store: Callable[..., Store]) -> None:
    store().open(SOURCE)
    hub.files["config.json"] = b'{"new": 1}'
    pinned = store().open(SOURCE, "v2")
    assert pinned.tier == "origin"
    assert store().open(SOURCE).snapshot.digest != pinned.snapshot.digest


def test_pulling_again_takes_what_the_origin_holds_now(hub: FakeHub, store: Callable[..., Store]) -> None:
    old = store().open(SOURCE)
    hub.files["config.json"] = b'{"new": 1}'
    assert store().open(SOURCE).snapshot.digest == old.snapshot.digest
    new = store().open(SOURCE, again=True)
    assert new.snapshot.digest != old.snapshot.digest
    assert store("two").open(SOURCE).snapshot.digest == new.snapshot.digest


def test_progress_ends_at_the_whole_size(hub: FakeHub, store: Callable[..., Store]) -> None:
    total = sum(map(len, FILES.values()))
    told: list[tuple[str, int, int]] = []
    store("one").open(SOURCE, progress=lambda *what: told.append(what))
    assert {(tier, of) for tier, _, of in told} == {("origin", total)}
    told.clear()
    store("two").open(SOURCE, progress=lambda *what: told.append(what))
    assert told[-1] == ("l2", total, total)


def test_what_is_open_is_not_cleaned_up(hub: FakeHub, store: Callable[..., Store]) -> None:
    one = store(max_bytes=200_000)
    opened = one.open(SOURCE)
    with pytest.raises(ModelUnavailable, match="has room for"):
        one.disks[0].make_room(150_000, "another")
    opened.release()
    assert len(one.disks[0].make_room(150_000, "another")) == 1


def test_counters_tell_each_tiers_share(hub: FakeHub, store: Callable[..., Store]) -> None:
    made = store("one")
    made.open(SOURCE)
    made.open(SOURCE)
    tiers = made.counters.card(memory_bytes=0, memory_limit_bytes=0).tiers
    assert (tiers["origin"].hits, tiers["disk"].hits, tiers["disk"].misses, tiers["l2"].misses) == (1, 1, 1, 1)
    assert tiers["disk"].read_bytes == sum(map(len, FILES.values()))
    assert tiers["origin"].mean_ms > 0


# ------------------------------------------------------------------------------------------- Redis fails


@pytest.mark.parametrize("damage", ["flipped", "absent", "no manifest", "half"])
def test_what_redis_lost_or_changed_is_dropped_and_fetched_from_the_origin(
    hub: FakeHub, store: Callable[..., Store], client: redis.Redis, damage: str
) -> None:
    digest = store("one").open(SOURCE).snapshot.digest
    chunks = [f"cortex:store:chunk:{digest}:{number}" for number in range(3)]
    match damage:
        case "flipped":
            content = client.get(chunks[1])
            assert isinstance(content, bytes)
            client.set(chunks[1], content[:-1] + bytes([content[-1] ^ 1]))
        case "absent":
            client.delete(chunks[2])
        case "half":
            client.delete(*chunks[1:])
        case "no manifest":
            client.set(f"cortex:store:entry:{digest}", b"{")
    two = store("two")
    opened = two.open(SOURCE)
    assert (opened.tier, whole(opened.snapshot.path)) == ("origin", True)
    assert two.counters.card(memory_bytes=0, memory_limit_bytes=0).tiers["l2"].faults == 1
    three = store("three").open(SOURCE)
    assert (three.tier, whole(three.snapshot.path)) == ("l2", True), "the next has a whole one again"


def test_a_redis_that_is_not_there_is_passed_by(hub: FakeHub, store: Callable[..., Store]) -> None:
    nobody = L2(redis.Redis(port=1, socket_connect_timeout=1), max_bytes=10**9, ttl_s=100)
    opened = store(l2=nobody).open(SOURCE)
    assert (opened.tier, whole(opened.snapshot.path)) == ("origin", True)


# ----------------------------------------------------------------------------------------- the origin fails


def test_a_hub_that_says_nothing_is_given_up_and_its_mirror_asked(
    hub: FakeHub, store: Callable[..., Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    (mirror / "model.safetensors").write_bytes(b"the same")
    monkeypatch.setattr(remotes, "STALL_S", 0.3)
    monkeypatch.setattr(remotes.fetch, "__defaults__", (0.3,))
    hub.stalls = {"model.safetensors"}
    made = store()
    opened = made.open(SOURCE, mirrors=[f"file:{mirror}"])
    assert (opened.tier, opened.snapshot.path) == ("local", mirror)
    with pytest.raises(ModelUnavailable, match=r"not a byte came for 0\.3 s.*its mirror too:.*not a directory") as told:
        made.open(SOURCE, mirrors=[f"file:{tmp_path / 'absent'}"])
    assert told.value.details["transient"]
    assert made.disks[0].revisions() == []
    hub.go_on.set()
    hub.stalls = set()
    monkeypatch.setattr(remotes.fetch, "__defaults__", (30.0,))
    assert whole(made.open(SOURCE).snapshot.path), "the next try succeeds"


def test_a_hub_that_hangs_while_asked_again_leaves_what_is_here(
    hub: FakeHub, store: Callable[..., Store], point_to: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = store()
    old = made.open(SOURCE)
    monkeypatch.setattr(sources, "HUB_PROBE_S", 0.3)
    point_to("http://127.0.0.1:1")
    again = made.open(SOURCE, again=True)
    assert (again.tier, again.snapshot) == ("disk", old.snapshot)


def test_a_file_that_did_not_come_whole_is_not_taken(
    hub: FakeHub, store: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    described = remotes.describe

    def longer(*arguments: object) -> remotes.Remote:
        remote = described(*arguments)  # type: ignore[arg-type]
        files = tuple(remotes.RemoteFile(f.name, (f.size_bytes or 0) + 1) for f in remote.files)
        return remotes.Remote(remote.source, files, remote.bring)

    monkeypatch.setattr(remotes, "describe", longer)
    made = store()
    with pytest.raises(ModelUnavailable, match="did not arrive whole"):
        made.open(SOURCE)
    assert made.disks[0].revisions() == []


@pytest.mark.parametrize("source", ["git:sentiment@3", "ftp:x"])
def test_a_source_that_is_not_fetched_names_those_that_are(store: Callable[..., Store], source: str) -> None:
    with pytest.raises(ModelUnavailable, match="reads pypi:, file:, hub:, s3:, forge: and builtin: sources"):
        store().open(source)


# --------------------------------------------------------------------------------------------- the disk fails


@pytest.mark.fleet
def test_a_full_disk_is_told_then_the_next_try_succeeds(
    hub: FakeHub, mounted: Callable[[int], Path], tmp_path: Path
) -> None:
    small = mounted(128)
    made = Store(disks=[Disk(small / "models", max_bytes=10**9)], background=at_once)
    with pytest.raises(ModelUnavailable, match=r"needs 0\.1 MB in .*which has room for 0\.1 MB") as told:
        made.open(SOURCE)
    assert told.value.details["transient"]
    assert made.disks[0].revisions() == []
    # Bigger than promised: the disk fills up while it is written.
    (small / "ballast").write_bytes(b"x" * 20_000)
    hub.files["model.safetensors"] = b"w" * 100_000
    with pytest.raises(ModelUnavailable, match=r"room for|No space left"):
        made.open(SOURCE)
    assert list((small / "models" / "partial").iterdir()) == []
    (small / "ballast").unlink()
    hub.files["model.safetensors"] = b"w" * 40_000
    assert made.open(SOURCE).tier == "origin"


@pytest.mark.fleet
def test_a_disk_that_fills_up_in_the_middle_leaves_nothing_torn(
    hub: FakeHub, mounted: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Disk, "make_room", lambda *_: [])
    small = Disk(mounted(64) / "models", max_bytes=10**9)
    made = Store(disks=[small], background=at_once)
    with pytest.raises(ModelUnavailable, match="No space left on device"):
        made.open(SOURCE)
    assert small.revisions() == []
    assert list((small.root / "partial").iterdir()) == []
    roomy = Store(disks=[small, Disk(tmp_path / "memory", max_bytes=10**9)], background=at_once)
    opened = roomy.open(SOURCE)
    assert whole(opened.snapshot.path), "where there is a second place, it takes the model"
    assert roomy.open(SOURCE).snapshot.path == opened.snapshot.path


@pytest.mark.fleet
def test_a_read_only_disk_serves_what_it_has_and_says_what_it_cannot_take(
    hub: FakeHub, mounted: Callable[[int], Path], tmp_path: Path
) -> None:
    place = mounted(1_000)
    made = Store(disks=[Disk(place / "models", max_bytes=10**9)], background=at_once)
    opened = made.open(SOURCE)
    opened.release()
    digest = opened.snapshot.digest
    remount(place, "ro")
    assert made.open(SOURCE).snapshot.digest == digest
    with pytest.raises(ModelUnavailable, match="Read-only file system; free some space there, or name a writable"):
        made.open(SOURCE, "other")
    assert not made.disks[0].remove(digest)
    roomy = Store(disks=[*made.disks, Disk(tmp_path / "memory", max_bytes=10**9)], background=at_once)
    assert roomy.open(SOURCE, "other").tier == "origin"
    remount(place, "rw")
    assert made.open(SOURCE, "other").tier == "origin", "the next try succeeds"


def remount(place: Path, mode: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{mode}", str(place)], check=True, timeout=20)


def test_keys_tell_sources_and_revisions_apart() -> None:
    keys = {key_of("hub:a/b", None), key_of("hub:a/b", "c"), key_of("hub:a/c", None), key_of("s3:a/b", None)}
    assert len(keys) == 4
    assert key_of("hub:a/b", None) == key_of("hub:a/b", "")
