"""The compose file: current, with the limits of queues.yaml, and nothing open that should be shut."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from cortex_tasks.cache.counters import FIELDS
from cortex_tasks.config import FleetConfig, ImageConfig, load_fleet
from deploy.generate import compose
from deploy.generate.__main__ import FILES, ROOT, main, stale

Section = dict[str, Any]
DOCKER = ROOT / "docker"


@pytest.fixture(scope="module")
def fleet() -> FleetConfig:
    return load_fleet(ROOT / "queues.yaml")


@pytest.fixture(scope="module")
def services(fleet: FleetConfig) -> dict[str, Section]:
    found: dict[str, Section] = yaml.safe_load(compose.render(fleet))["services"]
    return found


def default(value: str) -> str:
    """What ``${NAME:-default}`` is without a variable."""
    match = re.fullmatch(r"\$\{[A-Z_]+:-(.*)\}", value)
    assert match is not None, value
    return match[1]


def test_the_committed_files_are_current(fleet: FleetConfig) -> None:
    assert stale(fleet) == [], "run: make deploy-files"


def test_an_old_file_is_told_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "queues.yaml").write_text((ROOT / "queues.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr("deploy.generate.__main__.ROOT", tmp_path)
    assert main(["--check"]) == 1
    assert "docker/compose.yaml is not current" in capsys.readouterr().err
    assert main([]) == 0
    assert capsys.readouterr().out.splitlines() == list(FILES)
    assert main(["--check"]) == 0


def test_limits_are_those_of_the_image(fleet: FleetConfig, services: dict[str, Section]) -> None:
    workers = [name for name, image in fleet.images.items() if image.queues]
    assert workers == ["nlp", "ml", "prod", "dev"]
    for name in (*workers, "flower", "metrics"):
        image, service = fleet.images[name if name in workers else "base"], services[name]
        assert float(default(service["cpus"])) == image.cpus
        assert int(default(service["mem_limit"])) == image.memory
        assert service["memswap_limit"] == service["mem_limit"]
    for name in workers:
        assert int(services[name]["labels"]["cortex.storage_bytes"]) == fleet.images[name].storage
        assert services[name]["shm_size"] == fleet.memory_config.shared_memory


def test_a_changed_limit_reaches_the_file(fleet: FleetConfig) -> None:
    smaller = fleet.images["nlp"].model_copy(update={"cpus": 1.5, "memory": 3 * 10**9})
    changed = fleet.model_copy(update={"images": {**fleet.images, "nlp": smaller}})
    service = yaml.safe_load(compose.render(changed))["services"]["nlp"]
    assert (default(service["cpus"]), default(service["mem_limit"])) == ("1.5", "3000000000")


def test_a_new_image_becomes_a_service(fleet: FleetConfig) -> None:
    image = ImageConfig(queues=("minilm",), cpus=1, memory=10**9, storage=10**9)
    changed = fleet.model_copy(update={"images": {**fleet.images, "tiny": image}})
    assert yaml.safe_load(compose.render(changed))["services"]["tiny"]["profiles"] == ["tiny"]


def test_gpus_are_those_of_the_image(fleet: FleetConfig) -> None:
    services = yaml.safe_load(compose.render_gpu(fleet))["services"]
    wanted = {name: image.gpus for name, image in fleet.images.items() if image.gpus}
    found = {name: s["deploy"]["resources"]["reservations"]["devices"][0]["count"] for name, s in services.items()}
    assert found == wanted == {"ml": 1, "prod": 1}
    assert all(service["build"]["args"]["TORCH"] == "cuda" for service in services.values())


def test_every_container_is_hardened(services: dict[str, Section]) -> None:
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["healthcheck" if "build" not in service else "image"], name
        assert "privileged" not in service, name


def test_only_what_a_browser_opens_is_published_and_on_loopback(services: dict[str, Section]) -> None:
    published = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert set(published) == {"flower", "grafana"}
    for ports in published.values():
        assert all(port.startswith("127.0.0.1:") for port in ports)
    for name in ("redis-broker", "redis-cache", "prometheus", "metrics"):
        assert services[name]["networks"] == ["fleet"]


def test_the_way_out_is_for_workers_alone(fleet: FleetConfig, services: dict[str, Section]) -> None:
    networks = yaml.safe_load(compose.render(fleet))["networks"]
    assert networks["fleet"] == {"internal": True}
    assert {name for name, service in services.items() if "outside" in service["networks"]} == {
        "nlp", "ml", "prod", "dev",
    }  # fmt: skip


def test_secrets_are_files_only(fleet: FleetConfig, services: dict[str, Section]) -> None:
    document = yaml.safe_load(compose.render(fleet))
    assert {name: secret["file"] for name, secret in document["secrets"].items()} == {
        name: f"./secrets/{name}" for name in ("broker_password", "cache_password", "flower_auth", "grafana_password")
    }
    made = (DOCKER / "secrets.sh").read_text(encoding="utf-8")
    assert all(name in made for name in document["secrets"])
    for service in services.values():
        for name, value in service.get("environment", {}).items():
            assert "PASSWORD" not in name or value.startswith("/run/secrets/")


def test_each_redis_keeps_what_it_is_for(fleet: FleetConfig, services: dict[str, Section]) -> None:
    broker, cache = services["redis-broker"], services["redis-cache"]
    assert "--maxmemory-policy noeviction" in broker["command"][2]
    assert "--appendonly yes" in broker["command"][2]
    assert broker["volumes"] == ["broker-data:/data"]
    assert "--maxmemory-policy volatile-lru" in cache["command"][2]
    size_bytes = int(default(cache["environment"]["MAXMEMORY"]))
    assert size_bytes == fleet.model_storage.l2_redis.size < int(default(cache["mem_limit"]))


def test_nothing_starts_before_what_it_needs_is_well(services: dict[str, Section]) -> None:
    for name, service in services.items():
        needed = service.get("depends_on", {})
        assert all(gate == {"condition": "service_healthy"} for gate in needed.values())
        # A profile's service must not need one that the profile leaves out.
        for other in needed:
            assert set(services[other].get("profiles", service.get("profiles", []))) >= set(service["profiles"]), name
    assert set(services["nlp"]["depends_on"]) == {"redis-broker", "redis-cache"}


def test_a_laptop_runs_the_small_set(services: dict[str, Section]) -> None:
    small = {name for name, service in services.items() if "small" in service.get("profiles", ["small"])}
    assert small == {"redis-broker", "redis-cache", "nlp"}


def test_prometheus_scrapes_what_is_there(services: dict[str, Section]) -> None:
    scraped = yaml.safe_load((DOCKER / "prometheus.yml").read_text(encoding="utf-8"))["scrape_configs"]
    targets = [target for job in scraped for group in job["static_configs"] for target in group["targets"]]
    commands = {name: " ".join(service.get("command", [])) for name, service in services.items()}
    for target in targets:
        name, _, port = target.partition(":")
        assert port in commands[name]


def test_the_dashboard_asks_for_what_is_counted() -> None:
    from cortex_tasks.metrics import exposition

    board = json.loads((DOCKER / "grafana/dashboards/cortex.json").read_text(encoding="utf-8"))
    source = yaml.safe_load((DOCKER / "grafana/provisioning/datasources/prometheus.yml").read_text(encoding="utf-8"))
    counted = {line.split()[2] for line in exposition([], [], 0.0) if line.startswith("# TYPE")}
    counted |= {f"cortex_cache_{name}_total" for name in FIELDS} | {"cortex_cache_entries"}
    counted |= {"flower_task_runtime_seconds_bucket"}
    asked = [t["expr"] for panel in board["panels"] for t in panel["targets"]]
    assert asked
    for expression in asked:
        assert set(re.findall(r"\b(?:cortex|flower)_\w+", expression)) <= counted, expression
    assert {panel["datasource"]["uid"] for panel in board["panels"]} == {source["datasources"][0]["uid"]}
