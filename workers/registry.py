"""alias -> loaded model. Loads, warms, names the revision, and remembers why a model is unavailable."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from cortex_tasks.config import FleetConfig, ModelConfig
from cortex_tasks.errors import CortexError, ModelUnavailable, UnknownModel
from workers.adapters import Adapter, LoadContext, adapter_class
from workers.budget import BudgetLearner
from workers.memory import Memory
from workers.model import Model, revision_of
from workers.store.build import shares
from workers.store.fits import Fits
from workers.store.sources import Snapshot
from workers.store.tiers import Opened, Store

__all__ = ["RETRY_LOAD_S", "Model", "Registry", "revision_of"]

logger = logging.getLogger(__name__)

#: A load that failed is tried again by the next job after this long; sooner when the cause may pass by itself.
RETRY_LOAD_S: Final = 30.0
RETRY_TRANSIENT_S: Final = 1.0

#: The part of the models' memory that remembered fits may take.
_FITS_SHARE: Final = 16

#: Time that a load may spend on measuring budgets.
_CALIBRATE_S: Final = 2.0


def _on(config: ModelConfig, device: str) -> ModelConfig:
    """A model's configuration with the batching limits of the device that computes it here."""
    return config.model_copy(update={"batching": config.batching.on(device)})


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
        store: Store | None = None,
    ) -> None:
        """Without a ``store`` models are read where they lie, or from Hugging Face's own cache."""
        self.models = {alias: Model(alias, _on(fleet.models[alias], device)) for alias in aliases}
        children = sum(model.config.children for model in self.models.values())
        self.store = store or Store(models_dir=models_dir)
        #: Each child's share of the memory that queues.yaml gives to child processes.
        self._child_bytes = fleet.memory_config.process_pool // max(children, 1)
        self.limits = fleet.memory_config
        self._threads = threads
        self._device = device
        l1 = fleet.model_storage.l1_memory
        #: Of models and fits together.
        self.memory_limit_bytes = min(l1.size, fleet.memory_config.model_cache)
        self.fits = Fits(self.store.l2, self.memory_limit_bytes // _FITS_SHARE, self.store.counters)
        self.memory = Memory(
            self.memory_limit_bytes * (_FITS_SHARE - 1) // _FITS_SHARE,
            l1.ttl_s,
            self._let_go,
            clock,
        )
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
        """Whether a load should be tried now: not ready (or about to leave), and not failed a moment ago."""
        if model.state == "ready" and self.memory.stays(model.alias):
            return False
        if model.error is None:
            return True
        wait_s = RETRY_TRANSIENT_S if model.error.details.get("transient") else RETRY_LOAD_S
        return self._clock() - model.failed_at_s >= wait_s

    # ------------------------------------------------------------------------------ in memory or not

    def hold(self, model: Model) -> bool:
        """Use a ready model until ``release``; False when it is not ready, or about to leave the memory."""
        if model.state == "ready" and self.memory.hold(model.alias):
            self.store.counters.hit("memory")
            return True
        self.store.counters.miss("memory")
        return False

    def release(self, alias: str, count: int = 1) -> None:
        self.memory.release(alias, count)

    @contextmanager
    def using(self, alias: str) -> Iterator[Model]:
        """A model that is loaded, if need be, and stays so within. Raises ModelUnavailable."""
        model = self.load(alias, hold=True)
        try:
            yield model
        finally:
            self.release(alias)

    def note_depths(self, jobs_by_queue: Mapping[str, int]) -> None:
        """What waits in the queues: the models of a queue share its jobs as they shared those before."""
        waiting: dict[str, float] = {}
        for queue, jobs in jobs_by_queue.items():
            members = [model for model in self.models.values() if model.config.queue == queue]
            total = sum(model.jobs + 1 for model in members)
            waiting |= {model.alias: jobs * (model.jobs + 1) / total for model in members if jobs}
        self.memory.note_waiting(waiting)

    def _let_go(self, alias: str) -> None:
        """Close a model that nobody uses; a job for it loads it again."""
        model = self.models[alias]
        if model.state == "ready":
            model.state = "idle"
        # What was learned of its batches holds as long as its revision does.
        adapter, model.adapter = model.adapter, None
        self.store.counters.evicted()
        logger.info("model %s leaves the memory", alias)
        try:
            if adapter is not None:
                adapter.close()
        except Exception:
            logger.exception("model %s could not be closed", alias)
        finally:
            if model.opened is not None:
                model.opened.release()

    def load(self, alias: str, *, hold: bool = False) -> Model:
        """Load and warm a model unless it is ready; with ``hold`` it is in use until ``release``.

        Raises ModelUnavailable; the reason stays on the model.
        """
        model = self.model(alias)
        with self._locks[alias]:
            if model.state == "ready" and self.memory.hold(alias):
                if not hold:
                    self.release(alias)
                return model
            # It may have been asked to leave; what is being used is used to the end.
            self.memory.wait_gone(alias)
            model.state = "loading"
            try:
                self._load(model)
            except KeyboardInterrupt:
                raise  # an eager call loads on the main thread
            except BaseException as error:
                # Some libraries end the program where they miss something; a Rust library's panic is no Exception.
                model.error = _as_unavailable(alias, error)
                model.failed_at_s = self._clock()
                model.reason = str(model.error)
                model.state = "unavailable"
                logger.warning("model %s is unavailable: %s", alias, model.reason)
                raise model.error from error
            model.error = None
            model.loads += 1
            model.state = "ready"
            if not hold:
                self.release(alias)
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
            if model.opened is not None:
                model.opened.release()

    def _load(self, model: Model) -> None:
        """Afterwards the model is held once."""
        config = model.config
        started = self._clock()
        cls = adapter_class(config.adapter)
        opened, missing = self._open(config, optional=cls.weights_optional)
        fetched = self._clock()
        try:
            adapter = self._settled(model, cls, opened)
            loaded = self._clock()
            try:
                _warm(adapter, config.tasks)
                revision = revision_of(config, adapter, opened.snapshot.digest)
                known = model.learners if revision == model.revision else None
                learners = known or self._learners(config, adapter)
            except BaseException:
                adapter.close()
                self.memory.forget(model.alias)
                raise
        except BaseException:
            opened.release()
            raise
        if model.loads:
            self.store.counters.reloaded()
        # Only now: a warm-up that recalls its answer would warm nothing.
        adapter.memo = self.fits
        model.adapter, model.opened, model.learners = adapter, opened, learners
        model.buffer_tokens = self._buffer_tokens(adapter)
        model.revision = revision
        model.reason = adapter.note or missing
        model.fetch_ms = (fetched - started) * 1e3
        model.load_ms, model.warm_ms = (loaded - started) * 1e3, (self._clock() - loaded) * 1e3

    def _settled(self, model: Model, cls: type[Adapter], opened: Opened) -> Adapter:
        """The loaded adapter with a place in memory, held. A model larger than its files loads twice, once a worker."""
        config, pinned = model.config, model.config.load == "pinned"
        context = self._context(model.alias, config, opened.snapshot)
        while True:
            # Children live from a budget of their own: memory_config.process_pool.
            size_bytes = 0 if config.children else model.size_bytes or opened.size_bytes
            self.memory.enter(model.alias, size_bytes, pinned=pinned, reload_s=max(model.load_ms, 1.0) / 1e3)
            began_s = self._clock()
            adapter: Adapter | None = None
            try:
                adapter = self._host(config, context) if config.children else cls.load(context)
                model.size_bytes = 0 if config.children else adapter.size_bytes
                if self.memory.settle(model.alias, model.size_bytes, self._clock() - began_s):
                    return adapter
            except BaseException:
                if adapter is not None:
                    adapter.close()
                self.memory.forget(model.alias)
                raise
            adapter.close()
            self.memory.forget(model.alias)

    def _context(self, alias: str, config: ModelConfig, snapshot: Snapshot) -> LoadContext:
        return LoadContext(
            alias=alias,
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

    def _buffer_tokens(self, adapter: Adapter) -> int | None:
        """The most padded tokens whose forward pass keeps within ``inference_buffer``."""
        return max(1, self.limits.inference_buffer // adapter.token_bytes) if adapter.token_bytes else None

    def _learners(self, config: ModelConfig, adapter: Adapter) -> dict[str, BudgetLearner]:
        """A learner a task, for models whose cost grows with tokens. All begin with what warm-up finds for the first
        task: measuring each would multiply the load's time."""
        ceiling = config.batching.max_padded_tokens
        ceiling = min(ceiling, self._buffer_tokens(adapter) or ceiling)
        if not config.batching.learn or config.children or config.backend == "native":
            return {}
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

        most_tokens = config.batching.max_items * longest.cost_tokens
        learner.calibrate(run, _CALIBRATE_S, self._clock, most_tokens=most_tokens)
        return {task: copy.deepcopy(learner) for task in config.tasks}

    def _host(self, config: ModelConfig, context: LoadContext) -> Adapter:
        from workers.children import ChildHost

        return ChildHost(
            config.adapter,
            context,
            config.children,
            time_limit_s=config.limits.time_limit_s,
            share_bytes=self._child_bytes,
        )

    def _open(self, config: ModelConfig, *, optional: bool) -> tuple[Opened, str]:
        try:
            return self.store.open(config.source, config.revision, mirrors=config.mirrors, share=shares(config)), ""
        except ModelUnavailable as error:
            if not optional:
                raise
            return Opened(Snapshot(path=None, digest="", source=config.source)), str(error)


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
