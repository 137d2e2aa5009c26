"""The fleet in figures, for Prometheus and for autoscalers: queues, workers, models, the result cache.

Read from Redis when asked; nothing is counted here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from cortex_tasks.cache.report import CacheReport, prometheus, read_report
from cortex_tasks.config import FleetConfig
from cortex_tasks.depths import QueueDepth, read_depths
from cortex_tasks.presence import WorkerCard, read_cards

__all__ = ["Snapshot", "flops_per_token", "read_snapshot", "render"]

#: Bytes of a weight; others are taken for 4.
_WEIGHT_BYTES: Final = {"bf16": 2, "fp16": 2, "int8": 1}
_GAUGES: Final = {
    "cortex_queue_unacked_jobs": ("jobs that a worker has taken and not yet answered", "unacked"),
    "cortex_queue_total_jobs": ("jobs waiting and taken: what to scale by", "total"),
    "cortex_queue_orphaned_jobs": ("jobs taken by a worker that is silent", "orphaned"),
    "cortex_queue_dead_jobs": ("jobs parked on the dead-letter list", "dead"),
}


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The fleet at one moment (``now_s``: epoch seconds)."""

    now_s: float
    depths: Sequence[QueueDepth]
    cards: Sequence[WorkerCard]
    cache: CacheReport


def read_snapshot(broker: Any, cache: Any, fleet: FleetConfig, now_s: float) -> Snapshot:
    """``broker``, ``cache``: synchronous redis-py clients. Raises what redis-py raises."""
    cards = read_cards(broker)
    depths = read_depths(broker, fleet.queues, lease_s=fleet.delivery.lease_s, now_s=now_s)
    report = read_report(cache, list(fleet.models), fleet.model_storage.l2_redis.size, flops_per_token(cards))
    return Snapshot(now_s, depths, cards, report)


def flops_per_token(cards: Sequence[WorkerCard]) -> dict[str, int]:
    """Two operations a weight, of models that workers hold; an upper bound, for embeddings are weights too."""
    return {
        model.alias: 2 * model.size_bytes // _WEIGHT_BYTES.get(model.precision, 4)
        for card in cards
        for model in card.models
        if model.state == "ready"
    }


def render(seen: Snapshot) -> str:
    """Prometheus' text format."""
    return "\n".join([*_queues(seen.depths), *_workers(seen), *prometheus(seen.cache)]) + "\n"


def _queues(depths: Sequence[QueueDepth]) -> Iterator[str]:
    yield from _head("cortex_queue_ready_jobs", "jobs waiting in Redis")
    for depth in depths:
        for lane, jobs in (("interactive", depth.interactive), ("bulk", depth.bulk)):
            yield f'cortex_queue_ready_jobs{{queue="{depth.queue}",lane="{lane}"}} {jobs}'
    for name, (meaning, attribute) in _GAUGES.items():
        yield from _head(name, meaning)
        for depth in depths:
            yield f'{name}{{queue="{depth.queue}"}} {getattr(depth, attribute)}'


def _workers(seen: Snapshot) -> Iterator[str]:
    present = [card for card in seen.cards if not card.is_silent(seen.now_s)]
    states = Counter((card.image, "silent" if card.is_silent(seen.now_s) else card.state) for card in seen.cards)
    yield from _head("cortex_workers", "workers by image and state")
    for (image, state), count in sorted(states.items()):
        yield f'cortex_workers{{image="{_escaped(image)}",state="{state}"}} {count}'
    for total, meaning in (("jobs", "jobs answered"), ("items", "inputs computed"), ("errors", "inputs failed")):
        yield from _head(f"cortex_worker_{total}_total", f"{meaning} since the worker started", "counter")
        for card in present:
            yield f'cortex_worker_{total}_total{{worker="{_escaped(card.node)}"}} {getattr(card, total)}'
    models = Counter((model.alias, model.state) for card in present for model in card.models)
    yield from _head("cortex_model_workers", "workers that serve a model, by its state there")
    for (alias, model_state), count in sorted(models.items()):
        yield f'cortex_model_workers{{model="{_escaped(alias)}",state="{model_state}"}} {count}'


def _head(name: str, meaning: str, kind: str = "gauge") -> Iterator[str]:
    yield f"# HELP {name} {meaning}"
    yield f"# TYPE {name} {kind}"


def _escaped(text: str) -> str:
    """A label's value. A worker's name comes from its host's, and whoever writes to Redis chooses it."""
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
