"""What queues.yaml declares: ``cortex queues`` and ``cortex config``. No Redis, nothing heavy."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import click

from cortex_tasks.catalog import nearest
from cortex_tasks.config import FleetConfig, Settings, default_queues_file, load_fleet, mask_url
from cortex_tasks.errors import ConfigError
from cortex_tasks.terminal import style_for, table

__all__ = ["config", "gpu_visible", "queues"]

_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


def gpu_visible() -> bool:
    """Whether this machine shows an NVIDIA GPU; CORTEX_GPU (0 or 1) overrides. Raises ConfigError."""
    said = os.environ.get("CORTEX_GPU", "").lower()
    if said in _TRUE or said in _FALSE:
        return said in _TRUE
    if said:
        raise ConfigError(f"CORTEX_GPU: expected one of {', '.join(_TRUE + _FALSE)}")
    return Path("/dev/nvidiactl").exists()


@click.command()
@click.argument("image", required=False)
@click.option("--gpu/--no-gpu", default=None, help="With the image's GPU queues or without. Default: as seen here.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def queues(image: str | None, gpu: bool | None, as_json: bool) -> None:
    """The queues that IMAGE consumes, as `celery worker -Q` takes them; without IMAGE, all images.

    \b
    Example: celery -A workers.app worker -Q $(cortex queues nlp)
    """
    fleet = load_fleet()
    gpu = gpu_visible() if gpu is None else gpu
    if image is None:
        _all_images(fleet, gpu, as_json)
        return
    if image not in fleet.images:
        raise ConfigError(f"unknown image {image!r}{nearest(image, fleet.images)}")
    consumed = fleet.images[image].consumed(gpu=gpu)
    if not consumed:
        raise ConfigError(f"image {image!r} consumes no queues")
    click.echo(json.dumps({"image": image, "gpu": gpu, "queues": consumed}) if as_json else ",".join(consumed))


def _all_images(fleet: FleetConfig, gpu: bool, as_json: bool) -> None:
    if as_json:
        rows = {name: image.consumed(gpu=gpu) for name, image in fleet.images.items()}
        click.echo(json.dumps({"gpu": gpu, "images": rows}))
        return
    lines = table(
        ("image", "queues", "with a GPU also", "cpus", "memory", "gpus"),
        [
            (name, ",".join(i.queues) or "-", ",".join(i.gpu_queues) or "-", f"{i.cpus:g}", _size(i.memory), i.gpus)
            for name, i in fleet.images.items()
        ],
        style_for(sys.stdout),
    )
    click.echo("\n".join(lines))


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:g} GB"


@click.group()
def config() -> None:
    """Check and show queues.yaml and the CORTEX_* settings."""


@config.command()
@click.argument("file", required=False, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def check(file: Path | None, as_json: bool) -> None:
    """Check FILE (default: the queues.yaml in use) and the settings; lists every problem with its line."""
    problems = []
    fleet = None
    try:
        Settings.from_env()
        fleet = load_fleet(file)
    except ConfigError as error:
        problems = str(error).splitlines()
    name = str(file or _file_in_use())
    if as_json:
        click.echo(json.dumps({"file": name, "ok": not problems, "problems": problems}))
    elif fleet is not None:
        click.echo(f"{name}: {len(fleet.models)} models, {len(fleet.queues)} queues, {len(fleet.images)} images: ok")
    else:
        click.echo("\n".join(problems), err=True)
    if problems:
        raise SystemExit(2)


def _file_in_use() -> Path:
    try:
        return Settings.from_env().queues_file or default_queues_file()
    except ConfigError:
        return default_queues_file()


@config.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(as_json: bool) -> None:
    """The whole configuration in use, defaults filled in, passwords masked."""
    settings, fleet = Settings.from_env(), load_fleet()
    shown = settings.model_dump(mode="json")
    for name in ("broker_url", "result_url", "cache_url"):
        secret = getattr(settings, name)
        shown[name] = mask_url(secret.get_secret_value()) if secret else None
    shown["queues_file"] = str(_file_in_use())
    whole = {"settings": shown, "fleet": fleet.model_dump(mode="json")}
    if as_json:
        click.echo(json.dumps(whole))
        return
    import yaml

    click.echo(yaml.safe_dump(whole, sort_keys=False, allow_unicode=True, width=100), nl=False)
