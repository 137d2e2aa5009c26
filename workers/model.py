"""A model as its worker knows it: state, adapter, counters, and the digest of all that decides its answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from cortex_tasks.config import ModelConfig
from cortex_tasks.errors import CortexError, ModelUnavailable
from cortex_tasks.presence import ModelCard
from workers.adapters import Adapter
from workers.batching import Budget
from workers.budget import BudgetLearner
from workers.store.tiers import Opened

__all__ = ["Model", "revision_of"]

State = Literal["idle", "loading", "ready", "unavailable"]


@dataclass(slots=True)
class Model:
    """One alias in this worker. Counters are written by the model's runner thread only."""

    alias: str
    config: ModelConfig
    state: State = "idle"
    adapter: Adapter | None = None
    revision: str = ""
    reason: str = ""
    error: CortexError | None = None
    failed_at_s: float = 0.0
    load_ms: float = 0.0
    warm_ms: float = 0.0
    jobs: int = 0
    items: int = 0
    batches: int = 0
    #: In forward passes; those at the same time count each.
    forward_s: float = 0.0
    loads: int = 0
    #: In the worker's own process, as the last load found it; 0 before.
    size_bytes: int = 0
    fetch_ms: float = 0.0
    #: Its files, held while it is loaded.
    opened: Opened | None = None
    #: Padded tokens that the inference buffer holds; None: not known.
    buffer_tokens: int | None = None
    #: Each learns the best budget of one task, where that is asked for and means something: a token costs one task
    #: several times what it costs another, and the best budgets differ.
    learners: Mapping[str, BudgetLearner] = field(default_factory=dict)

    def budget(self, task: str) -> Budget:
        """What the next forward pass of a task may hold."""
        batching, learner = self.config.batching, self.learners.get(task)
        tokens = learner.next_tokens() if learner else batching.max_padded_tokens
        return Budget(batching.max_items, min(tokens, self.buffer_tokens or tokens))

    def brief_budget(self, task: str) -> Budget:
        """What a bulk pass may hold while interactive ones come."""
        budget, learner = self.budget(task), self.learners.get(task)
        return budget._replace(max_padded_tokens=learner.brief_tokens) if learner else budget

    @property
    def loaded(self) -> Adapter:
        """The adapter of a ready model. Raises ModelUnavailable otherwise."""
        if self.adapter is None:
            raise self.error or ModelUnavailable(f"model {self.alias!r} is not loaded")
        return self.adapter

    @property
    def batch_bytes(self) -> int:
        """What the forward pass of a full batch takes at most; 0 when it is not known."""
        adapter = self.adapter
        if adapter is None:
            return 0
        return max(self.budget(task).max_padded_tokens for task in self.config.tasks) * adapter.token_bytes

    @property
    def process_bytes(self) -> int:
        """What its child processes hold; 0 for a model that has none."""
        adapter = self.adapter
        return adapter.size_bytes if adapter and self.config.children else 0

    def card(self) -> ModelCard:
        # Read once: another thread may let the model go.
        adapter, learners, opened = self.adapter, self.learners, self.opened
        return ModelCard(
            alias=self.alias,
            queue=self.config.queue,
            state=self.state,
            revision=self.revision,
            adapter=self.config.adapter,
            backend=(adapter and adapter.engine) or self.config.backend,
            precision=(adapter and adapter.precision) or self.config.precision,
            engine=_engine(adapter),
            reason=self.reason,
            size_bytes=adapter.size_bytes if adapter else 0,
            load_ms=round(self.load_ms, 1),
            warm_ms=round(self.warm_ms, 1),
            jobs=self.jobs,
            items=self.items,
            batches=self.batches,
            forward_s=round(self.forward_s, 3),
            budget_tokens=max(
                learners[task].best_tokens if task in learners else self.budget(task).max_padded_tokens
                for task in self.config.tasks
            ),
            tier=(opened and opened.tier) or "",
            fetch_ms=round(self.fetch_ms, 1),
            loads=self.loads,
        )


def revision_of(config: ModelConfig, adapter: Adapter, digest: str) -> str:
    """The digest (32 hex digits) of all that decides an answer: weights, tokenizer and configuration (the
    snapshot's digest), adapter and its version, library, the engine and the numeric class that really run, options."""
    running = [adapter.engine or config.backend, adapter.precision or config.precision]
    parts = [digest, config.adapter, adapter.version, adapter.library, *running]
    text = json.dumps([*parts, config.options], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _engine(adapter: Adapter | None) -> str:
    return " ".join(filter(None, (adapter.engine, adapter.precision, adapter.figures))) if adapter else ""
