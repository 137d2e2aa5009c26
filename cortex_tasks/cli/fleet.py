"""A fleet on this machine: ``cortex up``, ``cortex redis``, ``cortex demo``."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import click

from cortex_tasks.errors import ConfigError

__all__ = ["demo", "redis", "up"]


@click.command()
@click.option("-f", "--procfile", type=click.Path(path_type=Path), help="Default: the one that ships with Cortex.")
@click.argument("processes", nargs=-1)
def up(procfile: Path | None, processes: tuple[str, ...]) -> None:
    """Run the Procfile (Redis, the workers, Flower), or only PROCESSES of it, until Ctrl-C."""
    from cortex_tasks.procfile import child_environment, default_procfile, read_procfile

    file = (procfile or default_procfile()).resolve()
    read_procfile(file)
    if importlib.util.find_spec("honcho") is None:
        raise ConfigError("`cortex up` needs honcho: pip install 'datapunk-cortex[fleet]'")
    arguments = [sys.executable, "-m", "honcho", "-f", str(file), "start", *processes]
    # honcho takes this process' place: Ctrl-C and its exit code are its own.
    sys.stdout.flush()
    os.execve(sys.executable, arguments, child_environment())


@click.command()
@click.option("--grace-s", default=10.0, show_default=True, help="How long clients may finish after SIGTERM.")
def redis(grace_s: float) -> None:
    """Make sure that a Redis serves CORTEX_BROKER_URL: use the one that answers, else run an embedded one.

    Stays until SIGTERM or Ctrl-C. The embedded one listens on loopback only and keeps nothing on disk.
    """
    from cortex_tasks.config import Settings, load_fleet
    from cortex_tasks.embedded_redis import serve

    wanted = load_fleet().model_storage.l2_redis.size
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # The cache's size as queues.yaml has it, as long as the machine keeps three quarters for everything else.
    raise SystemExit(serve(Settings.from_env().broker, min(wanted, memory // 4), click.echo, grace_s))


@click.command()
@click.option("--timeout-s", default=300.0, show_default=True, help="How long the models may take to be warm.")
def demo(timeout_s: float) -> None:
    """Start a fleet, run real jobs on every model, show the answers, stop everything."""
    from cortex_tasks.demo import run_demo

    raise SystemExit(run_demo(timeout_s))
