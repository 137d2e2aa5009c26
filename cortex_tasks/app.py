"""The Celery app that clients and workers share: queues, routes, serializers, time-outs. It holds no task bodies.

``app`` is made from the environment when it is first asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from celery import Celery
from celery.app.amqp import AMQP
from kombu import Exchange, Queue

from cortex_tasks.codec import PRIORITY_STEPS, SERIALIZER, register_serializer
from cortex_tasks.config import FleetConfig, load_fleet
from cortex_tasks.publish import SHOWN_CHARS
from cortex_tasks.settings import Settings, tls_options
from cortex_tasks.wire import COMMAND_TIMEOUT_S

__all__ = ["app", "broker_options", "make_app", "queue_of"]

if TYPE_CHECKING:
    app: Celery

_PREFIX: Final = "cortex."
_ONE_RETRY: Final = {"max_retries": 1, "interval_start": 0.05, "interval_step": 0.0, "interval_max": 0.05}


class _ReadableAMQP(AMQP):
    """What Celery itself sends (a chain's next link) shows as little of a document as what Cortex sends."""

    argsrepr_maxsize = SHOWN_CHARS
    kwargsrepr_maxsize = SHOWN_CHARS


def make_app(settings: Settings, fleet: FleetConfig, *, name: str = "cortex", fail_fast: bool = False) -> Celery:
    """A Celery app of the fleet. It does not become the process's current app: a user's own stays that.

    ``fail_fast`` is for submitters: an absent Redis is an error within seconds. A worker goes on trying.
    """
    register_serializer()
    made = Celery(name, amqp=_ReadableAMQP, set_as_current=False)
    made.conf.update(
        broker_url=settings.broker,
        result_backend=settings.results,
        broker_transport_options=broker_options(fleet, settings),
        # Left to themselves, kombu verifies no certificate and Celery's backend refuses the URL.
        broker_use_ssl=tls_options(settings.broker) or False,
        redis_backend_use_ssl=tls_options(settings.results),
        broker_connection_timeout=settings.connect_timeout_s,
        redis_socket_connect_timeout=settings.connect_timeout_s,
        redis_socket_timeout=COMMAND_TIMEOUT_S,
        # As other apps declare a queue that they only name, so that both mean the same one.
        task_queues=[Queue(queue, Exchange(queue, type="direct"), routing_key=queue) for queue in fleet.queues],
        task_default_queue=fleet.queues[0],
        # A mistyped -Q or queue= fails at once instead of waiting for jobs that never come.
        task_create_missing_queues=False,
        task_routes=(_router(fleet),),
        task_serializer="json",
        accept_content=["json"],
        result_serializer=SERIALIZER,
        result_accept_content=["json", SERIALIZER],
        result_expires=fleet.delivery.result_ttl_s,
        timezone="UTC",
        enable_utc=True,
    )
    if fail_fast:
        made.conf.task_publish_retry_policy = _ONE_RETRY
        made.conf.result_backend_transport_options = {"retry_policy": _ONE_RETRY}
        made.conf.broker_transport_options = {**made.conf.broker_transport_options, **_ONE_RETRY}
    return made


def broker_options(fleet: FleetConfig, settings: Settings) -> dict[str, Any]:
    """kombu's options for the fleet's broker; every app that publishes to it or consumes from it uses them."""
    return {
        "priority_steps": list(PRIORITY_STEPS),
        "visibility_timeout": fleet.delivery.lease_s,
        "body_encoding": "utf-8",
        "socket_connect_timeout": settings.connect_timeout_s,
        "socket_timeout": COMMAND_TIMEOUT_S,
        "socket_keepalive": True,
        "health_check_interval": 30,
    }


def queue_of(fleet: FleetConfig, task: str, model: str | None) -> str:
    """The queue of a task's model. Raises UnknownModel, UnknownTask."""
    return fleet.model(model, task.removeprefix(_PREFIX))[1].queue


def _router(fleet: FleetConfig) -> Any:
    def route(
        name: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        options: Mapping[str, Any],
        task: Any = None,
        **_: Any,
    ) -> dict[str, Any] | None:
        """The queue follows from the job's model, given by name or as the second argument."""
        if not name.startswith(_PREFIX) or "queue" in options:
            return None
        model = kwargs.get("model") or (args[1] if args and len(args) > 1 else None)
        return {"queue": queue_of(fleet, name, model)}

    return route


def __getattr__(name: str) -> Any:
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    settings = Settings.from_env()
    made = globals()["app"] = make_app(settings, load_fleet(settings.queues_file), fail_fast=True)
    return made
