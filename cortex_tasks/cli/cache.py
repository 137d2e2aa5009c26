"""The result cache: ``cortex cache stats``, ``purge``."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import click

from cortex_tasks.catalog import nearest
from cortex_tasks.cli.observe import open_redis
from cortex_tasks.config import ALIAS_PATTERN, FleetConfig, Settings, load_fleet
from cortex_tasks.terminal import style_for, table

if TYPE_CHECKING:
    from cortex_tasks.cache.report import CacheReport, ModelReport

__all__ = ["cache", "read_cache_report"]

#: Bytes of a weight; others are taken for 4.
_WEIGHT_BYTES: Final = {"bf16": 2, "fp16": 2, "int8": 1}


@click.group()
def cache() -> None:
    """The result cache: what it spares, what it holds, and dropping a model's answers."""


@contextmanager
def _open_cache() -> Iterator[Any]:
    settings = Settings.from_env()
    at_cache = {"broker_url": settings.cache, "connect_timeout_s": settings.connect_timeout_s}
    with open_redis(Settings.model_validate(at_cache)) as redis:
        yield redis


@cache.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--prometheus", "as_metrics", is_flag=True, help="Print Prometheus' text format.")
def stats(as_json: bool, as_metrics: bool) -> None:
    """Hit ratios for each tier and model, bytes, evictions, inputs and operations spared."""
    from cortex_tasks.cache.report import prometheus

    report = read_cache_report(load_fleet())
    if as_metrics:
        click.echo("\n".join(prometheus(report)))
    elif as_json:
        click.echo(json.dumps(_json(report)))
    else:
        _print(report)


def read_cache_report(fleet: FleetConfig) -> CacheReport:
    """What the result cache holds and spares. Raises BrokerUnavailable."""
    from cortex_tasks.cache.report import read_report

    with _open_cache() as redis:
        return read_report(redis, list(fleet.models), fleet.answers_max_bytes, _flops_per_token())


def _flops_per_token() -> dict[str, int]:
    """Two operations a weight, of models that workers hold; an upper bound, for embeddings are weights too."""
    from cortex_tasks.presence import read_cards

    with open_redis(Settings.from_env()) as redis:
        cards = read_cards(redis)
    return {
        model.alias: 2 * model.size_bytes // _WEIGHT_BYTES.get(model.precision, 4)
        for card in cards
        for model in card.models
        if model.state == "ready"
    }


def _json(report: CacheReport) -> dict[str, Any]:
    return {
        "entries": report.entries,
        "bytes": report.size_bytes,
        "max_bytes": report.max_bytes,
        "evicted": report.evicted,
        "models": {model.alias: _model_json(model) for model in report.models},
    }


def _model_json(model: ModelReport) -> dict[str, Any]:
    return {
        "revision": model.revision,
        **model.counts,
        "near_ratio": round(model.ratio("near_hits"), 4),
        "l2_ratio": round(model.ratio("l2_hits"), 4),
        "saved_inputs": model.saved_inputs,
        "saved_flops": model.saved_flops,
    }


def _print(report: CacheReport) -> None:
    share = report.size_bytes / report.max_bytes if report.max_bytes else 0.0
    click.echo(
        f"{report.entries:,} answers, {report.size_bytes / 1e6:,.1f} MB of {report.max_bytes / 1e6:,.0f} MB "
        f"({share:.1%}), {report.evicted:,} evicted\n"
    )
    rows = [
        (
            model.alias,
            model.revision[:12] or "-",
            f"{model.asked:,}",
            f"{model.ratio('near_hits'):.1%}",
            f"{model.ratio('l2_hits'):.1%}",
            f"{model.counts.get('shared', 0):,}",
            f"{model.counts.get('computed', 0):,}",
            f"{model.counts.get('warmed', 0):,}",
            f"{model.saved_inputs:,}",
            f"{model.saved_flops:.2g}" if model.saved_flops else "-",
        )
        for model in report.models
    ]
    header = ("model", "revision", "asked", "near", "redis", "shared", "computed", "warmed", "spared", "flops spared")
    click.echo("\n".join(table(header, rows, style_for(sys.stdout))))


@cache.command()
@click.argument("model")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def purge(model: str, as_json: bool) -> None:
    """Drop MODEL's answers, in small steps that hold nobody up. When it is done, no client serves them any more."""
    from cortex_tasks.cache import report

    fleet = load_fleet()
    if not re.fullmatch(ALIAS_PATTERN.rstrip("$"), model):
        raise click.UsageError(f"{model!r} is no model's alias{nearest(model, fleet.models)}")
    with _open_cache() as redis:
        count, size_bytes = report.purge(redis, model)
    # Answers of a model that queues.yaml no longer names may be dropped too.
    if not count and model not in fleet.models:
        raise click.UsageError(f"unknown model {model!r}{nearest(model, fleet.models)}")
    if as_json:
        click.echo(json.dumps({"model": model, "entries": count, "bytes": size_bytes}))
    else:
        click.echo(f"{model}: {count:,} answers dropped, {size_bytes / 1e6:,.1f} MB")
