"""Cortex: inference behind a queue. This is the light client; the models run elsewhere.

::

    from cortex_tasks import Cortex

    with Cortex() as cortex:
        print(cortex.embed("The quick brown fox").vector)

Everything named in ``__all__`` is loaded when it is first used, so ``import cortex_tasks`` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from cortex_tasks.client import AsyncCortex, AsyncJob, Cortex, Job
    from cortex_tasks.config import FleetConfig, load_fleet
    from cortex_tasks.errors import (
        BrokerUnavailable,
        ClientClosed,
        ConfigError,
        CortexError,
        DeadlineExceeded,
        DeliveryError,
        InferenceFailed,
        InvalidInput,
        InvalidParameter,
        JobCancelled,
        ModelError,
        ModelUnavailable,
        NoConsumer,
        PoisonJob,
        QueueFull,
        RequestError,
        ResultLost,
        ResultTimeout,
        UnknownModel,
        UnknownTask,
    )
    from cortex_tasks.payloads import (
        Anomalies,
        Anomaly,
        Classification,
        Decomposition,
        Document,
        Embedding,
        Entity,
        Features,
        Fill,
        FilledMask,
        Forecast,
        LabelScore,
        Series,
        Span,
        Timings,
        Token,
    )
    from cortex_tasks.results import JobResult, parse
    from cortex_tasks.settings import Settings

_ROOMS: Final = {
    "client": ("AsyncCortex", "AsyncJob", "Cortex", "Job"),
    "config": ("FleetConfig", "load_fleet"),
    "errors": (
        "BrokerUnavailable",
        "ClientClosed",
        "ConfigError",
        "CortexError",
        "DeadlineExceeded",
        "DeliveryError",
        "InferenceFailed",
        "InvalidInput",
        "InvalidParameter",
        "JobCancelled",
        "ModelError",
        "ModelUnavailable",
        "NoConsumer",
        "PoisonJob",
        "QueueFull",
        "RequestError",
        "ResultLost",
        "ResultTimeout",
        "UnknownModel",
        "UnknownTask",
    ),
    "payloads": (
        "Anomalies",
        "Anomaly",
        "Classification",
        "Decomposition",
        "Document",
        "Embedding",
        "Entity",
        "Features",
        "Fill",
        "FilledMask",
        "Forecast",
        "LabelScore",
        "Series",
        "Span",
        "Timings",
        "Token",
    ),
    "results": ("JobResult", "parse"),
    "settings": ("Settings",),
}
_ROOM_OF: Final = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = [
    "Anomalies",
    "Anomaly",
    "AsyncCortex",
    "AsyncJob",
    "BrokerUnavailable",
    "Classification",
    "ClientClosed",
    "ConfigError",
    "Cortex",
    "CortexError",
    "DeadlineExceeded",
    "Decomposition",
    "DeliveryError",
    "Document",
    "Embedding",
    "Entity",
    "Features",
    "Fill",
    "FilledMask",
    "FleetConfig",
    "Forecast",
    "InferenceFailed",
    "InvalidInput",
    "InvalidParameter",
    "Job",
    "JobCancelled",
    "JobResult",
    "LabelScore",
    "ModelError",
    "ModelUnavailable",
    "NoConsumer",
    "PoisonJob",
    "QueueFull",
    "RequestError",
    "ResultLost",
    "ResultTimeout",
    "Series",
    "Settings",
    "Span",
    "Timings",
    "Token",
    "UnknownModel",
    "UnknownTask",
    "load_fleet",
    "parse",
]


def __getattr__(name: str) -> Any:
    room = _ROOM_OF.get(name)
    if room is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{room}"), name)
    return value


def __dir__() -> list[str]:
    return sorted((*globals(), *__all__))
