"""``cortex models pull|list|verify|pin|evict|gc|publish``: the files of models on this host and in Redis.

The ``cortex`` command belongs to the light client, which imports these by name when one of them is called. Nothing
here loads a model library.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click
import redis

from cortex_tasks.catalog import nearest
from cortex_tasks.config import FleetConfig, ModelConfig, Settings, load_fleet
from cortex_tasks.errors import CortexError, ModelUnavailable, UnknownModel
from cortex_tasks.terminal import bar, style_for, table
from cortex_tasks.wire import unavailable
from workers.store import forge
from workers.store.build import open_store, shares
from workers.store.counters import Tier
from workers.store.disk import Disk
from workers.store.tiers import Store, key_of

__all__ = ["evict", "gc", "list_", "pin", "publish", "pull", "verify"]

_JSON: Final = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_ALIASES: Final = click.argument("aliases", nargs=-1)
_FAILED: Final = 1
_REDRAW_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class _Here:
    """What the commands work on."""

    fleet: FleetConfig
    settings: Settings
    store: Store

    @classmethod
    def open(cls) -> _Here:
        settings, fleet = Settings.from_env(), load_fleet()
        image = fleet.images.get(settings.image) if settings.image else None
        return cls(fleet, settings, open_store(fleet, settings, image))

    def models(self, aliases: Iterable[str]) -> dict[str, ModelConfig]:
        """The named models, all that have files when none is named. Raises UnknownModel."""
        for alias in aliases:
            if alias not in self.fleet.models:
                raise UnknownModel(f"unknown model {alias!r}{nearest(alias, self.fleet.models)}", {"model": alias})
        chosen = aliases or self.fleet.models
        return {
            alias: self.fleet.models[alias]
            for alias in chosen
            if aliases or not self.fleet.models[alias].source.startswith("builtin:")
        }

    def held_by(self, alias: str) -> list[tuple[Disk, str]]:
        """The disks of this host that hold a model of the fleet, each with the revision."""
        config = self.fleet.models[alias]
        keys = [key_of(source, config.revision) for source in (config.source, *config.mirrors)]
        found = [(disk, disk.digest_for(key)) for disk in self.store.disks for key in keys]
        return [(disk, digest) for disk, digest in found if digest is not None]

    def in_redis(self, config: ModelConfig) -> str | None:
        if self.store.l2 is None:
            return None
        try:
            return self.store.l2.digest_for(key_of(config.source, config.revision))
        except redis.RedisError as error:
            raise unavailable(self.settings.cache, error) from error


# ------------------------------------------------------------------------------------------------------ pull


@click.command()
@_ALIASES
@click.option("--again", is_flag=True, help="Ask the origin for what it holds now, though a revision is here.")
@_JSON
def pull(aliases: tuple[str, ...], again: bool, as_json: bool) -> None:
    """Bring the files of the models ALIASES (default: all) onto this host, from the nearest tier that has them."""
    here, failed = _Here.open(), False
    rows: list[dict[str, Any]] = []
    for alias, config in here.models(aliases).items():
        progress = _Progress(alias, sys.stderr.isatty() and not as_json)
        began_s = time.monotonic()
        try:
            opened = here.store.open(
                config.source,
                config.revision,
                mirrors=config.mirrors,
                share=shares(config),
                progress=progress,
                again=again,
            )
        except ModelUnavailable as error:
            failed = True
            rows.append({"model": alias, "error": str(error)})
            progress.end(f"{alias}: {error}", error=True)
            continue
        opened.release()
        took_s = time.monotonic() - began_s
        digest = opened.snapshot.digest
        rows.append({"model": alias, "revision": digest, "tier": opened.tier, "bytes": opened.size_bytes,
                     "path": str(opened.snapshot.path or ""), "seconds": round(took_s, 3)})  # fmt: skip
        if not as_json:
            told = f"{_mb(opened.size_bytes)} from {opened.tier} in {took_s:.1f} s" if opened.tier else "no files"
            progress.end(f"{alias}: {digest[:12] or 'builtin'}, {told}")
    # What goes to Redis goes in the background, and a command that ended would cut it off.
    here.store.finish()
    if as_json:
        click.echo(json.dumps(rows))
    if failed:
        raise SystemExit(_FAILED)


class _Progress:
    """A bar on stderr, when a person watches."""

    def __init__(self, alias: str, shown: bool) -> None:
        self._alias, self._shown = alias, shown
        self._drawn_s = 0.0

    def __call__(self, tier: Tier, done_bytes: int, total_bytes: int) -> None:
        now_s = time.monotonic()
        if self._shown and (now_s - self._drawn_s >= _REDRAW_S or done_bytes == total_bytes):
            self._drawn_s = now_s
            share = done_bytes / total_bytes if total_bytes else 0.0
            text = f"{self._alias} {bar(share, 24)} {_mb(done_bytes)} of {_mb(total_bytes)} from {tier}"
            click.echo(f"\r{text:<78}", nl=False, err=True)

    def end(self, text: str, *, error: bool = False) -> None:
        if self._drawn_s:
            click.echo("\r" + " " * 78 + "\r", nl=False, err=True)
        click.echo(text, err=error)


# ------------------------------------------------------------------------------------------------ list, verify


@click.command("list")
@_JSON
def list_(as_json: bool) -> None:
    """What this host keeps of models, and what Redis keeps for the fleet."""
    here = _Here.open()
    aliases: dict[str, list[str]] = {}
    for alias in here.fleet.models:
        for _, digest in here.held_by(alias):
            aliases.setdefault(digest, []).append(alias)
    disk = [
        {
            "revision": one.digest,
            "models": aliases.get(one.digest, []),
            "sources": list(one.sources),
            "bytes": one.size_bytes,
            "used_at": one.used_at_s,
            "pinned": one.pinned,
            "held": one.held,
            "place": str(disk.root),
        }
        for disk in here.store.disks
        for one in disk.revisions()
    ]
    in_redis, problem = _redis_sizes(here)
    if as_json:
        click.echo(json.dumps({"disk": disk, "redis": in_redis, "redis_problem": problem}))
        return
    _print_list(disk, in_redis, problem)


def _redis_sizes(here: _Here) -> tuple[dict[str, int], str]:
    try:
        return (here.store.l2.sizes() if here.store.l2 else {}), ""
    except redis.RedisError as error:
        return {}, str(unavailable(here.settings.cache, error))


def _print_list(disk: list[dict[str, Any]], in_redis: dict[str, int], problem: str) -> None:
    now_s = time.time()
    rows = [
        (
            row["revision"][:12],
            ",".join(row["models"]) or ",".join(row["sources"]) or "-",
            _mb(row["bytes"]),
            f"{max(0.0, now_s - row['used_at']) / 3600:.1f} h ago",
            " ".join(word for word in ("pinned", "held") if row[word]) or "-",
            "yes" if row["revision"] in in_redis else "-",
        )
        for row in disk
    ]
    if rows:
        header = ("revision", "models", "size", "used", "kept by", "in Redis")
        click.echo("\n".join(table(header, rows, style_for(sys.stdout))))
    else:
        click.echo("no revision on this host")
    fits = [size for name, size in in_redis.items() if name.startswith("fit:")]
    snapshots = len(in_redis) - len(fits)
    places = ", ".join(dict.fromkeys(row["place"] for row in disk))
    click.echo(f"\ndisk: {_mb(sum(row['bytes'] for row in disk))}" + (f" in {places}" if places else ""))
    if problem:
        click.echo(f"Redis: {problem}", err=True)
    else:
        click.echo(f"Redis: {_mb(sum(in_redis.values()))} ({snapshots} snapshots, {len(fits)} fits)")


@click.command()
@_ALIASES
@_JSON
def verify(aliases: tuple[str, ...], as_json: bool) -> None:
    """Read every byte of the revisions of ALIASES (default: of all) on this host; exits with 1 when one is damaged.

    A damaged revision is taken away, so that the next load fetches it again.
    """
    here = _Here.open()
    here.models(aliases)
    wanted = {digest for alias in aliases for _, digest in here.held_by(alias)}
    rows: list[dict[str, Any]] = []
    for disk in here.store.disks:
        for one in disk.revisions():
            if not aliases or one.digest in wanted:
                bad = disk.verify(one.digest)
                removed = bool(bad) and disk.discard(one.digest)
                rows.append({"revision": one.digest, "bytes": one.size_bytes, "bad": bad, "removed": removed})
    if as_json:
        click.echo(json.dumps(rows))
    for row in [] if as_json else rows:
        gone = ", removed" if row["removed"] else ""
        state = f"damaged: {', '.join(row['bad'])}{gone}" if row["bad"] else "whole"
        click.echo(f"{row['revision'][:12]}  {_mb(row['bytes'])}  {state}")
    if any(row["bad"] for row in rows):
        raise SystemExit(_FAILED)


# ---------------------------------------------------------------------------------------------- pin, evict, gc


@click.command()
@click.argument("alias")
@click.option("--off", is_flag=True, help="Let the clean-up remove it again.")
def pin(alias: str, off: bool) -> None:
    """Keep the revision of ALIAS on this host's disk, whatever the clean-up needs."""
    here = _Here.open()
    here.models([alias])
    held = here.held_by(alias)
    if not held:
        raise ModelUnavailable(f"model {alias!r} has no revision in this host's store; `cortex models pull {alias}`")
    for disk, digest in held:
        _writing(disk, lambda disk=disk, digest=digest: disk.pin(digest, not off))
        click.echo(f"{alias}: {digest[:12]} {'may be removed' if off else 'stays'} in {disk.root}")


@click.command()
@click.argument("alias")
@click.option("--tier", type=click.Choice(["disk", "redis", "all"]), default="disk", show_default=True)
def evict(alias: str, tier: str) -> None:
    """Remove the files of ALIAS from this host's disk, from Redis, or from both. Workers that hold it keep it."""
    here = _Here.open()
    here.models([alias])
    failed = False
    for disk, digest in here.held_by(alias) if tier in ("disk", "all") else []:
        gone = disk.remove(digest)
        still_there = not gone and any(one.digest == digest for one in disk.revisions())
        failed = failed or still_there
        said = "is held by a worker and stays" if still_there else "removed" if gone else "was not there"
        click.echo(f"{alias}: {digest[:12]} {said} ({disk.root})", err=still_there)
    in_redis = here.in_redis(here.fleet.models[alias]) if tier in ("redis", "all") else None
    if in_redis is not None and here.store.l2 is not None:
        gone = here.store.l2.drop(in_redis)
        click.echo(f"{alias}: {in_redis[:12]} {'removed' if gone else 'was not there'} (Redis)")
    if failed:
        raise SystemExit(_FAILED)


@click.command()
@_JSON
def gc(as_json: bool) -> None:
    """Keep the budgets now: wipe what killed fetches left, remove the longest unused beyond them."""
    here = _Here.open()
    removed: list[str] = []
    for disk in here.store.disks:
        removed += [one.digest for one in disk.make_room(0, "the clean-up")] if disk.root.exists() else []
    if not as_json:
        click.echo(f"disk: {len(removed)} revisions removed")
    try:
        dropped = here.store.l2.clean() if here.store.l2 else 0
    except redis.RedisError as error:
        raise unavailable(here.settings.cache, error) from error
    if as_json:
        click.echo(json.dumps({"disk": removed, "redis": dropped}))
    else:
        click.echo(f"Redis: {dropped} entries removed")


@click.command()
@click.argument("name")
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
def publish(name: str, directory: Path) -> None:
    """Put the model in DIRECTORY into Forge's registry (CORTEX_FORGE_URL) as the current revision of forge:NAME.

    Hosts that hold a revision before fetch this one with `cortex models pull --again`.
    """
    try:
        digest = forge.publish(Settings.from_env().forge, name, directory)
    except (OSError, ImportError) as error:
        raise CortexError(f"the registry cannot be written: {getattr(error, 'strerror', None) or error}") from error
    click.echo(f"forge:{name}: {digest[:12]} is current")


def _writing(disk: Disk, work: Any) -> None:
    try:
        work()
    except OSError as error:
        raise CortexError(f"{disk.root} cannot be written: {error.strerror or error}") from error


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.1f} MB"
