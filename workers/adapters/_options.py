"""An adapter's own ``options`` in queues.yaml, checked when it loads."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from cortex_tasks.catalog import nearest
from cortex_tasks.errors import ConfigError
from workers.adapters.base import LoadContext

__all__ = ["Options", "read_options"]


class Options(BaseModel):
    """Base of an adapter's ``options`` in queues.yaml: immutable; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


_Options = TypeVar("_Options", bound=Options)


def read_options(kind: type[_Options], context: LoadContext) -> _Options:
    """The checked options of a model. Raises ConfigError that names the option and the nearest known one."""
    try:
        return kind.model_validate(dict(context.options))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        hint = nearest(name, kind.model_fields) if first["type"] == "extra_forbidden" else f": {first['msg']}"
        raise ConfigError(f"models.{context.alias}.options.{name} is not usable{hint}") from None
