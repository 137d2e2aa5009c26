"""Parked jobs: ``cortex dead list``, ``requeue``, ``drop``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import click

from cortex_tasks import dead_letters
from cortex_tasks.catalog import nearest
from cortex_tasks.cli.exits import FAILED
from cortex_tasks.cli.observe import open_redis
from cortex_tasks.config import Settings, load_fleet
from cortex_tasks.dead_letters import DeadLetter
from cortex_tasks.terminal import style_for, table

__all__ = ["dead"]

#: How a job without an id is named.
_NO_ID = "-"


@click.group()
def dead() -> None:
    """Jobs that were parked: look at them, put them back, forget them."""


@dead.command("list")
@click.argument("queue", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_(queue: str | None, as_json: bool) -> None:
    """The parked jobs of QUEUE, or of all queues, newest first: id, time, reason and shortened arguments."""
    letters = _read(queue)
    if as_json:
        click.echo(json.dumps([_shown(letter) for letter in letters]))
        return
    if not letters:
        click.echo("nothing is parked")
        return
    rows = [(letter.id or _NO_ID, letter.queue, _time(letter.at_s), letter.task, letter.reason) for letter in letters]
    cells = [[_printable(text) for text in row] for row in rows]
    click.echo("\n".join(table(("id", "queue", "parked (UTC)", "task", "reason"), cells, style_for(sys.stdout))))


def _shown(letter: DeadLetter) -> dict[str, object]:
    names = ("id", "queue", "reason", "at_s", "task", "arguments", "readable")
    return {name: getattr(letter, name) for name in names}


def _time(at_s: float) -> str:
    try:
        return datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return "-"


def _printable(text: str) -> str:
    """Anyone may write to a queue: no control characters for the terminal."""
    return "".join(char if char.isprintable() else "�" for char in text)


def _choosing(command: Callable[..., None]) -> Callable[..., None]:
    command = click.option("--queue", help="Only of this queue. Default: of all queues.")(command)
    command = click.option("--all", "every", is_flag=True, help="All of them.")(command)
    return click.argument("job_id", metavar="ID", required=False)(command)


@dead.command()
@_choosing
def requeue(job_id: str | None, every: bool, queue: str | None) -> None:
    """Put the parked job ID, or --all, back as the next of its queue, its attempts forgotten.

    What cannot be read as a job stays parked.
    """
    jobs = _chosen(job_id, every, queue)
    _each([job for job in jobs if job[0].readable], dead_letters.requeue, "back in its queue")
    unreadable = sum(not job[0].readable for job in jobs)
    if unreadable:
        click.echo(f"cortex: {unreadable} cannot be read as jobs and stay parked: `cortex dead drop` them", err=True)
        raise SystemExit(FAILED)


@dead.command()
@_choosing
def drop(job_id: str | None, every: bool, queue: str | None) -> None:
    """Forget the parked job ID, or --all. Nothing brings it back. An ID of - means those without one."""
    _each(_chosen(job_id, every, queue), dead_letters.drop, "dropped")


def _each(jobs: Sequence[Sequence[DeadLetter]], act: Callable[[Any, Sequence[DeadLetter]], bool], outcome: str) -> None:
    if not jobs:
        click.echo("nothing to do")
        return
    with open_redis(Settings.from_env()) as redis:
        for job in jobs:
            done = act(redis, job)
            # Said one by one, so that what was done is known should the next fail.
            said = (job[0].id or _NO_ID, job[0].queue, outcome if done else "already gone")
            click.echo("  ".join(map(_printable, said)))


def _chosen(job_id: str | None, every: bool, queue: str | None) -> list[list[DeadLetter]]:
    if every == (job_id is not None):
        raise click.UsageError("give one ID, or --all")
    wanted = "" if job_id == _NO_ID else job_id
    found = dead_letters.by_job(letter for letter in _read(queue) if every or letter.id == wanted)
    if not found and not every:
        where = f"on queue {queue!r}" if queue else "on any queue"
        click.echo(f"cortex: no job {job_id} is parked {where}: see `cortex dead list`", err=True)
        raise SystemExit(FAILED)
    return found


def _read(queue: str | None) -> list[DeadLetter]:
    fleet = load_fleet()
    with open_redis(Settings.from_env()) as redis:
        letters = dead_letters.read_dead_letters(redis, fleet.queues if queue is None else [queue])
    # A queue that queues.yaml no longer names may still hold some.
    if not letters and queue is not None and queue not in fleet.queues:
        raise click.UsageError(f"unknown queue {queue!r}{nearest(queue, fleet.queues)}")
    return letters
