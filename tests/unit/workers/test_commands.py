"""``cortex models pull|list|verify|pin|evict|gc`` on a host with a hub on loopback and a real Redis."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from cortex_tasks.cli import main
from tests.support.fake_hub import FakeHub, fake_hub
from workers.store.disk import Disk

FILES = {"config.json": b"{}", "model.safetensors": b"weights" * 20_000}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    from huggingface_hub import constants

    with fake_hub("org/name", FILES) as made:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "ENDPOINT", made.url)
        template = made.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield made


@pytest.fixture
def cortex(hub: FakeHub, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs ``cortex models …`` for the host ``host``."""
    plain = {"adapter": "transformers", "tasks": ["features"], "queue": "q", "images": ["i"], "tier": "l2"}
    fleet = {
        "version": 1,
        "models": {
            "model": {"source": "hub:org/name", **plain},
            "absent": {"source": "file:/nonexistent/model", **plain},
            "builtin": {"source": "builtin:echo", **plain, "adapter": "echo"},
        },
        "images": {"i": {"queues": ["q"], "cpus": 1, "memory": "1GB", "storage": "1GB"}},
    }
    (tmp_path / "queues.yaml").write_text(yaml.safe_dump(fleet))
    monkeypatch.setenv("CORTEX_QUEUES_FILE", str(tmp_path / "queues.yaml"))
    monkeypatch.setenv("CORTEX_CACHE_URL", redis_url)

    def run(*arguments: str, host: str = "host") -> Result:
        monkeypatch.setenv("CORTEX_MODELS_DIR", str(tmp_path / host))
        return CliRunner().invoke(main, ["models", *arguments])

    return run


def read(result: Result) -> Any:
    return json.loads(result.stdout)


def test_pull_brings_a_model_and_another_host_gets_it_from_redis(cortex: Callable[..., Result], hub: FakeHub) -> None:
    [row] = read(cortex("pull", "model", "--json"))
    assert (row["model"], row["tier"], row["bytes"]) == ("model", "origin", sum(map(len, FILES.values())))
    assert (Path(row["path"]) / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    hub.fetched.clear()
    [there] = read(cortex("pull", "model", "--json", host="other"))
    assert (there["tier"], there["revision"]) == ("l2", row["revision"])
    assert hub.fetched == []
    assert "0.1 MB from disk in" in cortex("pull", "model").stdout


def test_pull_goes_on_after_a_model_that_cannot_be_had(cortex: Callable[..., Result]) -> None:
    result = cortex("pull")
    assert result.exit_code == 1
    assert "model: " in result.stdout
    assert "absent: model source 'file:/nonexistent/model'" in result.stderr
    assert "builtin" not in result.stdout


def test_list_shows_what_is_kept_where_and_by_whom(cortex: Callable[..., Result], tmp_path: Path) -> None:
    assert "no revision on this host" in cortex("list").stdout
    [pulled] = read(cortex("pull", "model", "--json"))
    held = Disk(tmp_path / "host", max_bytes=10**9).open(pulled["revision"])
    assert held is not None
    cortex("pin", "model")
    shown = read(cortex("list", "--json"))
    [row] = shown["disk"]
    assert (row["models"], row["sources"]) == (["model"], ["hub:org/name"])
    assert (row["pinned"], row["held"], row["bytes"]) == (True, True, pulled["bytes"])
    assert shown["redis"] == {pulled["revision"]: pulled["bytes"]}
    text = cortex("list").stdout
    assert f"{pulled['revision'][:12]}  model" in text
    assert "pinned held" in text
    assert "Redis: 0.1 MB (1 snapshots, 0 fits)" in text
    held.release()


def test_list_without_redis_says_so_and_shows_the_disk(
    cortex: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    cortex("pull", "model")
    monkeypatch.setenv("CORTEX_CACHE_URL", "redis://127.0.0.1:1/0")
    result = cortex("list")
    assert result.exit_code == 0
    assert "does not answer" in result.stderr
    assert "model" in result.stdout


def test_verify_finds_what_changed_and_the_next_pull_heals_it(cortex: Callable[..., Result]) -> None:
    [pulled] = read(cortex("pull", "model", "--json"))
    assert "whole" in cortex("verify").stdout
    (Path(pulled["path"]) / "config.json").write_bytes(b"[]")
    result = cortex("verify", "model", "--json")
    assert result.exit_code == 1
    assert read(result) == [
        {"revision": pulled["revision"], "bytes": pulled["bytes"], "bad": ["config.json"], "removed": True}
    ]
    [again] = read(cortex("pull", "model", "--json"))
    assert again["tier"] == "l2"
    assert cortex("verify").exit_code == 0


def test_evict_removes_from_the_tier_that_is_named_but_not_what_is_held(
    cortex: Callable[..., Result], tmp_path: Path
) -> None:
    [pulled] = read(cortex("pull", "model", "--json"))
    held = Disk(tmp_path / "host", max_bytes=10**9).open(pulled["revision"])
    assert held is not None
    refused = cortex("evict", "model")
    assert refused.exit_code == 1
    assert "is held by a worker and stays" in refused.stderr
    held.release()
    assert "removed" in cortex("evict", "model", "--tier", "all").stdout
    shown = read(cortex("list", "--json"))
    assert (shown["disk"], shown["redis"]) == ([], {})


def test_pin_needs_a_revision_and_can_be_taken_back(cortex: Callable[..., Result], tmp_path: Path) -> None:
    missing = cortex("pin", "model")
    assert missing.exit_code != 0
    assert "has no revision in this host's store" in missing.stderr
    [pulled] = read(cortex("pull", "model", "--json"))
    tight = Disk(tmp_path / "host", max_bytes=pulled["bytes"])
    cortex("pin", "model")
    assert tight.make_room(0, "m") == []
    cortex("pin", "model", "--off")
    assert [one.digest for one in tight.make_room(0, "m")] == [pulled["revision"]]


def test_gc_wipes_what_a_killed_pull_left(cortex: Callable[..., Result], tmp_path: Path) -> None:
    cortex("pull", "model")
    left = tmp_path / "host" / "partial" / "0123"
    left.mkdir()
    assert read(cortex("gc", "--json")) == {"disk": [], "redis": 0}
    assert not left.exists()


def test_an_unknown_model_names_the_nearest(cortex: Callable[..., Result]) -> None:
    result = cortex("pull", "modle")
    assert result.exit_code == 2
    assert "did you mean 'model'" in result.stderr


def test_a_trained_model_is_published_to_the_registry(
    cortex: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = tmp_path / "trained"
    trained.mkdir()
    for name, content in FILES.items():
        (trained / name).write_bytes(content)
    result = cortex("publish", "name", str(trained))
    assert result.exit_code != 0
    assert "CORTEX_FORGE_URL" in result.stderr
    monkeypatch.setenv("CORTEX_FORGE_URL", (tmp_path / "registry").as_uri())
    result = cortex("publish", "name", str(trained))
    assert result.exit_code == 0, result.stderr
    assert "is current" in result.stdout
    monkeypatch.setenv("CORTEX_FORGE_URL", "file:///proc/registry")
    result = cortex("publish", "name", str(trained))
    assert result.exit_code != 0
    assert "the registry cannot be written" in result.stderr
