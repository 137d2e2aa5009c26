"""The fleet's figures for machines: ``cortex metrics``."""

from __future__ import annotations

import logging
import signal
import time
from typing import TYPE_CHECKING, Any

import click

from cortex_tasks.cli.observe import open_redis
from cortex_tasks.config import FleetConfig, Settings, load_fleet

if TYPE_CHECKING:
    from cortex_tasks.metrics import Snapshot

__all__ = ["metrics"]


@click.command()
@click.option("--port", type=click.IntRange(0, 65_535), help="Serve them over HTTP until interrupted.")
@click.option("--address", default="127.0.0.1", show_default=True, help="The address to serve at.")
def metrics(port: int | None, address: str) -> None:
    """Queues, workers, models and cache in Prometheus' text format.

    Without --port they are printed once. With it, GET /metrics answers the same, and GET /queues/NAME one queue's
    figures in JSON, as KEDA's metrics-api trigger wants them. There is no authentication: keep the port inside.
    """
    from cortex_tasks.metrics import render

    settings, fleet = Settings.from_env(), load_fleet()
    if port is None:
        click.echo(render(_read(settings, fleet)), nl=False)
        return
    from cortex_tasks.exporter import Exporter

    logging.basicConfig(level=logging.WARNING)
    # As pid 1 of a container a process has no default answer to SIGTERM.
    signal.signal(signal.SIGTERM, _end)
    with Exporter((address, port), lambda: _read(settings, fleet)) as server:
        click.echo(f"http://{address}:{server.server_address[1]}/metrics")
        server.serve_forever()


def _read(settings: Settings, fleet: FleetConfig) -> Snapshot:
    from cortex_tasks.metrics import read_snapshot

    at_cache = {"broker_url": settings.cache, "connect_timeout_s": settings.connect_timeout_s}
    with open_redis(settings) as broker, open_redis(Settings.model_validate(at_cache)) as cache:
        return read_snapshot(broker, cache, fleet, time.time())


def _end(*_: Any) -> None:
    raise SystemExit(0)
