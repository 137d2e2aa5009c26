"""alias -> loaded model. Loads, warms, names the revision, and remembers why a model is unavailable."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from cortex_tasks.config import FleetConfig, ModelConfig
from cortex_tasks.errors import CortexError, ModelUnavailable, UnknownModel
from cortex_tasks.presence import ModelCard
from workers.adapters import Adapter, LoadContext, adapter_class
from workers.batching import Budget
from workers.budget import BudgetLearner
from workers.store.sources import Snapshot, resolve

__all__ = ["RETRY_LOAD_S", "Model", "Registry", "revision_of"]

logger = logging.getLogger(__name__)

#: A load that failed is tried again by the next job after this long; sooner when the cause may pass by itself.
RETRY_LOAD_S: Final = 30.0
RETRY_TRANSIENT_S: Final = 1.0

#: Time that a load may spend on measuring budgets.
_CALIBRATE_S: Final = 1.0

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
    #: Learns the best budget, where that is asked for and means something.
    learner: BudgetLearner | None = None

    @property
    def budget(self) -> Budget:
        """What the next forward pass may hold."""
        batching = self.config.batching
        tokens = self.learner.next_tokens() if self.learner else batching.max_padded_tokens
        return Budget(batching.max_items, tokens)

    @property
    def brief_budget(self) -> Budget:
        """What a bulk pass may hold while interactive ones come."""
        return self.budget._replace(max_padded_tokens=self.learner.brief_tokens) if self.learner else self.budget

    @property
    def loaded(self) -> Adapter:
        """The adapter of a ready model. Raises ModelUnavailable otherwise."""
        if self.adapter is None:
            raise self.error or ModelUnavailable(f"model {self.alias!r} is not loaded")
        return self.adapter

    def card(self) -> ModelCard:
        return ModelCard(
            alias=self.alias,
            queue=self.config.queue,
            state=self.state,
            revision=self.revision,
            adapter=self.config.adapter,
            backend=(self.adapter and self.adapter.engine) or self.config.backend,
            precision=(self.adapter and self.adapter.precision) or self.config.precision,
            engine=_engine(self.adapter),
            reason=self.reason,
            size_bytes=self.adapter.size_bytes if self.adapter else 0,
            load_ms=round(self.load_ms, 1),
            warm_ms=round(self.warm_ms, 1),
            jobs=self.jobs,
            items=self.items,
            batches=self.batches,
            budget_tokens=self.learner.best_tokens if self.learner else self.config.batching.max_padded_tokens,
        )


def revision_of(config: ModelConfig, adapter: Adapter, digest: str) -> str:
    """The digest (32 hex digits) of all that decides an answer: weights, tokenizer and configuration (the
    snapshot's digest), adapter and its version, library, the engine and the numeric class that really run, options."""
    running = [adapter.engine or config.backend, adapter.precision or config.precision]
    parts = [digest, config.adapter, adapter.version, adapter.library, *running]
    text = json.dumps([*parts, config.options], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _on(config: ModelConfig, device: str) -> ModelConfig:
    """A model's configuration with the batching limits of the device that computes it here."""
    return config.model_copy(update={"batching": config.batching.on(device)})


def _engine(adapter: Adapter | None) -> str:
    return " ".join(filter(None, (adapter.engine, adapter.precision, adapter.figures))) if adapter else ""


class Registry:
    """The models of one worker. ``load`` may be called from any thread; one load of a model runs at a time."""

    def __init__(
        self,
        fleet: FleetConfig,
        aliases: Iterable[str],
        *,
        threads: int,
        device: str,
        models_dir: Path | None,
        clock: Callable[[], float],
        cache_dir: Path | None = None,
    ) -> None:
        self.models = {alias: Model(alias, _on(fleet.models[alias], device)) for alias in aliases}
        children = sum(model.config.children for model in self.models.values())
        #: Each child's share of the memory that queues.yaml gives to child processes.
        self._child_bytes = fleet.memory_config.process_pool // max(children, 1)
        self._buffer_bytes = fleet.memory_config.inference_buffer
        self._threads = threads
        self._device = device
        self._models_dir = models_dir
        self._cache_dir = cache_dir
        self._cache_store = fleet.storage_config.cache_store
        self._clock = clock
        self._locks = {alias: threading.Lock() for alias in self.models}

    def model(self, alias: str) -> Model:
        """Raises UnknownModel when this worker does not host the alias."""
        found = self.models.get(alias)
        if found is None:
            raise UnknownModel(
                f"model {alias!r} is not served by this worker, which serves {', '.join(self.models)}; "
                "the job was sent to the wrong queue",
                {"model": alias},
            )
        return found

    def add(self, alias: str, config: ModelConfig) -> None:
        """Serve one more model, loaded when its first job comes."""
        self._locks[alias] = threading.Lock()
        # Replaced as a whole: other threads walk over it.
        self.models = {**self.models, alias: Model(alias, _on(config, self._device))}

    def may_load(self, model: Model) -> bool:
        """Whether a load should be tried now: not ready, and not failed a moment ago."""
        if model.state == "ready" or model.error is None:
            return model.state != "ready"
        wait_s = RETRY_TRANSIENT_S if model.error.details.get("transient") else RETRY_LOAD_S
        return self._clock() - model.failed_at_s >= wait_s

    def load(self, alias: str) -> Model:
        """Load and warm a model unless it is ready. Raises ModelUnavailable; the reason stays on the model."""
        model = self.model(alias)
        with self._locks[alias]:
            if model.state == "ready":
                return model
            model.state = "loading"
            try:
                self._load(model)
            except (Exception, SystemExit) as error:
                # SystemExit: some libraries end the program where they miss something.
                model.error = _as_unavailable(alias, error)
                model.failed_at_s = self._clock()
                model.reason = str(model.error)
                model.state = "unavailable"
                logger.warning("model %s is unavailable: %s", alias, model.reason)
                raise model.error from error
            model.error = None
            model.state = "ready"
            logger.info("model %s@%s loaded in %.0f ms, warm in %.0f ms", alias, model.revision[:12],
                        model.load_ms, model.warm_ms)  # fmt: skip
            return model

    def close(self) -> None:
        for model in self.models.values():
            if model.adapter is not None:
                try:
                    model.adapter.close()
                except Exception:
                    # The others hold memory and child processes as well.
                    logger.exception("model %s could not be closed", model.alias)

    def _load(self, model: Model) -> None:
        config = model.config
        started = self._clock()
        cls = adapter_class(config.adapter)
        snapshot, missing = self._snapshot(config, optional=cls.weights_optional)
        context = LoadContext(
            alias=model.alias,
            snapshot=snapshot.path,
            digest=snapshot.digest,
            tasks=config.tasks,
            options=config.options,
            threads=self._threads,
            device=self._device,
            precision=config.precision,
            backend=config.backend,
            cache_dir=self._cache_dir or self._cache_store.path,
            cache_bytes=self._cache_store.max_size,
            cache_ttl_s=self._cache_store.ttl_s,
            gate_cosine=config.gate.mean_cosine,
            gate_top10=config.gate.top10_overlap,
        )
        adapter = self._host(config, context) if config.children else cls.load(context)
        loaded = self._clock()
        try:
            _warm(adapter, config.tasks)
            learner = self._learner(config, adapter)
        except BaseException:
            adapter.close()
            raise
        model.adapter = adapter
        model.revision = revision_of(config, adapter, snapshot.digest)
        model.reason = adapter.note or missing
        model.learner = learner
        model.load_ms, model.warm_ms = (loaded - started) * 1e3, (self._clock() - loaded) * 1e3

    def _learner(self, config: ModelConfig, adapter: Adapter) -> BudgetLearner | None:
        """A learner that has seen the model run, for models whose cost grows with tokens."""
        ceiling = config.batching.max_padded_tokens
        if adapter.token_bytes:
            ceiling = max(1, min(ceiling, self._buffer_bytes // adapter.token_bytes))
        if not config.batching.learn or config.children or config.backend == "native":
            return None
        learner = BudgetLearner(ceiling)
        task = config.tasks[0]
        inputs, params = adapter.example(task)
        items = [item for item in adapter.prepare(task, inputs, params) if not isinstance(item, CortexError)]
        longest = max(items, key=lambda item: item.cost_tokens)

        def run(tokens: int) -> float:
            batch = [longest] * min(config.batching.max_items, max(1, tokens // longest.cost_tokens))
            started_s = self._clock()
            adapter.forward(task, batch, params)
            return len(batch) * longest.cost_tokens / max(self._clock() - started_s, 1e-9)

        learner.calibrate(run, _CALIBRATE_S, self._clock)
        return learner

    def _host(self, config: ModelConfig, context: LoadContext) -> Adapter:
        from workers.children import ChildHost

        return ChildHost(
            config.adapter,
            context,
            config.children,
            time_limit_s=config.limits.time_limit_s,
            memory_limit_bytes=self._child_bytes,
        )

    def _snapshot(self, config: ModelConfig, *, optional: bool) -> tuple[Snapshot, str]:
        try:
            return resolve(config.source, config.revision, models_dir=self._models_dir), ""
        except ModelUnavailable as error:
            if not optional:
                raise
            return Snapshot(path=None, digest="", source=config.source), str(error)


def _warm(adapter: Adapter, tasks: Iterable[str]) -> None:
    """One real pass of each task, so that the first job pays for nothing."""
    for task in tasks:
        inputs, params = adapter.example(task)
        items = adapter.prepare(task, inputs, params)
        good = [item for item in items if not isinstance(item, CortexError)]
        if not good:
            raise ModelUnavailable(f"the adapter's own example for {task!r} was refused: {items}")
        adapter.finish(task, good, adapter.forward(task, good, params), params)


def _as_unavailable(alias: str, error: BaseException) -> CortexError:
    if isinstance(error, CortexError):
        return error
    # Not a known cause (a full disk, no memory, a torn file): the same load may succeed later.
    return ModelUnavailable(
        f"model {alias!r} could not be loaded: {type(error).__name__}: {str(error)[:300]}", {"transient": True}
    )
