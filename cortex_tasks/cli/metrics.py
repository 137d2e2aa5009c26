"""``cortex metrics``: the fleet for Prometheus."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from cortex_tasks.cli.cache import read_cache_report
from cortex_tasks.cli.observe import open_redis
from cortex_tasks.config import FleetConfig, Settings, load_fleet

if TYPE_CHECKING:
    from cortex_tasks.depths import QueueDepth

__all__ = ["metrics"]


@click.command()
@click.option("--listen", metavar="ADDRESS:PORT", help="Serve it at /metrics, and queues in JSON.")
def metrics(listen: str | None) -> None:
    """Queues, workers, models and the result cache, in Prometheus' text format.

    With --listen, /queues/NAME answers with one queue's figures in JSON as well; `total` is ready and unacked jobs,
    which KEDA's metrics-api trigger scales by. There is no authentication: keep the port inside.
    """
    from cortex_tasks.metrics import MetricsServer

    settings, fleet = Settings.from_env(), load_fleet()
    if listen is None:
        click.echo("\n".join(_lines(settings, fleet)))
        return
    address, _, port = listen.rpartition(":")
    if not address or not port.isdigit() or not 0 < int(port) < 65_536:
        raise click.UsageError("--listen: expected ADDRESS:PORT, as in 127.0.0.1:9540")
    try:
        server = MetricsServer((address, int(port)), lambda: _lines(settings, fleet), lambda: _queues(settings, fleet))
    except OSError as error:
        raise click.UsageError(f"--listen: {listen}: {error.strerror or error}") from error
    # As pid 1 of a container a process has no default answer to SIGTERM.
    signal.signal(signal.SIGTERM, _end)
    with server:
        server.serve_forever()


def _end(*_: Any) -> None:
    raise SystemExit(0)


def _queues(settings: Settings, fleet: FleetConfig) -> list[QueueDepth]:
    from cortex_tasks.depths import read_depths

    with open_redis(settings) as redis:
        return read_depths(redis, fleet.queues, lease_s=fleet.delivery.lease_s, now_s=time.time())


def _lines(settings: Settings, fleet: FleetConfig) -> Iterator[str]:
    from cortex_tasks.cache.report import prometheus
    from cortex_tasks.depths import read_depths
    from cortex_tasks.metrics import exposition
    from cortex_tasks.presence import read_cards

    now_s = time.time()
    with open_redis(settings) as redis:
        cards = read_cards(redis)
        depths = read_depths(redis, fleet.queues, lease_s=fleet.delivery.lease_s, now_s=now_s)
    yield from exposition(cards, depths, now_s)
    yield from prometheus(read_cache_report(fleet))
