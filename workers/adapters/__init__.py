"""The lazy table of adapters: name -> module, class, extra. Importing this imports none of them."""

from __future__ import annotations

import importlib
from typing import NamedTuple, cast

from cortex_tasks.catalog import nearest
from cortex_tasks.errors import ConfigError, ModelUnavailable
from workers.adapters.base import Adapter, Item, LoadContext, Memo, WireValue
from workers.engines.crew import Crew

__all__ = ["ADAPTERS", "Adapter", "Crew", "Item", "LoadContext", "Memo", "WireValue", "adapter_class"]


class _Row(NamedTuple):
    target: str
    #: The extra that installs its library.
    extra: str


ADAPTERS: dict[str, _Row] = {
    "echo": _Row("workers.adapters.echo:EchoAdapter", ""),
    "sentence_transformers": _Row("workers.adapters.sentence_transformers:SentenceTransformersAdapter", "minilm"),
    "transformers": _Row("workers.adapters.transformers:TransformersAdapter", "transformers"),
    "spacy": _Row("workers.adapters.spacy:SpacyAdapter", "spacy"),
    "prophet": _Row("workers.adapters.prophet:ProphetAdapter", "prophet"),
}


def adapter_class(name: str) -> type[Adapter]:
    """The adapter of that name, or ``package.module:Class`` of one's own.

    Raises ConfigError for an unknown name, ModelUnavailable (saying the remedy) when it or its library is absent.
    """
    row = ADAPTERS.get(name) or (_Row(name, "") if ":" in name else None)
    if row is None:
        raise ConfigError(f"unknown adapter {name!r}{nearest(name, ADAPTERS)}")
    module, _, attribute = row.target.partition(":")
    try:
        return cast("type[Adapter]", getattr(importlib.import_module(module), attribute))
    except ImportError as error:
        raise ModelUnavailable(_why_not(name, module, row.extra, error)) from error
    except AttributeError as error:
        raise ConfigError(f"adapter {name!r}: {error}") from error


def _why_not(name: str, module: str, extra: str, error: ImportError) -> str:
    """Why an adapter's module cannot be imported, and the remedy."""
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if extra:
        return (
            f"adapter {name!r} needs a library that is not installed: {error}; pip install 'datapunk-cortex[{extra}]'"
        )
    if missing is not None and f"{module}.".startswith(f"{missing}."):
        return (
            f"adapter {name!r}: there is no module {missing!r} where the worker looks; add the directory that holds it "
            "to the worker's PYTHONPATH, or install it into the worker's environment"
        )
    if missing is not None:
        return (
            f"adapter {name!r}: its module {module!r} was found, but imports {missing!r}, which is not installed; "
            "install it into the worker's environment"
        )
    return f"adapter {name!r}: its module {module!r} cannot be imported: {error}"
