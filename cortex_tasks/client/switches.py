"""What the CORTEX_* settings switch back to stock: how a client publishes, and how it hears of answers."""

from __future__ import annotations

from uuid import uuid4

from cortex_tasks.client.core import Core
from cortex_tasks.codec import reply_channel
from cortex_tasks.config import FleetConfig
from cortex_tasks.settings import Settings
from cortex_tasks.wire import AsyncRedisWire, AsyncWire, RedisWire, Wire

__all__ = ["async_wire_of", "core_of", "wire_of"]


def core_of(settings: Settings, fleet: FleetConfig, timeout_s: float) -> Core:
    """Of one client."""
    bare_id = uuid4().hex
    reply_to = reply_channel(bare_id) if settings.replies == "cortex" else bare_id
    return Core(fleet, timeout_s, reply_to=reply_to, coalesces=settings.publish == "cortex")


def wire_of(settings: Settings, fleet: FleetConfig) -> Wire:
    """A ``Cortex``'s."""
    if settings.publish == "cortex":
        return RedisWire(settings)
    # Here, for it loads all of Celery.
    from cortex_tasks.stock import StockWire

    return StockWire(settings, fleet)


def async_wire_of(settings: Settings, fleet: FleetConfig) -> AsyncWire:
    """An ``AsyncCortex``'s."""
    if settings.publish == "cortex":
        return AsyncRedisWire(settings)
    from cortex_tasks.stock import AsyncStockWire

    return AsyncStockWire(settings, fleet)
