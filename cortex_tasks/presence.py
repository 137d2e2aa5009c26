"""Who is there: what each worker writes about itself in Redis, and how everyone else reads it.

A worker writes its card every few seconds under ``cortex:worker:<node>`` with a TTL, and its name into the
sorted set ``cortex:workers`` (score: epoch seconds). A worker that dies leaves no card after PRESENCE_TTL_S, and
counts as silent well before.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

__all__ = [
    "PRESENCE_TTL_S",
    "SILENT_AFTER_S",
    "WORKERS_KEY",
    "BudgetCard",
    "ModelCard",
    "StoreCard",
    "TierCard",
    "WorkerCard",
    "read_cards",
    "worker_key",
]

WORKERS_KEY: Final = "cortex:workers"
PRESENCE_TTL_S: Final = 15
#: A worker that has not written its card for this long (three times its usual pause) is dead, stuck or cut off.
SILENT_AFTER_S: Final = 6.0


def worker_key(node: str) -> str:
    return f"cortex:worker:{node}"


class _Card(BaseModel):
    # A newer worker may say more than an older client knows.
    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


class ModelCard(_Card):
    """One model of one worker."""

    alias: str
    queue: str
    #: ``idle``: lazy and not loaded yet; ``unavailable``: ``reason`` says why and the remedy.
    state: Literal["idle", "loading", "ready", "unavailable"]
    revision: str = ""
    adapter: str = ""
    backend: str = ""
    precision: str = ""
    #: What runs and how it compares with fp32, e.g. "openvino int8 cos 0.9981 top10 0.957"; "" until it is ready.
    engine: str = ""
    reason: str = ""
    size_bytes: int = 0
    load_ms: float = 0.0
    warm_ms: float = 0.0
    jobs: int = 0
    items: int = 0
    batches: int = 0
    #: In forward passes; those that run at the same time count each.
    forward_s: float = 0.0
    #: Padded tokens of a full batch, of the task whose batches are the largest: learned, or as configured.
    budget_tokens: int = 0
    #: The tier its files came from: ``local``, ``disk``, ``l2`` or ``origin``; "" without files.
    tier: str = ""
    #: Getting hold of the files; part of ``load_ms``.
    fetch_ms: float = 0.0
    loads: int = 0


class TierCard(_Card):
    """What one tier of the model store did since the worker started."""

    hits: int = 0
    misses: int = 0
    #: It was damaged, full, or did not answer.
    faults: int = 0
    #: What the hits read from it.
    read_bytes: int = 0
    #: Of a hit.
    mean_ms: float = 0.0


class BudgetCard(_Card):
    """One of the budgets of queues.yaml: what is used of it, and the limit."""

    used_bytes: int = 0
    limit_bytes: int = 0


class StoreCard(_Card):
    """The model store of one worker."""

    #: Of the models loaded in the worker's own process, and what they may take together.
    memory_bytes: int = 0
    memory_limit_bytes: int = 0
    #: By their names in queues.yaml: ``model_cache``, ``inference_buffer`` (a full batch of the neediest model),
    #: ``process_pool``, ``shared_memory``, ``model_store``.
    budgets: dict[str, BudgetCard] = {}
    #: Of the fits that are remembered.
    fits_bytes: int = 0
    #: Models thrown out of memory, and loads of a model that was in memory before.
    evictions: int = 0
    reloads: int = 0
    disk_evictions: int = 0
    #: By ``memory``, ``local``, ``disk``, ``l2``, ``origin``, ``fits``.
    tiers: dict[str, TierCard] = {}


class WorkerCard(_Card):
    """One worker. Times are epoch seconds."""

    node: str
    image: str
    host: str
    pid: int
    #: ``starting``: pinned models are loading; ``stopping``: finishes what it took.
    state: Literal["starting", "ready", "stopping"]
    queues: tuple[str, ...]
    models: tuple[ModelCard, ...]
    started_at: float
    seen_at: float
    jobs: int = 0
    items: int = 0
    errors: int = 0
    #: Items answered a second over the last few seconds.
    items_per_s: float = 0.0
    #: Jobs taken from each queue and not yet answered (kombu's "unacked", by queue).
    in_flight: dict[str, int] = {}
    store: StoreCard = StoreCard()

    def is_silent(self, now_s: float) -> bool:
        """Whether the worker has stopped writing its card. ``now_s``: epoch seconds."""
        return now_s - self.seen_at > SILENT_AFTER_S


def parse_cards(raw: list[bytes | str | None]) -> list[WorkerCard]:
    """Cards from an MGET; keys that expired meanwhile are left out, and so are cards that this version cannot read:
    one odd worker must not hide the others."""
    cards = []
    for text in raw:
        if text is not None:
            with suppress(ValidationError):
                cards.append(WorkerCard.model_validate_json(text))
    return cards


def read_cards(redis: Any) -> list[WorkerCard]:
    """Every worker's card, by node name. ``redis``: a synchronous redis-py client."""
    nodes = [node.decode() if isinstance(node, bytes) else node for node in redis.zrange(WORKERS_KEY, 0, -1)]
    if not nodes:
        return []
    return sorted(parse_cards(redis.mget([worker_key(node) for node in nodes])), key=lambda card: card.node)
