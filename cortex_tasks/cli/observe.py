"""What runs: ``cortex models`` and ``cortex status``, from the workers' cards and Redis."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import click

from cortex_tasks.cli.exits import FAILED
from cortex_tasks.cli.lazy import LazyGroup
from cortex_tasks.config import FleetConfig, Settings, load_fleet
from cortex_tasks.errors import BrokerUnavailable
from cortex_tasks.terminal import Style, style_for, table

if TYPE_CHECKING:
    from cortex_tasks.depths import QueueDepth
    from cortex_tasks.presence import WorkerCard

__all__ = ["models", "open_redis", "status"]

_COLOURS = {"ready": "green", "unavailable": "red", "silent": "red"} | dict.fromkeys(
    ("loading", "starting", "stopping"), "yellow"
)
#: The best one that a model has on any worker is its state.
_MODEL_STATES = ("ready", "loading", "unavailable", "idle", "silent")


@contextlib.contextmanager
def open_redis(settings: Settings) -> Iterator[Any]:
    """A client of the broker; what redis-py raises comes out as BrokerUnavailable, the password masked."""
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    from cortex_tasks.wire import unavailable

    timeout_s = settings.connect_timeout_s
    client = redis.Redis.from_url(
        settings.broker, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, retry=Retry(NoBackoff(), 0)
    )
    try:
        yield client
    except redis.RedisError as error:
        raise unavailable(settings.broker, error) from error
    finally:
        client.close()


# ---------------------------------------------------------------------------------------------------- models


@dataclass(frozen=True, slots=True)
class _ModelRow:
    alias: str
    state: str
    revision: str
    tasks: tuple[str, ...]
    queue: str
    images: tuple[str, ...]
    adapter: str
    load: str
    nodes: tuple[str, ...]
    reason: str
    #: The engines that run it, with their figures.
    engine: str
    #: In the memory of all workers together.
    size_bytes: int
    #: The slowest load, and the tiers that the files came from.
    load_ms: float
    tiers: tuple[str, ...]


class _Models(LazyGroup):
    """The files of models are the workers' business, and so are the commands for them."""

    table = {  # noqa: RUF012 - as ClassVar in the base class
        "pull": "workers.commands:pull",
        "list": "workers.commands:list_",
        "verify": "workers.commands:verify",
        "pin": "workers.commands:pin",
        "evict": "workers.commands:evict",
        "gc": "workers.commands:gc",
        "publish": "workers.commands:publish",
    }


@click.group(cls=_Models, invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def models(ctx: click.Context, as_json: bool) -> None:
    """Every model: its state, revision, queue and images, and the workers that hold it.

    The commands below are about the models' files on this host and in Redis.
    """
    if ctx.invoked_subcommand is None:
        _show_models(as_json)


def _show_models(as_json: bool) -> None:
    from cortex_tasks.presence import read_cards

    settings, fleet = Settings.from_env(), load_fleet()
    cards: list[WorkerCard] = []
    try:
        with open_redis(settings) as redis:
            cards = read_cards(redis)
    except BrokerUnavailable as error:
        click.echo(f"cortex: {error}; showing only what queues.yaml declares", err=True)
    now_s = time.time()
    rows = [_model_row(fleet, alias, cards, now_s) for alias in fleet.models]
    present = [card for card in cards if not card.is_silent(now_s)]
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows]))
        return
    style = style_for(sys.stdout)
    header = ("model", "state", "revision", "tasks", "queue", "images", "on")
    _print_table(header, [_cells(row) for row in rows], style)
    for row in rows:
        # The default engine is no news, unless it was chosen.
        silent = ("",) if fleet.models[row.alias].backend == "auto" else ("", "torch fp32")
        if detail := "; ".join(text for text in (row.engine, row.reason) if text not in silent):
            click.echo(f"\n{style(row.alias, 'bold')}: {detail}")
    for card in present:
        click.echo(f"\n{card.node}: {_memory(card)}")


def _memory(card: WorkerCard) -> str:
    """Where a worker's models are: memory, evictions, and how often each tier had what was asked of it."""
    store = card.store
    loaded = ", ".join(
        f"{model.alias} {model.size_bytes / 1e6:,.0f} MB (load {model.load_ms:,.0f} ms"
        + (f", from {model.tier})" if model.tier else ")")
        for model in card.models
        if model.state == "ready"
    )
    tiers = ", ".join(
        f"{name} {100 * tier.hits / max(tier.hits + tier.misses, 1):.0f} %"
        + (f" ({tier.mean_ms:,.0f} ms)" if tier.mean_ms else "")
        + (f" {tier.faults} faults" if tier.faults else "")
        for name, tier in store.tiers.items()
    )
    used = f"{store.memory_bytes / 1e6:,.0f} of {store.memory_limit_bytes / 1e6:,.0f} MB"
    moved = f"{store.evictions} evictions, {store.reloads} reloads"
    shares = ", ".join(
        f"{name} {budget.used_bytes / 1e6:,.0f} of {budget.limit_bytes / 1e6:,.0f} MB"
        for name, budget in store.budgets.items()
        if budget.used_bytes and name != "model_cache"
    )
    parts = (loaded or "nothing loaded", used, shares, moved, tiers and f"hits: {tiers}")
    return "; ".join(part for part in parts if part)


def _cells(row: _ModelRow) -> tuple[str, ...]:
    lists = [",".join(names) or "-" for names in (row.tasks, row.images, row.nodes)]
    return (row.alias, row.state, row.revision[:12] or "-", lists[0], row.queue, lists[1], lists[2])


def _model_row(fleet: FleetConfig, alias: str, cards: Sequence[WorkerCard], now_s: float) -> _ModelRow:
    """One alias over all workers: the best state wins, the reason is that of the first that has one. What a silent
    worker says of its models no longer counts."""
    model = fleet.models[alias]
    all_held = [(card, entry) for card in cards for entry in card.models if entry.alias == alias]
    held = [(card.node, entry) for card, entry in all_held if not card.is_silent(now_s)]
    states = {entry.state for _, entry in held} | ({"silent"} if len(held) < len(all_held) else set())
    best = next((state for state in _MODEL_STATES if state in states), "no worker")
    return _ModelRow(
        alias=alias,
        state=best,
        revision=next((entry.revision for _, entry in held if entry.revision), model.revision or ""),
        tasks=model.tasks,
        queue=model.queue,
        images=model.images,
        adapter=model.adapter,
        load=model.load,
        nodes=tuple(node for node, entry in held if entry.state == "ready"),
        reason=next((entry.reason for _, entry in held if entry.reason), ""),
        engine=", ".join(dict.fromkeys(entry.engine for _, entry in held if entry.engine)),
        size_bytes=sum(entry.size_bytes for _, entry in held),
        load_ms=max((entry.load_ms for _, entry in held), default=0.0),
        tiers=tuple(dict.fromkeys(entry.tier for _, entry in held if entry.tier)),
    )


# ---------------------------------------------------------------------------------------------------- status


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--check", is_flag=True, help="Exit with 1 when something is wrong, and say what on stderr.")
@click.option("--strict", is_flag=True, help="As --check; dead letters fail too.")
def status(as_json: bool, check: bool, strict: bool) -> None:
    """Workers, queues, dead letters and Redis' memory.

    --check fails when a model's queue has no worker that is ready (none, silent, or still starting), when a pinned
    model is unavailable, and when jobs wait on a queue that no worker consumes. It warns of dead letters.
    """
    from cortex_tasks.depths import read_depths
    from cortex_tasks.presence import read_cards

    settings, fleet = Settings.from_env(), load_fleet()
    now_s = time.time()
    with open_redis(settings) as redis:
        cards = read_cards(redis)
        depths = read_depths(redis, fleet.queues, lease_s=fleet.delivery.lease_s, now_s=now_s)
        memory = redis.info("memory")
    used, limit = int(memory.get("used_memory", 0)), int(memory.get("maxmemory", 0))
    warnings = find_warnings(depths)
    faults = find_faults(fleet, cards, depths, now_s) + (warnings if strict else [])
    if as_json:
        click.echo(json.dumps({
            "workers": [{**card.model_dump(mode="json"), "silent": card.is_silent(now_s)} for card in cards],
            "queues": [{**asdict(depth), "ready": depth.ready, "total": depth.total} for depth in depths],
            "redis": {"used_memory_bytes": used, "maxmemory_bytes": limit},
            "faults": faults,
            "warnings": warnings,
        }))  # fmt: skip
    else:
        _print_status(cards, depths, used, limit, now_s)
    if check or strict:
        _tell(faults, [] if strict else warnings)


def _tell(faults: Sequence[str], warnings: Sequence[str]) -> None:
    for line in [*faults, *(f"warning: {text}" for text in warnings)]:
        click.echo(f"cortex: {line}", err=True)
    if faults:
        raise SystemExit(FAILED)


def find_faults(
    fleet: FleetConfig, cards: Sequence[WorkerCard], depths: Sequence[QueueDepth], now_s: float
) -> list[str]:
    """What keeps jobs from being answered, one sentence each."""
    present = [card for card in cards if not card.is_silent(now_s)]
    faults = [] if any(card.state == "ready" for card in present) else ["no worker is ready"]
    for card in present:
        for model in card.models:
            declared = fleet.models.get(model.alias)
            if model.state == "unavailable" and declared is not None and declared.load == "pinned":
                faults.append(f"pinned model {model.alias!r} is unavailable on {card.node}: {model.reason}")
    waiting = {depth.queue: depth.ready for depth in depths}
    served = {queue for card in present if card.state == "ready" for queue in card.queues}
    for queue in fleet.queues:
        if queue not in served:
            faults.append(_unserved(fleet, queue, cards, waiting.get(queue, 0), now_s))
    return faults


def _unserved(fleet: FleetConfig, queue: str, cards: Sequence[WorkerCard], waiting: int, now_s: float) -> str:
    """Why nobody answers the jobs of a queue."""
    consumers = [card for card in cards if queue in card.queues]
    states = [f"{card.node} is {_state(card, now_s)}" for card in consumers]
    why = f"no ready worker consumes it ({', '.join(states)})" if states else "no worker consumes it"
    jobs = f", {waiting:,} jobs wait" if waiting else ""
    models = ", ".join(alias for alias, model in fleet.models.items() if model.queue == queue)
    return f"queue {queue!r} (models: {models}): {why}{jobs}"


def find_warnings(depths: Sequence[QueueDepth]) -> list[str]:
    """What an operator should look at though jobs are answered, one sentence each."""
    return [
        f"{depth.dead:,} dead letters on queue {depth.queue!r}: see `cortex dead list {depth.queue}`"
        for depth in depths
        if depth.dead
    ]


def _state(card: WorkerCard, now_s: float) -> str:
    return "silent" if card.is_silent(now_s) else card.state


def _print_status(
    cards: Sequence[WorkerCard], depths: Sequence[QueueDepth], used: int, limit: int, now_s: float
) -> None:
    style = style_for(sys.stdout)
    header = ("worker", "image", "state", "queues", "jobs", "errors", "items/s", "up")
    if cards:
        _print_table(header, [_worker(card, now_s) for card in cards], style)
    else:
        click.echo("no worker")
    click.echo()
    lanes = [(d.queue, d.interactive, d.bulk, d.unacked, d.total, d.orphaned, d.dead) for d in depths]
    _print_table(("queue", "interactive", "bulk", "unacked", "total", "orphaned", "dead"), lanes, style)
    click.echo(f"\nRedis: {used / 1e6:,.1f} MB" + (f" of {limit / 1e6:,.0f} MB" if limit else ", no limit set"))


def _worker(card: WorkerCard, now_s: float) -> tuple[object, ...]:
    queues, rate = ",".join(card.queues), f"{card.items_per_s:.1f}"
    return (
        card.node,
        card.image,
        _state(card, now_s),
        queues,
        card.jobs,
        card.errors,
        rate,
        _age(now_s - card.started_at),
    )


def _age(seconds: float) -> str:
    minutes, left = divmod(max(0, int(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {left:02} s" if minutes else f"{left} s"


def _print_table(header: Sequence[str], rows: Sequence[Sequence[object]], style: Style) -> None:
    for line in table(header, rows, style):
        # A state stands between two spaces or more.
        for state, colour in _COLOURS.items():
            line = line.replace(f"  {state} ", f"  {style(state, colour)} ", 1)
        click.echo(line)
