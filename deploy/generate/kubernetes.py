"""queues.yaml -> the files of deploy/kubernetes that hold figures: workers, Redis, autoscaling, GPUs.

What needs no figure (Flower, metrics, networks, the overlays) is written by hand beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import yaml

from cortex_tasks.config import FleetConfig, ImageConfig
from deploy.generate.text import PlainDumper, Section

__all__ = ["WORKERS", "render_gpu", "render_queues", "render_redis", "render_scaling", "render_workers"]

#: The images that run as Deployments. Together they serve every queue; ``prod`` and ``dev`` are these two in one.
WORKERS: Final = ("nlp", "ml")
UID: Final = 10_001
_HEADER: Final = "# Made from queues.yaml by `make deploy-files`: edit that, or deploy/generate/kubernetes.py.\n"
#: Where Redis answers, and where its password is found.
_SECRETS: Final = "/run/secrets"
#: The metrics' address as KEDA sees it, from its own namespace. The namespace is that of the base.
_METRICS: Final = "http://metrics.cortex.svc.cluster.local:9540"
#: Answers and jobs; Redis may need twice its data while it writes its append-only file anew.
BROKER_MAXMEMORY_BYTES: Final = 10**9
_REDIS_OVERHEAD_BYTES: Final = 256 * 10**6
#: Scratch files of jobs.
_TMP_BYTES: Final = 10**9
#: A start may have to fetch models; 5 s each.
_START_TRIES: Final = 240
#: After the last pass: answers and goodbyes, also to a Redis that is away for a moment. Seconds.
_GOODBYE_S: Final = 60
#: More pods than this are a decision of a person's.
_MOST_PODS: Final = 10


def render_workers(fleet: FleetConfig) -> str:
    """base/workers.yaml: a Deployment and a PodDisruptionBudget an image. Raises ValueError when a queue is served by
    none of them."""
    served = {queue for name in WORKERS for queue in fleet.images[name].queues}
    if left := set(fleet.queues) - served:
        raise ValueError(f"no Deployment consumes {', '.join(sorted(left))}: see WORKERS")
    return _text([made for name in WORKERS for made in (_deployment(fleet, name), _disruptions(name))])


def render_queues(fleet: FleetConfig) -> str:
    """base/queues.yaml: the file itself, which kustomize makes a ConfigMap of; a change of it starts new pods."""
    return _HEADER + (Path(__file__).resolve().parents[2] / "queues.yaml").read_text(encoding="utf-8")


def render_redis(fleet: FleetConfig) -> str:
    """base/redis.yaml: the broker, which keeps everything, and the cache, which keeps what it can."""
    cache_bytes = fleet.model_storage.l2_redis.size
    broker = _redis(
        "broker", BROKER_MAXMEMORY_BYTES, 2 * BROKER_MAXMEMORY_BYTES,
        "--maxmemory-policy noeviction --appendonly yes --appendfsync everysec",
    )  # fmt: skip
    claim = {
        "metadata": {"name": "data"},
        "spec": {
            "accessModes": ["ReadWriteOnce"],
            "resources": {"requests": {"storage": _quantity(10 * BROKER_MAXMEMORY_BYTES)}},
        },
    }
    cache = _redis(
        "cache", cache_bytes, cache_bytes * 11 // 10, "--maxmemory-policy volatile-lru --appendonly no --save ''"
    )
    cache["template"]["spec"]["volumes"].append({"name": "data", "emptyDir": {"sizeLimit": "1M"}})
    return _text([
        _object("apps/v1", "StatefulSet", "redis-broker", broker | {
            "serviceName": "redis-broker", "replicas": 1, "volumeClaimTemplates": [claim],
        }),
        _redis_service("broker"),
        _object("apps/v1", "Deployment", "redis-cache", cache | {"replicas": 1, "strategy": {"type": "Recreate"}}),
        _redis_service("cache"),
    ])  # fmt: skip


def render_scaling(fleet: FleetConfig) -> str:
    """components/autoscaling/scaledobjects.yaml, for KEDA."""
    return _text([_scaled(fleet, name, gpu=False) for name in WORKERS])


def render_gpu(fleet: FleetConfig) -> str:
    """components/gpu/gpu.yaml: patches of the images that can use a GPU."""
    found: list[Section] = []
    for name in WORKERS:
        image = fleet.images[name]
        if not image.gpus:
            continue
        container = {
            "name": "worker",
            "args": _command(image.consumed(gpu=True)),
            "env": [{"name": "CORTEX_GPU", "value": "1"}],
            "resources": {"requests": {"nvidia.com/gpu": image.gpus}, "limits": {"nvidia.com/gpu": image.gpus}},
        }
        spec = {
            "containers": [container],
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        }
        # A new pod may find no free GPU before an old one has given back its own.
        rolling = {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}}
        found.append(_object("apps/v1", "Deployment", name, {"strategy": rolling, "template": {"spec": spec}}))
        found.append(_scaled(fleet, name, gpu=True))
    return _text(found)


# ---------------------------------------------------------------------------------------------------- workers


def _deployment(fleet: FleetConfig, name: str) -> Section:
    image = fleet.images[name]
    models = [model for model in fleet.models.values() if model.queue in image.consumed(gpu=True)]
    longest_s = max(model.limits.time_limit_s for model in models)
    #: What runs when the end comes, which for children is twice their limit; then what has started; then goodbye.
    grace_s = round(longest_s * (3 if any(model.children for model in models) else 2)) + _GOODBYE_S
    pod = _pod(UID) | {
        "terminationGracePeriodSeconds": grace_s,
        "containers": [_container(fleet, name, image, stop_grace_s=longest_s)],
        "volumes": _volumes(fleet, image),
        "topologySpreadConstraints": [{
            "maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway",
            "labelSelector": {"matchLabels": _labels("worker", name)},
        }],
    }  # fmt: skip
    return _object("apps/v1", "Deployment", name, {
        # How many there are is the autoscaler's business, or yours.
        "selector": {"matchLabels": _labels("worker", name)},
        "revisionHistoryLimit": 3,
        # A rollout whose new pods do not get ready stops there, with the old ones at work.
        "progressDeadlineSeconds": _START_TRIES * 5 + 300,
        "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
        "template": {"metadata": {"labels": _labels("worker", name)}, "spec": pod},
    })  # fmt: skip


def _container(fleet: FleetConfig, name: str, image: ImageConfig, *, stop_grace_s: float) -> Section:
    settings = {
        "CORTEX_IMAGE": name,
        "CORTEX_GPU": "0",
        "CORTEX_QUEUES_FILE": "/etc/cortex/queues.yaml",
        "CORTEX_BROKER_URL": "redis://redis-broker:6379/0",
        "CORTEX_BROKER_PASSWORD_FILE": f"{_SECRETS}/broker_password",
        "CORTEX_CACHE_URL": "redis://redis-cache:6379/0",
        "CORTEX_CACHE_PASSWORD_FILE": f"{_SECRETS}/cache_password",
        "CORTEX_STOP_GRACE_S": f"{stop_grace_s:g}",
    }
    storage = image.storage + fleet.storage_config.cache_store.max_size + _TMP_BYTES
    limits = {
        "cpu": f"{image.cpus:g}", "memory": _quantity(image.memory), "ephemeral-storage": _quantity(storage),
    }  # fmt: skip
    return {
        "name": "worker",
        "image": f"cortex-{name}",
        "args": _command(image.consumed(gpu=False)),
        "env": [{"name": key, "value": value} for key, value in settings.items()],
        # Requests are the limits: a worker that is promised less is the first to be ended when a node is full.
        "resources": {"requests": limits, "limits": limits},
        "startupProbe": _asked("started", period_s=5, failures=_START_TRIES),
        "readinessProbe": _asked("ready", period_s=10, failures=3),
        "livenessProbe": _asked("live", period_s=30, failures=3),
        "lifecycle": {"preStop": {"exec": {"command": ["python", "-m", "workers.probe", "stop"]}}},
        "securityContext": _hardened(),
        "volumeMounts": [
            {"name": "models", "mountPath": str(fleet.storage_config.model_store.path)},
            {"name": "cache", "mountPath": str(fleet.storage_config.cache_store.path)},
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "shm", "mountPath": "/dev/shm"},
            {"name": "queues", "mountPath": "/etc/cortex", "readOnly": True},
            {"name": "secrets", "mountPath": _SECRETS, "readOnly": True},
        ],
    }


def _volumes(fleet: FleetConfig, image: ImageConfig) -> list[Section]:
    """Nothing of a worker has to outlive it: models come from the cache's Redis, or from their origin."""
    return [
        {"name": "models", "emptyDir": {"sizeLimit": _quantity(image.storage)}},
        {"name": "cache", "emptyDir": {"sizeLimit": _quantity(fleet.storage_config.cache_store.max_size)}},
        {"name": "tmp", "emptyDir": {"sizeLimit": _quantity(_TMP_BYTES)}},
        # Counts as memory of the pod.
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": _quantity(fleet.memory_config.shared_memory)}},
        {"name": "queues", "configMap": {"name": "queues"}},
        _secrets("broker_password", "cache_password"),
    ]


def _command(queues: Sequence[str]) -> list[str]:
    return ["celery", "-A", "workers.app", "worker", "-Q", ",".join(queues)]


def _asked(question: str, *, period_s: int, failures: int) -> Section:
    command = ["python", "-m", "workers.probe", question]
    # An interpreter that starts beside a busy model takes its time.
    return {
        "exec": {"command": command}, "periodSeconds": period_s, "timeoutSeconds": 10, "failureThreshold": failures,
    }  # fmt: skip


def _disruptions(name: str) -> Section:
    """One at a time: with one replica as well, for its jobs go back and are answered by the next."""
    return _object("policy/v1", "PodDisruptionBudget", name, {
        "maxUnavailable": 1, "selector": {"matchLabels": _labels("worker", name)},
    })  # fmt: skip


# ------------------------------------------------------------------------------------------------ autoscaling


def _scaled(fleet: FleetConfig, name: str, *, gpu: bool) -> Section:
    """One trigger a queue: the one that wants the most pods counts. A pod more for each batch of jobs that waits or is
    being worked on."""
    behaviour = {
        "scaleUp": {"policies": [{"type": "Percent", "value": 100, "periodSeconds": 30}]},
        "scaleDown": {
            "stabilizationWindowSeconds": 300, "policies": [{"type": "Pods", "value": 1, "periodSeconds": 60}],
        },
    }  # fmt: skip
    return _object("keda.sh/v1alpha1", "ScaledObject", name, {
        "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": name},
        "pollingInterval": 15,
        "minReplicaCount": 1,
        "maxReplicaCount": _MOST_PODS,
        "advanced": {"horizontalPodAutoscalerConfig": {"behavior": behaviour}},
        "triggers": [_trigger(fleet, queue, gpu) for queue in fleet.images[name].consumed(gpu=gpu)],
    })  # fmt: skip


def _trigger(fleet: FleetConfig, queue: str, gpu: bool) -> Section:
    models = [model for model in fleet.models.values() if model.queue == queue]
    batch = max(model.batching.on("cuda" if gpu else "cpu").max_items for model in models)
    return {
        "type": "metrics-api",
        "metricType": "AverageValue",
        "metadata": {"url": f"{_METRICS}/queues/{queue}", "valueLocation": "total", "targetValue": str(batch)},
    }


# ------------------------------------------------------------------------------------------------------ Redis


def _redis(role: str, maxmemory_bytes: int, memory_bytes: int, options: str) -> Section:
    """The spec of a Redis whose password is in a file: as an argument, every process of the node could read it."""
    # The shell's own `read` says no where the last line is not ended; the password is there all the same.
    password = f'{{ read -r PASSWORD || [ -n "$PASSWORD" ]; }} < {_SECRETS}/{role}_password'
    start = (
        f'umask 077 && {password} && printf \'requirepass "%s"\\n\' "$PASSWORD" > /tmp/redis.conf && '
        f'exec redis-server /tmp/redis.conf --dir /data --maxmemory "$MAXMEMORY" '
        f"--client-output-buffer-limit pubsub 256mb 64mb 60 {options}"
    )
    # REDISCLI_AUTH keeps the password out of the arguments here as well.
    ping = f'{password} && REDISCLI_AUTH="$PASSWORD" redis-cli ping | grep -q PONG'
    limits = {"cpu": "1", "memory": _quantity(memory_bytes + _REDIS_OVERHEAD_BYTES)}
    asked = {"exec": {"command": ["sh", "-c", ping]}, "periodSeconds": 10, "timeoutSeconds": 5}
    container = {
        "name": "redis",
        "image": "redis:7.4-bookworm",
        "command": ["sh", "-c", start],
        "env": [{"name": "MAXMEMORY", "value": str(maxmemory_bytes)}],
        "ports": [{"name": "redis", "containerPort": 6379}],
        "resources": {"requests": limits, "limits": limits},
        # While it reads its append-only file it answers, but not with PONG.
        "startupProbe": asked | {"failureThreshold": 60},
        "readinessProbe": asked | {"failureThreshold": 3},
        "livenessProbe": {"tcpSocket": {"port": "redis"}, "periodSeconds": 30, "failureThreshold": 5},
        "securityContext": _hardened(),
        "volumeMounts": [
            {"name": "data", "mountPath": "/data"},
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "secrets", "mountPath": _SECRETS, "readOnly": True},
        ],
    }
    pod = _pod(999) | {
        "terminationGracePeriodSeconds": 60,
        "containers": [container],
        "volumes": [{"name": "tmp", "emptyDir": {"sizeLimit": "1M"}}, _secrets(f"{role}_password")],
    }
    labels = _labels("redis", f"redis-{role}")
    return {"selector": {"matchLabels": labels}, "template": {"metadata": {"labels": labels}, "spec": pod}}


def _redis_service(role: str) -> Section:
    name = f"redis-{role}"
    return _object("v1", "Service", name, {
        "selector": _labels("redis", name), "ports": [{"name": "redis", "port": 6379, "targetPort": "redis"}],
    })  # fmt: skip


# ------------------------------------------------------------------------------------------- what they share


def _pod(uid: int) -> Section:
    """What every pod's spec begins with."""
    return {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True, "runAsUser": uid, "runAsGroup": uid, "fsGroup": uid,
            "fsGroupChangePolicy": "OnRootMismatch", "seccompProfile": {"type": "RuntimeDefault"},
        },
    }  # fmt: skip


def _hardened() -> Section:
    return {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip


def _secrets(*names: str) -> Section:
    """Of the Secret "cortex", no more than these."""
    items = [{"key": name, "path": name} for name in names]
    return {"name": "secrets", "secret": {"secretName": "cortex", "defaultMode": 0o440, "items": items}}


def _labels(component: str, name: str) -> dict[str, str]:
    return {
        "app.kubernetes.io/name": name,
        "app.kubernetes.io/component": component,
        "app.kubernetes.io/part-of": "cortex",
    }


def _object(version: str, kind: str, name: str, spec: Section) -> Section:
    labels = {"app.kubernetes.io/part-of": "cortex"}
    return {"apiVersion": version, "kind": kind, "metadata": {"name": name, "labels": labels}, "spec": spec}


def _quantity(size_bytes: int) -> str:
    """Bytes as Kubernetes writes them, in powers of 1,000."""
    for unit, factor in (("G", 10**9), ("M", 10**6)):
        if size_bytes % factor == 0 and size_bytes:
            return f"{size_bytes // factor}{unit}"
    return str(size_bytes)


def _text(documents: Sequence[Section]) -> str:
    return _HEADER + yaml.dump_all(documents, Dumper=PlainDumper, sort_keys=False, width=110, explicit_start=True)
