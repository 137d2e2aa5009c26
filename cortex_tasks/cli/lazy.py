"""A group of commands whose modules are imported only when one of them is called."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, ClassVar

import click

from cortex_tasks.errors import ConfigError

__all__ = ["LazyGroup"]


class LazyGroup(click.Group):
    """Finds its commands in a table: name -> ``module:attribute``.

    A module may be one of the workers', by name as an entry point would name it: the light client then has the
    command where the workers are installed, and imports nothing of them otherwise.
    """

    table: ClassVar[Mapping[str, str]]

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        target = self.table.get(cmd_name)
        if target is None:
            return None
        module, _, attribute = target.partition(":")
        try:
            command: click.Command = getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"`{ctx.command_path} {cmd_name}` needs {error.name!r}, which is not installed here; "
                "run it on a worker's host"
            ) from error
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        from cortex_tasks.catalog import nearest

        if args and args[0] not in self.table and not args[0].startswith("-"):
            ctx.fail(f"no such command {args[0]!r}{nearest(args[0], self.table)}")
        return super().resolve_command(ctx, args)
