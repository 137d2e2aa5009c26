"""queues.yaml -> FleetConfig, and the CORTEX_* settings.

Sizes are written ``512MB`` or ``2GB`` (powers of 1,000; ``MiB``, ``GiB`` for powers of 1,024) and held as bytes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit, urlunsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, model_validator

from cortex_tasks.catalog import TASKS, nearest
from cortex_tasks.errors import ConfigError, UnknownModel

__all__ = ["FleetConfig", "ImageConfig", "Limits", "ModelConfig", "Settings", "load_fleet", "mask_url"]

_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(B|KB|MB|GB|TB|KiB|MiB|GiB|TiB)\s*$")
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip
ALIAS_PATTERN = r"^[a-z][a-z0-9_.-]{0,62}$"


def _bytes(value: Any) -> Any:
    if isinstance(value, str):
        match = _SIZE.match(value)
        if match is None:
            raise ValueError(f"{value!r} is not a size; write it like '512MB' or '2GB'")
        return int(float(match[1]) * _UNITS[match[2]])
    return value


def _known_task(name: str) -> str:
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}{nearest(name, TASKS)}")
    return name


Size = Annotated[int, BeforeValidator(_bytes), Field(ge=0)]
Alias = Annotated[str, Field(pattern=ALIAS_PATTERN)]
TaskName = Annotated[str, AfterValidator(_known_task)]


class Section(BaseModel):
    """A part of queues.yaml: immutable; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, protected_namespaces=())


class Batching(Section):
    """How many items may share one forward pass."""

    max_items: Annotated[int, Field(ge=1, le=4096)] = 64
    #: Items x longest item, in tokens (in points for series).
    max_padded_tokens: Annotated[int, Field(ge=1)] = 4096


class Limits(Section):
    """What a model accepts. Each is enforced at submission and again at the worker."""

    text_chars: Annotated[int, Field(ge=1)] = 10_000
    inputs_per_job: Annotated[int, Field(ge=1)] = 1_000
    history_points: Annotated[int, Field(ge=2)] = 20_000
    horizon_points: Annotated[int, Field(ge=1)] = 3_650
    #: Jobs waiting in the model's queue beyond which submission is refused.
    queue_jobs: Annotated[int, Field(ge=1)] = 100_000
    #: Deliveries of one job (each after a worker's death) before it is parked as poison.
    attempts: Annotated[int, Field(ge=1, le=100)] = 3
    #: A child process that takes longer over one batch is killed (adapters that run in children).
    time_limit_s: Annotated[float, Field(gt=0)] = 300.0


class ModelConfig(Section):
    """One model alias."""

    source: Annotated[str, Field(pattern=r"^(hub|pypi|file|s3|forge|builtin):.*$")]
    #: A pinned revision of the source (a commit, a digest); None takes what the source holds.
    revision: str | None = None
    adapter: Annotated[str, Field(min_length=1)]
    tasks: Annotated[tuple[TaskName, ...], Field(min_length=1)]
    backend: Literal["torch", "openvino", "onnx", "native", "auto"] = "torch"
    precision: Literal["fp32", "bf16", "fp16", "int8"] = "fp32"
    queue: Alias
    images: Annotated[tuple[str, ...], Field(min_length=1)]
    tier: Literal["l1", "l2", "disk"] = "l1"
    load: Literal["pinned", "lazy"] = "lazy"
    #: Child processes that host the adapter; 0 runs it in the worker's own process.
    children: Annotated[int, Field(ge=0, le=64)] = 0
    batching: Batching = Batching()
    cache_ttl_s: Annotated[int, Field(ge=300, le=86_400)] = 3_600
    limits: Limits = Limits()
    #: The adapter's own options; the adapter validates them when it loads.
    options: dict[str, Any] = Field(default_factory=dict)


class ImageConfig(Section):
    """One worker image: the queues it consumes and its limits."""

    queues: tuple[Alias, ...] = ()
    #: Consumed as well where a GPU is visible.
    gpu_queues: tuple[Alias, ...] = ()
    cpus: Annotated[float, Field(gt=0)]
    memory: Size
    gpus: Annotated[int, Field(ge=0)] = 0
    gpu_optional: bool = False
    storage: Size

    def consumed(self, *, gpu: bool) -> tuple[str, ...]:
        """The ``-Q`` list of this image."""
        return tuple(dict.fromkeys((*self.queues, *(self.gpu_queues if gpu else ()))))


class CacheTier(Section):
    """A cache tier: its size in bytes and the time its entries live."""

    size: Size
    ttl_s: Annotated[int, Field(ge=1)]


class DiskTier(Section):
    path: Path
    max_size: Size


class ModelStorage(Section):
    """Tiers of the model store."""

    l1_memory: CacheTier = CacheTier(size=2 * 10**9, ttl_s=1_800)
    l2_redis: CacheTier = CacheTier(size=10 * 10**9, ttl_s=86_400)
    disk: DiskTier = DiskTier(path=Path("/models"), max_size=50 * 10**9)


class MemoryConfig(Section):
    """Shares of a worker's memory, in bytes."""

    model_cache: Size = 2 * 10**9
    inference_buffer: Size = 10**9
    shared_memory: Size = 512 * 10**6
    process_pool: Size = 512 * 10**6


class ModelStoreDisk(Section):
    path: Path = Path("/models")
    max_size: Size = 10 * 10**9
    #: Fill level (0..1) at which the clean-up begins.
    cleanup_threshold: Annotated[float, Field(gt=0, le=1)] = 0.85


class CacheStoreDisk(Section):
    path: Path = Path("/cache")
    max_size: Size = 5 * 10**9
    ttl_s: Annotated[int, Field(ge=1)] = 86_400


class StorageConfig(Section):
    model_store: ModelStoreDisk = ModelStoreDisk()
    cache_store: CacheStoreDisk = CacheStoreDisk()


class Delivery(Section):
    """How jobs are kept safe on their way."""

    #: A worker renews its claim on a job while it lives; a claim older than this is given to another worker.
    lease_s: Annotated[float, Field(ge=1)] = 30.0
    #: How often abandoned jobs are looked for.
    sweep_s: Annotated[float, Field(gt=0)] = 5.0
    #: How long an unread answer is kept.
    result_ttl_s: Annotated[int, Field(ge=60)] = 3_600


class FleetConfig(Section):
    """The whole of queues.yaml."""

    version: Literal[1]
    models: Annotated[dict[Alias, ModelConfig], Field(min_length=1)]
    images: Annotated[dict[Alias, ImageConfig], Field(min_length=1)]
    delivery: Delivery = Delivery()
    model_storage: ModelStorage = ModelStorage()
    memory_config: MemoryConfig = MemoryConfig()
    storage_config: StorageConfig = StorageConfig()

    @model_validator(mode="after")
    def _images_and_queues_agree(self) -> FleetConfig:
        for alias, model in self.models.items():
            for image in model.images:
                if image not in self.images:
                    raise ValueError(f"models.{alias}.images: unknown image {image!r}{nearest(image, self.images)}")
                if model.queue not in self.images[image].consumed(gpu=True):
                    raise ValueError(f"models.{alias}.queue: image {image!r} does not serve queue {model.queue!r}"
                                     f"{nearest(model.queue, self.images[image].consumed(gpu=True))}")  # fmt: skip
        return self

    @cached_property
    def queues(self) -> tuple[str, ...]:
        """Every queue that a model names, in the file's order."""
        return tuple(dict.fromkeys(model.queue for model in self.models.values()))

    def model(self, alias: str | None, task: str) -> tuple[str, ModelConfig]:
        """The model for a task: by alias, or the first in the file that serves the task when alias is None.

        Raises UnknownModel with the nearest names.
        """
        if alias is None:
            for name, model in self.models.items():
                if task in model.tasks:
                    return name, model
            raise UnknownModel(f"no model in queues.yaml serves task {task!r}", {"task": task})
        found = self.models.get(alias)
        serving = [name for name, model in self.models.items() if task in model.tasks]
        if found is None:
            raise UnknownModel(f"unknown model {alias!r}{nearest(alias, serving)}", {"model": alias})
        if task not in found.tasks:
            raise UnknownModel(
                f"model {alias!r} does not serve task {task!r} (it serves {', '.join(found.tasks)})"
                f"{nearest(alias, serving)}",
                {"model": alias, "task": task},
            )
        return alias, found


def mask_url(url: str) -> str:
    """A Redis URL fit for a message: the password (in the authority or the query) replaced by ``***``."""
    parts = urlsplit(url)
    host = parts.netloc
    if "@" in host:
        user, _, rest = host.rpartition("@")
        name, colon, _ = user.partition(":")
        host = f"{name}{':***' if colon else ''}@{rest}"
    query = re.sub(r"(?i)((?:password|secret|token)=)[^&]*", r"\1***", parts.query)
    return urlunsplit((parts.scheme, host, parts.path, query, ""))


class Settings(BaseModel):
    """The CORTEX_* environment. URLs may hold passwords, so they are secrets; print ``mask_url`` of them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    broker_url: SecretStr = SecretStr("redis://127.0.0.1:6379/0")
    #: Where answers are kept; None: the broker's.
    result_url: SecretStr | None = None
    #: The L2 cache; None: the broker's.
    cache_url: SecretStr | None = None
    queues_file: Path | None = None
    #: The image this worker runs as; None: deduced from its queues.
    image: str | None = None
    models_dir: Path | None = None
    connect_timeout_s: Annotated[float, Field(gt=0)] = 3.0
    #: Hooks into Celery and kombu; "stock" switches one back.
    pool: Literal["cortex", "stock"] = "cortex"
    transport: Literal["cortex", "stock"] = "cortex"
    backend: Literal["cortex", "stock"] = "cortex"

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Read CORTEX_<FIELD> for each field. Raises ConfigError that names the variable, never its value."""
        env = os.environ if environ is None else environ
        given = {name: env[key] for name in cls.model_fields if (key := f"CORTEX_{name.upper()}") in env}
        try:
            return cls.model_validate(given)
        except ValueError as error:
            names = ", ".join(f"CORTEX_{'.'.join(map(str, e['loc'])).upper()}: {e['msg']}" for e in error.errors())  # type: ignore[attr-defined]
            raise ConfigError(f"bad setting: {names}") from None

    @property
    def results(self) -> str:
        return (self.result_url or self.broker_url).get_secret_value()

    @property
    def broker(self) -> str:
        return self.broker_url.get_secret_value()


def default_queues_file() -> Path:
    """queues.yaml as installed with the package, or the checkout's."""
    here = Path(__file__).resolve().parent
    installed = here / "queues.yaml"
    return installed if installed.exists() else here.parent / "queues.yaml"


def load_fleet(path: Path | str | None = None) -> FleetConfig:
    """Read and check queues.yaml (CORTEX_QUEUES_FILE, else the default fleet's). Raises ConfigError."""
    import yaml

    file = Path(path) if path is not None else Settings.from_env().queues_file or default_queues_file()
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error
    return FleetConfig.model_validate(raw)
