"""Threads that each compute by themselves."""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass

__all__ = ["Crew"]


@dataclass(frozen=True, slots=True)
class Crew:
    """On each of its threads a forward pass may run, beside those on the others."""

    threads: int
    executor: Executor
