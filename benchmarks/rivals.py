"""What others reach, measured on a 2-core reference machine with the workloads of ``overhead`` and ``throughput``.

A no-op model and 64 single requests in flight from one asyncio client (Celery: all published, then all fetched); MiniLM
as a share of the raw engine of the same minutes. The machine is slower than many: compare absolute figures of two
machines only through stock Celery, which is in both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["RIVALS", "STOCK_PER_S", "Rival"]


@dataclass(frozen=True, slots=True)
class Rival:
    """``server_us``, ``client_us``: CPU a request. Shares of the raw engine with MiniLM, None where not measured:
    64 and 256 singles in flight, bulk requests of 100 texts."""

    name: str
    per_s: float
    server_us: float
    client_us: float
    singles_64: float | None = None
    singles_256: float | None = None
    bulk: float | None = None
    #: Not 64 in flight: all published, then all fetched.
    all_published: bool = False


RIVALS: Final = (
    Rival("mosec 0.9.8", 4390, 82, 182, 0.61, 0.67, 0.91),
    Rival("Ray Serve, direct ingress", 2660, 366, 197, 0.36),
    Rival("infinity 0.0.78", 1020, 914, 310),
    Rival("MLServer 1.7.1", 960, 904, 224, 0.46, 0.55, 0.95),
    Rival("LitServe 0.2.19", 590, 1970, 450, 0.53, 0.56, 1.04),
    Rival("BentoML 1.4.40", 580, 1710, 377, 0.39, 0.40, 0.34),
    Rival("celery-batches 0.11", 510, 1320, 1460, all_published=True),
)
#: Stock Celery 5.7 there, its best pool (solo).
STOCK_PER_S: Final = 470.0
