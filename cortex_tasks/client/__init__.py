"""The clients: one core (``core``, no IO), wrapped once for threads (``sync``) and once for asyncio (``aio``)."""

from __future__ import annotations

from cortex_tasks.client.aio import AsyncCortex
from cortex_tasks.client.jobs import AsyncJob, Job
from cortex_tasks.client.sync import Cortex

__all__ = ["AsyncCortex", "AsyncJob", "Cortex", "Job"]
