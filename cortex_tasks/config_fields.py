"""The kinds of values in queues.yaml, each with its check, and the base of its sections.

Sizes are written ``512MB`` or ``2GB`` (powers of 1,000; ``MiB``, ``GiB`` for powers of 1,024) and held as bytes.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Final

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from cortex_tasks.catalog import TASKS, nearest
from cortex_tasks.cron import Cron

__all__ = [
    "ADAPTERS",
    "ALIAS_PATTERN",
    "AdapterName",
    "Alias",
    "Count",
    "Flag",
    "Number",
    "Schedule",
    "Section",
    "Size",
    "Source",
    "TaskName",
]

#: Adapters that come with the workers; any other is written ``package.module:Class``.
ADAPTERS: Final = ("echo", "sentence_transformers", "transformers", "spacy", "prophet")
ALIAS_PATTERN = r"^[a-z][a-z0-9_.-]{0,62}$"
_SOURCES: Final = ("hub:", "pypi:", "file:", "s3:", "forge:", "builtin:")
_SIZE = re.compile(r"\s*(\d{1,12}(?:\.\d{1,6})?)\s*(B|KB|MB|GB|TB|KiB|MiB|GiB|TiB)\s*")
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip
_CLASS = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def _bytes(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value)
    if match is None:
        raise ValueError(f"{value[:40]!r} is not a size; write it like '512MB' or '2GB'")
    return int(float(match[1]) * _UNITS[match[2]])


def _name(value: str) -> str:
    if not re.fullmatch(ALIAS_PATTERN.rstrip("$"), value):
        raise ValueError(f"{value[:40]!r} is not a name: a lower-case letter, then at most 62 of a-z 0-9 _ . -")
    return value


def _known_task(name: str) -> str:
    if name not in TASKS:
        raise ValueError(f"unknown task {name[:40]!r}{nearest(name, TASKS)}")
    return name


def _known_adapter(name: str) -> str:
    if name not in ADAPTERS and not _CLASS.fullmatch(name):
        raise ValueError(f"unknown adapter {name[:40]!r}{nearest(name, ADAPTERS)} (or write 'package.module:Class')")
    return name


def _known_source(source: str) -> str:
    # The value is not repeated: a source may hold a signed or private address.
    if not source.startswith(_SOURCES):
        raise ValueError(f"a source begins with one of {' '.join(_SOURCES)}")
    return source


def _schedule(text: str) -> str:
    Cron.parse(text)
    return text


# Strict: a quoted "4", a 4.0 for a count, or a yes for a number is a slip that the file's author wants to hear of.
Count = Annotated[int, Field(strict=True)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Flag = Annotated[bool, Field(strict=True)]
Size = Annotated[int, BeforeValidator(_bytes), Field(strict=True, ge=0)]
Alias = Annotated[str, AfterValidator(_name)]
TaskName = Annotated[str, AfterValidator(_known_task)]
AdapterName = Annotated[str, AfterValidator(_known_adapter)]
Source = Annotated[str, AfterValidator(_known_source)]
Schedule = Annotated[str, AfterValidator(_schedule)]


class Section(BaseModel):
    """A part of queues.yaml: immutable; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, protected_namespaces=())
