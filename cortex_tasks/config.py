"""queues.yaml -> FleetConfig. (The CORTEX_* variables are in ``settings``; its names are also here.)"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import Field, ValidationError, model_validator

from cortex_tasks.catalog import nearest
from cortex_tasks.config_fields import (
    ADAPTERS,
    ALIAS_PATTERN,
    AdapterName,
    Alias,
    Count,
    Flag,
    Number,
    Schedule,
    Section,
    Size,
    Source,
    TaskName,
)
from cortex_tasks.config_problems import dotted, explain
from cortex_tasks.config_wiring import KeyPath, disagreements
from cortex_tasks.errors import ConfigError, InvalidParameter, UnknownModel
from cortex_tasks.settings import Settings, mask_url

if TYPE_CHECKING:
    from cortex_tasks.yaml_positions import Problem

__all__ = [
    "ADAPTERS",
    "ALIAS_PATTERN",
    "Batching",
    "CacheWarming",
    "Delivery",
    "FleetConfig",
    "GpuBatching",
    "ImageConfig",
    "Limits",
    "ModelConfig",
    "Settings",
    "default_queues_file",
    "load_fleet",
    "mask_url",
]

#: Problems of one file that a message lists; a file of nonsense has thousands.
_MAX_PROBLEMS: Final = 100


class GpuBatching(Section):
    """The limits of one forward pass where a GPU computes it: its caches ask for no small batches."""

    max_items: Annotated[Count, Field(ge=1, le=65_536)] = 4096
    max_padded_tokens: Annotated[Count, Field(ge=1)] = 131_072


class Batching(Section):
    """How many items may share one forward pass."""

    #: Learn the best budget below ``max_padded_tokens``, at warm-up and online; models with a native backend or in
    #: child processes use it as it is.
    learn: bool = True
    max_items: Annotated[Count, Field(ge=1, le=4096)] = 64
    #: Items x longest item, in tokens (in points for series).
    max_padded_tokens: Annotated[Count, Field(ge=1)] = 4096
    #: In the place of the two above on a worker whose device is a GPU; None: the same as on a CPU.
    gpu: GpuBatching | None = None

    def on(self, device: str) -> Batching:
        """The limits that hold on a device ("cpu", "cuda", "cuda:0", ...)."""
        if self.gpu is None or device == "cpu":
            return self
        return self.model_copy(update=self.gpu.model_dump())


class Limits(Section):
    """What a model accepts. Each is enforced at submission and again at the worker."""

    text_chars: Annotated[Count, Field(ge=1)] = 10_000
    inputs_per_job: Annotated[Count, Field(ge=1)] = 1_000
    history_points: Annotated[Count, Field(ge=2)] = 20_000
    horizon_points: Annotated[Count, Field(ge=1)] = 3_650
    #: How long the model's vectors are, so that ``dimensions`` beyond it are refused at submission; None: not told.
    dimensions: Annotated[Count, Field(ge=1)] | None = None
    #: Jobs waiting in the model's queue beyond which submission is refused.
    queue_jobs: Annotated[Count, Field(ge=1)] = 100_000
    #: Deliveries of one job (each after a worker's death) before it is parked as poison.
    attempts: Annotated[Count, Field(ge=1, le=100)] = 3
    #: A child process that takes longer over one batch is killed (adapters that run in children).
    time_limit_s: Annotated[Number, Field(gt=0)] = 300.0


class Gate(Section):
    """What an int8 engine must reach beside fp32 on held-out texts; below, the model runs in fp32."""

    mean_cosine: Annotated[Number, Field(ge=0, le=1)] = 0.995
    #: The share of each text's ten nearest neighbours that are the same.
    top10_overlap: Annotated[Number, Field(ge=0, le=1)] = 0.95


#: Adapters that compute nothing: a look into the cache costs more than their answer.
_FREE_ADAPTERS: Final = frozenset({"echo"})


class ModelConfig(Section):
    """One model alias."""

    source: Source
    #: A pinned revision of the source (a commit, a digest); None takes what the source holds.
    revision: str | None = None
    #: Other places of the same files, asked in order when the source fails.
    mirrors: tuple[Source, ...] = ()
    adapter: AdapterName
    tasks: Annotated[tuple[TaskName, ...], Field(min_length=1)]
    backend: Literal["torch", "openvino", "onnx", "native", "auto"] = "torch"
    precision: Literal["fp32", "bf16", "fp16", "int8"] = "fp32"
    gate: Gate = Gate()
    queue: Alias
    images: Annotated[tuple[str, ...], Field(min_length=1)]
    tier: Literal["l1", "l2", "disk"] = "l1"
    load: Literal["pinned", "lazy"] = "lazy"
    #: Child processes that host the adapter; 0 runs it in the worker's own process.
    children: Annotated[Count, Field(ge=0, le=64)] = 0
    batching: Batching = Batching()
    #: Whether answers are cached; "auto": unless the adapter answers for less than a look into the cache costs.
    cache: Literal["auto", "always", "never"] = "auto"
    cache_ttl_s: Annotated[Count, Field(ge=300, le=86_400)] = 3_600
    limits: Limits = Limits()
    #: The adapter's own options; the adapter validates them when it loads.
    options: dict[str, Any] = Field(default_factory=dict)

    @property
    def cached(self) -> bool:
        """Whether clients and workers look for this model's answers, and store them."""
        return self.cache == "always" or (self.cache == "auto" and self.adapter not in _FREE_ADAPTERS)


class ImageConfig(Section):
    """One worker image: the queues it consumes and its limits."""

    queues: tuple[Alias, ...] = ()
    #: Consumed as well where a GPU is visible.
    gpu_queues: tuple[Alias, ...] = ()
    cpus: Annotated[Number, Field(gt=0)]
    memory: Size
    gpus: Annotated[Count, Field(ge=0)] = 0
    gpu_optional: Flag = False
    storage: Size

    def consumed(self, *, gpu: bool) -> tuple[str, ...]:
        """The ``-Q`` list of this image."""
        return tuple(dict.fromkeys((*self.queues, *(self.gpu_queues if gpu else ()))))


class CacheTier(Section):
    """A cache tier: its size in bytes and the time its entries live."""

    size: Size
    ttl_s: Annotated[Count, Field(ge=1)]


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
    cleanup_threshold: Annotated[Number, Field(gt=0, le=1)] = 0.85


class CacheStoreDisk(Section):
    path: Path = Path("/cache")
    max_size: Size = 5 * 10**9
    ttl_s: Annotated[Count, Field(ge=1)] = 86_400


class StorageConfig(Section):
    model_store: ModelStoreDisk = ModelStoreDisk()
    cache_store: CacheStoreDisk = CacheStoreDisk()


class Delivery(Section):
    """How jobs are kept safe on their way."""

    #: A worker renews its claim on a job while it lives; a claim older than this is given to another worker.
    lease_s: Annotated[Number, Field(ge=1)] = 30.0
    #: How often abandoned jobs are looked for.
    sweep_s: Annotated[Number, Field(gt=0)] = 5.0
    #: How long an unread answer is kept.
    result_ttl_s: Annotated[Count, Field(ge=60)] = 3_600


class NearMemory(Section):
    """Answers kept in each client's own memory."""

    size: Size = 64 * 10**6
    ttl_s: Annotated[Count, Field(ge=1)] = 300


class CacheConfig(Section):
    """The result cache, beside ``models.<alias>.cache_ttl_s``."""

    near: NearMemory = NearMemory()
    #: Its part of ``model_storage.l2_redis.size``; half of that when it is not given.
    max_size: Size | None = None
    #: Larger answers are not stored.
    entry_max_size: Size = 10**6


class CacheWarming(Section):
    """Computing ahead what is asked for often. Its presence switches it on: frequent inputs are then kept in Redis."""

    #: Cron's five fields, UTC.
    schedule: Schedule
    #: The models asked the most of late, whose inputs are warmed.
    models: Annotated[Count, Field(ge=1, le=100)] = 3
    #: The inputs asked for the most, of each.
    inputs: Annotated[Count, Field(ge=1, le=100_000)] = 1_000
    #: Longer inputs are neither kept nor warmed.
    input_max_bytes: Annotated[Count, Field(ge=1, le=1_000_000)] = 2_048
    #: Nothing new is begun after so long, for all models of a worker together.
    time_limit_s: Annotated[Number, Field(gt=0, le=3_600)] = 60.0


class FleetConfig(Section):
    """The whole of queues.yaml."""

    version: Literal[1]
    models: Annotated[dict[Alias, ModelConfig], Field(min_length=1)]
    images: Annotated[dict[Alias, ImageConfig], Field(min_length=1)]
    delivery: Delivery = Delivery()
    cache: CacheConfig = CacheConfig()
    cache_warming: CacheWarming | None = None
    model_storage: ModelStorage = ModelStorage()
    memory_config: MemoryConfig = MemoryConfig()
    storage_config: StorageConfig = StorageConfig()

    @model_validator(mode="after")
    def _models_queues_and_images_agree(self) -> FleetConfig:
        found = disagreements(self.model_dump(include={"models", "images"}))
        if problems := [f"{dotted(path)}: {message}" for path, message in found]:
            raise ValueError("; ".join(problems))
        return self

    @property
    def answers_max_bytes(self) -> int:
        """What the result cache may take of Redis."""
        whole = self.model_storage.l2_redis.size
        return whole // 2 if self.cache.max_size is None else min(whole, self.cache.max_size)

    @property
    def weights_max_bytes(self) -> int:
        """What models and fits may take of Redis."""
        return self.model_storage.l2_redis.size - self.answers_max_bytes

    @cached_property
    def queues(self) -> tuple[str, ...]:
        """Every queue that a model names, in the file's order."""
        return tuple(dict.fromkeys(model.queue for model in self.models.values()))

    def model(self, alias: str | None, task: str) -> tuple[str, ModelConfig]:
        """The model for a task: by alias, or the first in the file that serves the task when alias is None.

        Raises UnknownModel with the nearest names, InvalidParameter on what is no alias.
        """
        if alias is None:
            for name, model in self.models.items():
                if task in model.tasks:
                    return name, model
            raise UnknownModel(f"no model in queues.yaml serves task {task!r}", {"task": task})
        if not isinstance(alias, str):
            raise InvalidParameter(f"model must be an alias, not {type(alias).__name__}")
        found = self.models.get(alias)
        if found is not None and task in found.tasks:
            return alias, found
        serving = [name for name, model in self.models.items() if task in model.tasks]
        if found is None:
            raise UnknownModel(f"unknown model {alias!r}{nearest(alias, serving)}", {"model": alias})
        raise UnknownModel(
            f"model {alias!r} does not serve task {task!r} (it serves {', '.join(found.tasks)})"
            f"{nearest(alias, serving)}",
            {"model": alias, "task": task},
        )


def default_queues_file() -> Path:
    """queues.yaml as installed with the package, or the checkout's."""
    here = Path(__file__).resolve().parent
    installed = here / "queues.yaml"
    return installed if installed.exists() else here.parent / "queues.yaml"


def load_fleet(path: Path | str | None = None) -> FleetConfig:
    """Read and check queues.yaml (CORTEX_QUEUES_FILE, else the default fleet's).

    Raises ConfigError whose message lists every problem, one a line, as ``file:line: path: what is wrong``.
    """
    # Only here is yaml needed.
    from cortex_tasks.yaml_positions import Problem, read_document

    file = Path(path) if path is not None else Settings.from_env().queues_file or default_queues_file()
    document = read_document(_read_text(file))
    problems = list(document.problems)
    try:
        if document.value is not None or not problems:
            fleet = FleetConfig.model_validate(document.value)
    except ValidationError as error:
        seen = {problem.path for problem in problems}
        found = [(path, text) for path, text in _explained(error, document.value) if path not in seen]
        problems += [Problem(document.line(path), path, text) for path, text in found]
    if problems:
        raise ConfigError(_listing(file, problems))
    return fleet


def _explained(error: ValidationError, raw: Any) -> list[tuple[KeyPath, str]]:
    # The whole file's own validator speaks of disagreements, which come with a path each from their source.
    details = [e for e in error.errors(include_url=False) if e["loc"] or e["type"] != "value_error"]
    inner = {tuple(e["loc"])[:-1] for e in details}
    # pydantic counts only the good members of a list; one whose every member is bad is not empty.
    details = [e for e in details if e["type"] != "too_short" or tuple(e["loc"]) not in inner]
    return [explain(e, FleetConfig) for e in details] + list(disagreements(raw))


def _read_text(file: Path) -> str:
    from cortex_tasks.yaml_positions import MAX_BYTES

    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from error
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{file}: larger than {MAX_BYTES:,} bytes; that is no queues.yaml")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}:{data.count(10, 0, error.start) + 1}: not UTF-8 text") from None


def _listing(file: Path, problems: Iterable[Problem]) -> str:
    lines = []
    for line, path, message in sorted(problems, key=lambda problem: problem.line):
        where = f"{dotted(path)}: " if path else ""
        lines.append(f"{file}:{line}: {where}{message}")
    left = len(lines) - _MAX_PROBLEMS
    return "\n".join(lines[:_MAX_PROBLEMS] + ([f"{file}: and {left} more problems"] if left > 0 else []))
