"""The result cache as clients use it: near memory, then Redis. docs/cache.md tells how it works."""

from __future__ import annotations

from cortex_tasks.cache.popular import Sampler
from cortex_tasks.cache.shelf import Question, Shelf
from cortex_tasks.cache.tiers import AsyncCache, Cache

__all__ = ["AsyncCache", "Cache", "Question", "Sampler", "Shelf"]
