"""queues.yaml -> docker/compose.yaml and compose.gpu.yaml. The limits of each image come from ``images:``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import yaml

from cortex_tasks.config import FleetConfig, ImageConfig
from deploy.generate.text import PlainDumper, Section

__all__ = ["render", "render_gpu"]

_HEADER: Final = "# Made from queues.yaml by `make deploy-files`: edit that, or deploy/generate/compose.py.\n"
_USE: Final = "#   docker compose -f docker/compose.yaml --profile small up -d      docs/images.md tells the rest.\n"
#: Which sets of services (profiles) a worker image belongs to.
_PROFILES: Final = {"nlp": ["small", "full"], "ml": ["full"]}
_MONITORING: Final = ["full", "prod", "monitoring"]
#: Seconds. A worker finishes what has started for 20 s, then gives the rest back and says goodbye.
_STOP_GRACE: Final = "45s"
#: What a job's scratch files and matplotlib's cache may take. It counts as memory.
_TMP: Final = "/tmp:size=256m,mode=1777"
#: Redis may need twice its data while it writes its append-only file anew.
_BROKER_MAXMEMORY_BYTES: Final = 10**9
_OVERHEAD_BYTES: Final = 256 * 10**6
_HARDENED: Final[Section] = {
    "read_only": True,
    "cap_drop": ["ALL"],
    "security_opt": ["no-new-privileges:true"],
    "pids_limit": 512,
    "restart": "unless-stopped",
}


def render(fleet: FleetConfig) -> str:
    """The text of docker/compose.yaml."""
    services = {
        "redis-broker": _redis(
            "broker", _BROKER_MAXMEMORY_BYTES, 2 * _BROKER_MAXMEMORY_BYTES, "noeviction", "--appendonly yes "
            "--client-output-buffer-limit pubsub 256mb 64mb 60"
        ),
        "redis-cache": _redis(
            "cache", size := fleet.model_storage.l2_redis.size, size, "volatile-lru", "--appendonly no --save ''"
        ),
        **{name: _worker(fleet, name, image) for name, image in fleet.images.items() if image.queues},
        "flower": _flower(fleet),
        "metrics": _metrics(fleet),
        "prometheus": _prometheus(),
        "grafana": _grafana(),
    }  # fmt: skip
    secrets = ("broker_password", "cache_password", "flower_auth", "grafana_password")
    return _text({
        "name": "cortex",
        "services": services,
        "networks": {
            # No way out, and nothing of it is published: Redis asks nobody but who was let in.
            "fleet": {"internal": True},
            # Workers fetch models.
            "outside": {},
            # What a person opens.
            "browser": {},
        },
        "volumes": {key: {} for key in ("models", "cache", "broker-data", "prometheus-data", "grafana-data")},
        "secrets": {name: {"file": f"./secrets/{name}"} for name in secrets},
    })  # fmt: skip


def render_gpu(fleet: FleetConfig) -> str:
    """The text of docker/compose.gpu.yaml: what a host with GPUs adds."""
    services = {
        name: {
            "image": f"${{CORTEX_IMAGES:-datapunk/cortex}}:{name}-cuda",
            "build": {"args": {"TORCH": "cuda", "TORCH_INDEX": ""}},
            "environment": {"CORTEX_GPU": "1"},
            "deploy": {"resources": {"reservations": {"devices": [
                {"driver": "nvidia", "count": image.gpus, "capabilities": ["gpu"]}
            ]}}},
        }
        for name, image in fleet.images.items()
        if image.gpus
    }  # fmt: skip
    return _text({"services": services})


def _text(document: Section) -> str:
    return _HEADER + _USE + "\n" + yaml.dump(document, Dumper=PlainDumper, sort_keys=False, width=110)


def _health(test: list[str], start_period: str = "30s") -> Section:
    return {"test": test, "interval": "10s", "timeout": "5s", "retries": 3, "start_period": start_period}


def _limits(name: str, cpus: float, memory_bytes: int) -> Section:
    """Each can be lowered where the machine is smaller: an engine refuses CPUs that it does not have."""
    variable = name.upper().replace("-", "_")
    memory = f"${{{variable}_MEMORY:-{memory_bytes}}}"
    return {
        "cpus": f"${{{variable}_CPUS:-{cpus:g}}}",
        "mem_limit": memory,
        # The same: no swap, in which a model would be slower than no answer.
        "memswap_limit": memory,
    }


def _gated(services: Iterable[str]) -> Section:
    return {name: {"condition": "service_healthy"} for name in services}


# ------------------------------------------------------------------------------------------------------- Redis


def _redis(role: str, maxmemory_bytes: int, memory_bytes: int, policy: str, options: str) -> Section:
    """A Redis whose password is in a file: as an argument, every process of the host could read it."""
    start = (
        f'umask 077 && printf \'requirepass "%s"\\n\' "$$(cat /run/secrets/{role}_password)" > /tmp/redis.conf '
        f"&& exec redis-server /tmp/redis.conf --dir /data --maxmemory $${{MAXMEMORY}} --maxmemory-policy {policy} "
        f"{options}"
    )
    ask = f'REDISCLI_AUTH="$$(cat /run/secrets/{role}_password)" redis-cli ping | grep -q PONG'
    place: Section = {"volumes": [f"{role}-data:/data"]} if role == "broker" else {"tmpfs": ["/data:size=1m"]}
    return {
        "image": "${CORTEX_REDIS_IMAGE:-redis:7.4-bookworm}",
        "user": "999:999",
        "command": ["sh", "-c", start],
        "environment": {"MAXMEMORY": f"${{CORTEX_{role.upper()}_MAXMEMORY:-{maxmemory_bytes}}}"},
        "healthcheck": _health(["CMD-SHELL", ask]),
        **_limits(f"CORTEX_{role}", 1, memory_bytes + _OVERHEAD_BYTES),
        **_HARDENED,
        "tmpfs": ["/tmp:size=1m,mode=1777", *place.pop("tmpfs", [])],
        **place,
        "networks": ["fleet"],
        "secrets": [f"{role}_password"],
        "stop_grace_period": _STOP_GRACE,
    }


# ----------------------------------------------------------------------------------------------------- workers


def _cortex(fleet: FleetConfig, image: str) -> Section:
    """What all containers of Cortex's own images share."""
    limits = fleet.images[image]
    return {
        "image": f"${{CORTEX_IMAGES:-datapunk/cortex}}:{image}",
        "build": {"context": "..", "dockerfile": "docker/Dockerfile", "target": image},
        "environment": {
            "CORTEX_BROKER_URL": "redis://redis-broker:6379/0",
            "CORTEX_BROKER_PASSWORD_FILE": "/run/secrets/broker_password",
            "CORTEX_CACHE_URL": "redis://redis-cache:6379/0",
            "CORTEX_CACHE_PASSWORD_FILE": "/run/secrets/cache_password",
        },
        **_limits(f"CORTEX_{image}", limits.cpus, limits.memory),
        **_HARDENED,
        "tmpfs": [_TMP],
        "depends_on": _gated(("redis-broker", "redis-cache")),
        "networks": ["fleet"],
        "secrets": ["broker_password", "cache_password"],
    }


def _worker(fleet: FleetConfig, name: str, image: ImageConfig) -> Section:
    service = _cortex(fleet, name) | {
        "profiles": _PROFILES.get(name, [name]),
        "shm_size": fleet.memory_config.shared_memory,
        # The worker keeps to it: a volume of the local driver has no size.
        "labels": {"cortex.storage_bytes": str(image.storage)},
        "volumes": ["models:/models", "cache:/cache"],
        "networks": ["fleet", "outside"],
        "stop_grace_period": _STOP_GRACE,
    }
    if name == "dev":
        service["volumes"] = [*service["volumes"], "..:/src:ro"]
        service["environment"] = service["environment"] | {"CORTEX_QUEUES_FILE": "/src/queues.yaml"}
    return service


# -------------------------------------------------------------------------------------------------- monitoring


def _open_url(url: str) -> list[str]:
    return ["CMD", "python", "-c", f"import urllib.request as r; r.urlopen({url!r}, timeout=4)"]


def _flower(fleet: FleetConfig) -> Section:
    return _cortex(fleet, "base") | {
        "profiles": _MONITORING,
        "command": ["celery", "-A", "workers.app", "flower", "--address=0.0.0.0", "--port=5555",
                    "--conf=/etc/cortex/flowerconfig.py"],
        "volumes": ["./flowerconfig.py:/etc/cortex/flowerconfig.py:ro"],
        "healthcheck": _health(_open_url("http://127.0.0.1:5555/healthcheck")),
        "ports": ["127.0.0.1:${CORTEX_FLOWER_PORT:-5555}:5555"],
        "networks": ["fleet", "browser"],
        "secrets": ["broker_password", "cache_password", "flower_auth"],
    }  # fmt: skip


def _metrics(fleet: FleetConfig) -> Section:
    return _cortex(fleet, "base") | {
        "profiles": _MONITORING,
        "command": ["cortex", "metrics", "--listen", "0.0.0.0:9540"],
        "healthcheck": _health(_open_url("http://127.0.0.1:9540/healthcheck")),
    }


def _prometheus() -> Section:
    return {
        "image": "${CORTEX_PROMETHEUS_IMAGE:-prom/prometheus:v3.5.0}",
        "profiles": _MONITORING,
        "command": ["--config.file=/etc/prometheus/prometheus.yml", "--storage.tsdb.path=/prometheus",
                    "--storage.tsdb.retention.time=15d"],
        "volumes": ["./prometheus.yml:/etc/prometheus/prometheus.yml:ro", "prometheus-data:/prometheus"],
        "healthcheck": _health(["CMD", "wget", "-q", "-O", "/dev/null", "http://127.0.0.1:9090/-/healthy"]),
        **_limits("CORTEX_PROMETHEUS", 1, 10**9),
        **_HARDENED,
        "depends_on": _gated(("flower", "metrics")),
        "networks": ["fleet"],
    }  # fmt: skip


def _grafana() -> Section:
    return {
        "image": "${CORTEX_GRAFANA_IMAGE:-grafana/grafana:12.1.0}",
        "profiles": _MONITORING,
        "environment": {
            "GF_SECURITY_ADMIN_PASSWORD__FILE": "/run/secrets/grafana_password",
            "GF_ANALYTICS_REPORTING_ENABLED": "false",
            "GF_ANALYTICS_CHECK_FOR_UPDATES": "false",
            "GF_USERS_ALLOW_SIGN_UP": "false",
            "GF_LOG_MODE": "console",
        },
        "volumes": ["./grafana/provisioning:/etc/grafana/provisioning:ro",
                    "./grafana/dashboards:/var/lib/grafana-dashboards:ro",
                    "grafana-data:/var/lib/grafana"],
        "healthcheck": _health(["CMD", "wget", "-q", "-O", "/dev/null", "http://127.0.0.1:3000/api/health"]),
        **_limits("CORTEX_GRAFANA", 1, 10**9),
        **_HARDENED,
        "tmpfs": ["/tmp:size=64m,mode=1777"],
        "depends_on": _gated(("prometheus",)),
        "ports": ["127.0.0.1:${CORTEX_GRAFANA_PORT:-3000}:3000"],
        "networks": ["fleet", "browser"],
        "secrets": ["grafana_password"],
    }  # fmt: skip
