"""The Kubernetes manifests: valid, with the limits of queues.yaml, hardened, and true of the code they start."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import redis
import yaml
from cloudcoil.models.keda.v1alpha1 import ScaledObject

from cortex_tasks.config import FleetConfig, load_fleet
from cortex_tasks.settings import Settings
from deploy.generate import compose, kubernetes
from deploy.generate.__main__ import ROOT
from tests.support.kustomize import build, merged
from tests.support.redis_server import free_port, redis_executable
from tests.support.worker_process import poll_until
from workers import probe

Document = dict[str, Any]
FOLDER = ROOT / "deploy" / "kubernetes"
OVERLAYS = ("laptop", "production", "gpu")
#: The oldest and the newest that the manifests are made for.
VERSIONS = ("1.29", "1.37")
UNITS = {"": 1, "M": 10**6, "G": 10**9}

each_overlay = pytest.mark.parametrize("overlay", OVERLAYS)


@pytest.fixture(scope="module")
def fleet() -> FleetConfig:
    return load_fleet(ROOT / "queues.yaml")


@pytest.fixture(scope="module")
def built() -> dict[str, list[Document]]:
    return {name: build(FOLDER / "overlays" / name) for name in OVERLAYS}


def of(documents: list[Document], kind: str, name: str | None = None) -> list[Document]:
    found = [one for one in documents if one["kind"] == kind and name in (None, one["metadata"]["name"])]
    assert found, (kind, name)
    return found


def pods(documents: list[Document]) -> Iterator[tuple[str, Document, Document]]:
    """Name, pod and only container of each workload."""
    for one in documents:
        if one["kind"] in ("Deployment", "StatefulSet"):
            pod = one["spec"]["template"]["spec"]
            (container,) = pod["containers"]
            yield one["metadata"]["name"], pod, container


def pod(documents: list[Document], name: str) -> tuple[Document, Document]:
    return next((found, container) for who, found, container in pods(documents) if who == name)


def env(container: Document) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in container["env"]}


def size(quantity: str) -> int:
    match = re.fullmatch(r"(\d+)([MG]?)", quantity)
    assert match is not None, quantity
    return int(match[1]) * UNITS[match[2]]


# -------------------------------------------------------------------------------------------------- schemas


@each_overlay
def test_all_objects_are_what_kubernetes_takes(built: dict[str, list[Document]], overlay: str) -> None:
    plain = [document for document in built[overlay] if not document["apiVersion"].startswith("keda.sh/")]
    assert len(plain) >= 20
    for document in plain:
        for version in VERSIONS:
            kubernetes_validate.validate(document, version, strict=True)


def test_the_schemas_know_a_mistake(built: dict[str, list[Document]]) -> None:
    wrong = merged(of(built["production"], "Deployment", "nlp")[0], {"spec": {"replicass": 2}})
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[0], strict=True)


@pytest.mark.parametrize("overlay", ["production", "gpu"])
def test_scaled_objects_are_what_keda_takes(built: dict[str, list[Document]], overlay: str) -> None:
    for document in of(built[overlay], "ScaledObject"):
        read = ScaledObject.model_validate(document)
        # What KEDA does not know is left out there.
        assert read.model_dump(mode="json", by_alias=True, exclude_none=True) == document


def test_a_mistyped_key_of_keda_would_be_seen(built: dict[str, list[Document]]) -> None:
    wrong = merged(of(built["production"], "ScaledObject", "nlp")[0], {"spec": {"pollingIntervall": 3}})
    assert ScaledObject.model_validate(wrong).model_dump(mode="json", by_alias=True, exclude_none=True) != wrong


# --------------------------------------------------------------------------------------- figures of queues.yaml


def test_every_queue_is_consumed_and_scaled_by(built: dict[str, list[Document]], fleet: FleetConfig) -> None:
    for overlay in ("production", "gpu"):
        consumed: set[str] = set()
        for name in kubernetes.WORKERS:
            queues = fleet.images[name].consumed(gpu=overlay == "gpu")
            assert pod(built[overlay], name)[1]["args"][-2:] == ["-Q", ",".join(queues)]
            (scaled,) = of(built[overlay], "ScaledObject", name)
            assert scaled["spec"]["scaleTargetRef"]["name"] == name
            asked = [trigger["metadata"]["url"].rpartition("/")[2] for trigger in scaled["spec"]["triggers"]]
            assert asked == list(queues)
            consumed |= set(queues)
        assert consumed == set(fleet.queues)


@each_overlay
def test_every_container_runs_an_image_that_is_declared(
    built: dict[str, list[Document]], fleet: FleetConfig, overlay: str
) -> None:
    used = {name: container["image"] for name, _, container in pods(built[overlay]) if not name.startswith("redis-")}
    tags = {name: re.fullmatch(r"datapunk/cortex:([a-z]+)(-cuda)?", image) for name, image in used.items()}
    assert {name: tag and tag[1] for name, tag in tags.items()} == {
        **{name: name for name in kubernetes.WORKERS}, "flower": "base", "metrics": "base",
    }  # fmt: skip
    assert {"base", *kubernetes.WORKERS} <= set(fleet.images)


def test_a_queue_that_no_deployment_consumes_is_refused(fleet: FleetConfig) -> None:
    raw = fleet.model_dump(mode="json")
    raw["models"]["minilm"] |= {"queue": "elsewhere", "images": ["prod"]}
    raw["images"]["prod"]["queues"].append("elsewhere")
    for image in ("nlp", "ml", "prod", "dev"):
        for queues in ("queues", "gpu_queues"):
            raw["images"][image][queues] = [name for name in raw["images"][image][queues] if name != "minilm"]
    astray = FleetConfig.model_validate(raw)
    with pytest.raises(ValueError, match="elsewhere"):
        kubernetes.render_workers(astray)


@pytest.mark.parametrize("name", kubernetes.WORKERS)
def test_limits_are_those_of_the_image(built: dict[str, list[Document]], fleet: FleetConfig, name: str) -> None:
    image, store = fleet.images[name], fleet.storage_config
    found, container = pod(built["production"], name)
    limits = container["resources"]["limits"]
    assert container["resources"]["requests"] == limits
    assert (float(limits["cpu"]), size(limits["memory"])) == (image.cpus, image.memory)
    volumes = {volume["name"]: volume.get("emptyDir", {}).get("sizeLimit") for volume in found["volumes"]}
    assert size(volumes["models"]) == image.storage
    assert size(volumes["cache"]) == store.cache_store.max_size
    assert size(volumes["shm"]) == fleet.memory_config.shared_memory
    on_disk = sum(size(volumes[volume]) for volume in ("models", "cache", "tmp"))
    assert size(limits["ephemeral-storage"]) == on_disk
    places = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert (places["models"], places["cache"]) == (str(store.model_store.path), str(store.cache_store.path))


def test_a_gpu_goes_to_the_images_that_can_use_one(built: dict[str, list[Document]], fleet: FleetConfig) -> None:
    for name in kubernetes.WORKERS:
        found, container = pod(built["gpu"], name)
        gpus = fleet.images[name].gpus
        assert container["resources"]["limits"].get("nvidia.com/gpu", 0) == gpus
        assert env(container)["CORTEX_GPU"] == str(int(gpus > 0))
        assert bool(found.get("tolerations")) == (gpus > 0)
        assert container["image"].endswith("-cuda") == (gpus > 0)
        assert container["resources"]["limits"]["memory"], "the other limits stay"


def test_a_worker_has_time_to_finish(built: dict[str, list[Document]], fleet: FleetConfig) -> None:
    for name in kubernetes.WORKERS:
        found, container = pod(built["production"], name)
        models = [model for model in fleet.models.values() if model.queue in fleet.images[name].consumed(gpu=True)]
        pass_s = max(model.limits.time_limit_s * (2 if model.children else 1) for model in models)
        stop_grace_s = float(env(container)["CORTEX_STOP_GRACE_S"])
        assert stop_grace_s >= max(model.limits.time_limit_s for model in models)
        assert found["terminationGracePeriodSeconds"] >= pass_s + stop_grace_s + 30
        assert container["lifecycle"]["preStop"]["exec"]["command"] == ["python", "-m", "workers.probe", "stop"]


def test_the_declaration_that_is_mounted_is_queues_yaml(built: dict[str, list[Document]], fleet: FleetConfig) -> None:
    (mounted,) = of(built["production"], "ConfigMap", "queues")
    assert FleetConfig.model_validate(yaml.safe_load(mounted["data"]["queues.yaml"])) == fleet
    for _, found, container in pods(built["production"]):
        if "CORTEX_QUEUES_FILE" in env(container):
            volume = next(one["name"] for one in found["volumes"] if one.get("configMap") == {"name": "queues"})
            place = next(one["mountPath"] for one in container["volumeMounts"] if one["name"] == volume)
            assert env(container)["CORTEX_QUEUES_FILE"] == f"{place}/queues.yaml"


# ------------------------------------------------------------------------------------- true of what they start


@each_overlay
def test_probes_ask_what_the_worker_answers(built: dict[str, list[Document]], overlay: str) -> None:
    for name in kubernetes.WORKERS:
        _, container = pod(built[overlay], name)
        asked = {kind: container[f"{kind}Probe"]["exec"]["command"] for kind in ("startup", "readiness", "liveness")}
        assert all(command[:-1] == ["python", "-m", probe.__name__] for command in asked.values())
        assert [command[-1] for command in asked.values()] == ["started", "ready", "live"]
        assert set(probe._QUESTIONS) == {"started", "ready", "live"}
        startup = container["startupProbe"]
        assert startup["periodSeconds"] * startup["failureThreshold"] >= 900, "a model may have to be fetched"


@each_overlay
def test_every_setting_exists(built: dict[str, list[Document]], overlay: str, tmp_path: Path) -> None:
    known = {f"CORTEX_{name.upper()}" for name in Settings.model_fields} | {"CORTEX_GPU"}
    for name, found, container in pods(built[overlay]):
        if name.startswith("redis-"):
            continue
        given = env(container)
        assert set(given) <= known
        secrets = next(one for one in found["volumes"] if one["name"] == "secrets")["secret"]["items"]
        for variable, file in given.items():
            if variable.endswith("_PASSWORD_FILE"):
                assert Path(file).name in {item["path"] for item in secrets}
                given[variable] = str(tmp_path / Path(file).name)
                Path(given[variable]).write_text("hunter2", encoding="utf-8")
        settings = Settings.from_env(given)
        assert settings.broker == "redis://:hunter2@redis-broker:6379/0"
        assert settings.cache == "redis://:hunter2@redis-cache:6379/0"


def test_keda_asks_the_metrics_of_this_namespace(built: dict[str, list[Document]]) -> None:
    (service,) = of(built["production"], "Service", "metrics")
    (port,) = service["spec"]["ports"]
    address = f"http://metrics.{service['metadata']['namespace']}.svc.cluster.local:{port['port']}/queues/"
    _, container = pod(built["production"], "metrics")
    assert container["args"] == ["cortex", "metrics", "--listen", f"0.0.0.0:{port['port']}"]
    for scaled in of(built["production"], "ScaledObject"):
        for trigger in scaled["spec"]["triggers"]:
            assert trigger["metadata"]["url"].startswith(address)
            assert trigger["metadata"]["valueLocation"] == "total"
            assert int(trigger["metadata"]["targetValue"]) > 0


def test_flower_is_behind_a_password(built: dict[str, list[Document]], monkeypatch: pytest.MonkeyPatch) -> None:
    (config,) = of(built["production"], "ConfigMap", "flower")
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: f"{self}:secret\n")
    read: dict[str, Any] = {}
    exec(config["data"]["flowerconfig.py"], read)
    assert read["basic_auth"] == ["/run/secrets/flower_auth:secret"]
    assert "--conf=/etc/cortex/flower/flowerconfig.py" in pod(built["production"], "flower")[1]["args"]


# ------------------------------------------------------------------------------------------------ shut tight


@each_overlay
def test_every_pod_is_hardened(built: dict[str, list[Document]], overlay: str) -> None:
    for name, found, container in pods(built[overlay]):
        assert found["securityContext"]["runAsNonRoot"], name
        assert found["securityContext"]["runAsUser"] == (999 if name.startswith("redis-") else kubernetes.UID)
        assert found["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
        }  # fmt: skip
        assert found["automountServiceAccountToken"] is False
        assert found["enableServiceLinks"] is False
        assert container["resources"]["limits"].keys() >= {"cpu", "memory"}
        for volume in found["volumes"]:
            assert set(volume) - {"name"} <= {"emptyDir", "configMap", "secret"}
            assert volume.get("emptyDir", {"sizeLimit": "1M"})["sizeLimit"], "nothing grows without a limit"


@each_overlay
def test_passwords_are_files_and_nothing_else(built: dict[str, list[Document]], overlay: str) -> None:
    for document in built[overlay]:
        assert document["kind"] != "Secret"
        assert "secretKeyRef" not in str(document)
        assert not re.search(r"redis://[^\s\"']*@", str(document))


@each_overlay
def test_redis_keeps_what_it_should(built: dict[str, list[Document]], overlay: str) -> None:
    commands, room = {}, {}
    for name in ("redis-broker", "redis-cache"):
        _, container = pod(built[overlay], name)
        commands[name] = container["command"][-1]
        room[name] = size(container["resources"]["limits"]["memory"]) - int(env(container)["MAXMEMORY"])
    assert "--maxmemory-policy noeviction --appendonly yes" in commands["redis-broker"]
    assert "--maxmemory-policy volatile-lru --appendonly no" in commands["redis-cache"]
    assert min(room.values()) >= 256 * 10**6, "Redis evicts, or refuses, before the kernel ends it"
    (broker,) = of(built[overlay], "StatefulSet", "redis-broker")
    assert broker["spec"]["volumeClaimTemplates"][0]["metadata"]["name"] == "data"


@pytest.mark.fleet
@pytest.mark.parametrize("role", ["broker", "cache"])
@pytest.mark.parametrize("ended", ["", "\n"], ids=["bare", "a line"])
def test_redis_starts_with_its_password_and_answers_its_probe(
    built: dict[str, list[Document]], tmp_path: Path, role: str, ended: str
) -> None:
    """The very commands, with this machine's Redis and places."""
    _, container = pod(built["production"], f"redis-{role}")
    (tmp_path / "data").mkdir()
    (tmp_path / f"{role}_password").write_text(f"hunter2{ended}", encoding="utf-8")
    port = free_port()

    def here(command: list[str]) -> list[str]:
        text = command[-1].replace("/run/secrets", str(tmp_path)).replace("/tmp/redis", f"{tmp_path}/redis")
        text = text.replace(" /data", f" {tmp_path}/data").replace("redis-cli ", f"redis-cli -p {port} ")
        return [*command[:-1], text.replace("--dir", f"--port {port} --dir")]

    own = {"PATH": f"{Path(redis_executable()).parent}:{os.environ['PATH']}", **env(container)}
    with subprocess.Popen(here(container["command"]), env=own, stdout=subprocess.DEVNULL) as process:
        try:
            asked = here(container["readinessProbe"]["exec"]["command"])
            poll_until(lambda: subprocess.run(asked, env=own, check=False).returncode == 0, "it answers its probe")
            with redis.Redis(port=port, password="hunter2") as client:
                settings = client.config_get("maxmemory*")
                assert settings["maxmemory"] == env(container)["MAXMEMORY"]
                assert settings["maxmemory-policy"] == {"broker": "noeviction", "cache": "volatile-lru"}[role]
                assert client.config_get("appendonly") == {"appendonly": {"broker": "yes", "cache": "no"}[role]}
            with redis.Redis(port=port) as stranger, pytest.raises(redis.AuthenticationError):
                stranger.ping()
        finally:
            process.terminate()


def test_compose_gives_the_broker_as_much() -> None:
    assert kubernetes.BROKER_MAXMEMORY_BYTES == compose._BROKER_MAXMEMORY_BYTES


@each_overlay
def test_policies_speak_of_pods_that_are_there(built: dict[str, list[Document]], overlay: str) -> None:
    workloads = [one for one in built[overlay] if one["kind"] in ("Deployment", "StatefulSet")]
    labels = [one["spec"]["template"]["metadata"]["labels"] for one in workloads]
    components = {found["app.kubernetes.io/component"] for found in labels}
    assert components == {"worker", "redis", "flower", "metrics"}
    named: set[str] = set()
    for policy in of(built[overlay], "NetworkPolicy"):
        selector = policy["spec"]["podSelector"]
        named |= set(selector.get("matchLabels", {}).values())
        named |= {value for rule in selector.get("matchExpressions", ()) for value in rule["values"]}
    assert named == components
    for kind in ("PodDisruptionBudget", "Service"):
        for document in of(built[overlay], kind):
            wanted = document["spec"]["selector"]
            wanted = wanted.get("matchLabels", wanted)
            assert any(wanted.items() <= found.items() for found in labels), document["metadata"]["name"]


# ------------------------------------------------------------------------------------- the stand-in for kustomize


def test_what_the_stand_in_does_not_know_it_refuses(tmp_path: Path) -> None:
    (tmp_path / "kustomization.yaml").write_text("namePrefix: x-\n", encoding="utf-8")
    with pytest.raises(ValueError, match="namePrefix"):
        build(tmp_path)
    (tmp_path / "kustomization.yaml").write_text("patches: [{path: p.yaml}]\n", encoding="utf-8")
    (tmp_path / "p.yaml").write_text("{apiVersion: v1, kind: Service, metadata: {name: x}}", encoding="utf-8")
    with pytest.raises(ValueError, match="nothing to patch"):
        build(tmp_path)


def test_a_patch_merges_named_lists_and_replaces_others() -> None:
    base = {"a": {"b": 1, "c": 2}, "env": [{"name": "x", "value": "1"}, {"name": "y", "value": "2"}], "args": [1, 2]}
    change = {"a": {"c": 3}, "env": [{"name": "y", "value": "4"}, {"name": "z", "value": "5"}], "args": [3]}
    assert merged(base, change) == {
        "a": {"b": 1, "c": 3},
        "env": [{"name": "x", "value": "1"}, {"name": "y", "value": "4"}, {"name": "z", "value": "5"}],
        "args": [3],
    }
