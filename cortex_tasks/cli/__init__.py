"""The ``cortex`` command. Each command's module is imported only when it is called: ``cortex queues`` runs in
the Procfile's shell and must be quick."""

from __future__ import annotations

import os
import sys
from typing import Any, Final

import click

from cortex_tasks.cli.exits import EPILOG, INTERRUPTED, exit_code
from cortex_tasks.cli.lazy import LazyGroup
from cortex_tasks.errors import CortexError

__all__ = ["main"]

_COMMANDS: Final = {
    "up": "cortex_tasks.cli.fleet:up",
    "demo": "cortex_tasks.cli.fleet:demo",
    "run": "cortex_tasks.cli.run:run",
    "models": "cortex_tasks.cli.observe:models",
    "status": "cortex_tasks.cli.observe:status",
    "cache": "cortex_tasks.cli.cache:cache",
    "metrics": "cortex_tasks.cli.metrics:metrics",
    "dead": "cortex_tasks.cli.dead:dead",
    "queues": "cortex_tasks.cli.declared:queues",
    "config": "cortex_tasks.cli.declared:config",
    "redis": "cortex_tasks.cli.fleet:redis",
}


class _Cortex(LazyGroup):
    """Ends with the exit code of a CortexError."""

    table = _COMMANDS

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except CortexError as error:
            click.echo(f"cortex: {error}", err=True)
            ctx.exit(exit_code(error))
        except KeyboardInterrupt:
            click.echo("cortex: interrupted", err=True)
            ctx.exit(INTERRUPTED)
        except BrokenPipeError:
            # The reader (head, less) has gone; so that the interpreter's own flush does not complain:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(141)


@click.group(cls=_Cortex, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="datapunk-cortex", prog_name="cortex")
def main() -> None:
    """Inference behind a queue: run jobs, look at the fleet, start one on this machine.

    CORTEX_BROKER_URL names the Redis (default redis://127.0.0.1:6379/0), CORTEX_QUEUES_FILE the queues.yaml.
    """
