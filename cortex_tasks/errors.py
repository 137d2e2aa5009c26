"""Every error of Cortex, in one tree.

::

    CortexError
    ├── ConfigError                queues.yaml or a setting is wrong
    ├── RequestError               the caller's input can never work as it is
    │   ├── InvalidInput           one input (text, series) is unusable
    │   ├── InvalidParameter       a parameter is unknown or out of range
    │   ├── UnknownTask
    │   └── UnknownModel
    ├── DeliveryError              the queue could not carry the job or its answer
    │   ├── BrokerUnavailable      Redis does not answer, or refuses
    │   ├── QueueFull              the queue's limit is reached; carries retry_after_s
    │   ├── ResultTimeout          no answer within the time-out
    │   │   └── NoConsumer         ... because no worker consumes the queue
    │   ├── DeadlineExceeded       the job was dropped, uncomputed, past its deadline
    │   ├── JobCancelled
    │   ├── ClientClosed           the client was closed during the call
    │   └── ResultLost             the answer expired or was evicted before it was read
    └── ModelError                 the worker could not answer
        ├── ModelUnavailable       weights or library absent; says the remedy
        ├── InferenceFailed        the model raised on this input
        └── PoisonJob              parked on the dead-letter list after repeated worker deaths

Each class owns its wire ``code`` and says whether the same call may succeed later (``retryable``).
A message says what happened, to which input or model, and what to do. It never holds a secret.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

__all__ = [
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
    "error_from_wire",
]


class CortexError(Exception):
    """Root of the tree.

    ``details`` holds JSON-able facts beside the message (for example ``{"limit": 10000, "got": 10001}``).
    Both are positional, so that Celery can rebuild the exception from its stored ``args``.
    """

    code: ClassVar[str] = "error"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str = "", details: Mapping[str, Any] | None = None) -> None:
        self.message = message
        self.details: dict[str, Any] = dict(details or {})
        super().__init__(message, self.details)

    def __str__(self) -> str:
        return self.message

    def to_wire(self) -> dict[str, Any]:
        """The JSON form that travels in a result item: ``code``, ``message`` and, if any, ``details``."""
        wire: dict[str, Any] = {"code": self.code, "message": self.message}
        if self.details:
            wire["details"] = self.details
        return wire


class ConfigError(CortexError):
    """queues.yaml or a CORTEX_* setting is wrong; the message names the file, the line and the nearest name."""

    code = "config"


class RequestError(CortexError, ValueError):
    """The caller's request can never work as it is."""

    code = "request"


class InvalidInput(RequestError):
    """One input is unusable; its neighbours are not touched."""

    code = "invalid_input"


class InvalidParameter(RequestError):
    """A parameter is unknown, of the wrong type, or out of range."""

    code = "invalid_parameter"


class UnknownTask(RequestError):
    """No such task; the message names the nearest ones."""

    code = "unknown_task"


class UnknownModel(RequestError):
    """No such model, or it does not serve the task; the message names the nearest ones."""

    code = "unknown_model"


class DeliveryError(CortexError):
    """The queue could not carry the job or its answer."""

    code = "delivery"
    retryable = True


class BrokerUnavailable(DeliveryError, ConnectionError):
    """Redis does not answer or refuses; the message says which, and names its URL with the password masked."""

    code = "broker_unavailable"


class QueueFull(DeliveryError):
    """The queue's limit is reached; ``retry_after_s`` estimates when there is room."""

    code = "queue_full"

    @property
    def retry_after_s(self) -> float:
        return float(self.details.get("retry_after_s", 1.0))


class ResultTimeout(DeliveryError, TimeoutError):
    """No answer came within the time-out; the job itself goes on."""

    code = "timeout"


class NoConsumer(ResultTimeout):
    """No answer came because no worker consumes the job's queue."""

    code = "no_consumer"


class DeadlineExceeded(DeliveryError, TimeoutError):
    """The job's deadline passed before it was computed; it was dropped."""

    code = "deadline_exceeded"
    retryable = False


class JobCancelled(DeliveryError):
    """The job was cancelled (revoked) before it was computed."""

    code = "cancelled"
    retryable = False


class ClientClosed(DeliveryError):
    """The client was closed during the call; a job that was on its way goes on."""

    code = "client_closed"


class ResultLost(DeliveryError):
    """The answer expired or was evicted before it was read; submit the job again."""

    code = "result_lost"


class ModelError(CortexError):
    """The worker could not answer."""

    code = "model"


class ModelUnavailable(ModelError):
    """Weights or a library are absent; the message says which and the remedy."""

    code = "model_unavailable"
    retryable = True


class InferenceFailed(ModelError):
    """The model raised on this input."""

    code = "inference_failed"


class PoisonJob(ModelError):
    """The job killed its worker repeatedly and was parked on the dead-letter list."""

    code = "poison_job"


def _walk(cls: type[CortexError]) -> Iterator[type[CortexError]]:
    yield cls
    for child in cls.__subclasses__():
        yield from _walk(child)


_BY_CODE: dict[str, type[CortexError]] = {cls.code: cls for cls in _walk(CortexError)}


def error_from_wire(wire: Mapping[str, Any]) -> CortexError:
    """Rebuild an error from its wire form; a code of a newer version becomes a plain CortexError."""
    cls = _BY_CODE.get(str(wire.get("code", "")), CortexError)
    return cls(str(wire.get("message", "")), wire.get("details"))
