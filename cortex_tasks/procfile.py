"""The Procfile: which processes a fleet on one machine has. It is the only place that says so."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from cortex_tasks.errors import ConfigError

__all__ = ["child_environment", "default_procfile", "read_procfile"]

_LINE = re.compile(r"([A-Za-z0-9_-]+):\s*(.+)")


def default_procfile() -> Path:
    """The Procfile as installed with the package, or the checkout's."""
    here = Path(__file__).resolve().parent
    installed = here / "Procfile"
    return installed if installed.exists() else here.parent / "Procfile"


def read_procfile(path: Path) -> dict[str, str]:
    """Process name -> shell command, in the file's order. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    commands: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LINE.fullmatch(line.rstrip())
        if match is None:
            raise ConfigError(f"{path}:{number}: expected 'name: command'")
        if match[1] in commands:
            raise ConfigError(f"{path}:{number}: {match[1]}: a second process of this name")
        commands[match[1]] = match[2]
    if not commands:
        raise ConfigError(f"{path}: no process in it")
    return commands


def child_environment(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of the Procfile's commands: ``celery`` and ``cortex`` are this interpreter's own."""
    env = dict(os.environ if environ is None else environ)
    here = str(Path(sys.executable).parent)
    env["PATH"] = os.pathsep.join([here, *(part for part in [env.get("PATH", "")] if part)])
    return env
