"""The worker's Celery app: ``celery -A workers.app worker -Q $(cortex queues nlp)``. The only file that wires."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final
from uuid import uuid4

import redis
from celery import Celery, Task, signals
from celery.app import trace
from redis.backoff import NoBackoff
from redis.retry import Retry

from cortex_tasks.app import make_app
from cortex_tasks.cache.breaker import Breaker
from cortex_tasks.cache.counters import Counters
from cortex_tasks.cache.popular import Kind, Sampler
from cortex_tasks.cache.tiers import BULK_TIMEOUT_S, cache_options
from cortex_tasks.catalog import nearest
from cortex_tasks.codec import HEADER
from cortex_tasks.config import Delivery, FleetConfig, ImageConfig, Settings, load_fleet, mask_url
from cortex_tasks.errors import CortexError
from workers import huge_pages
from workers.admission import Events
from workers.celery_hooks.backend import BatchedRedisBackend
from workers.celery_hooks.leases import LeaseKeeper
from workers.celery_hooks.transport import register_transport
from workers.cgroup import read_limits
from workers.dead_letters import DeadLetters
from workers.desk import CacheDesk
from workers.flights import FlightTower
from workers.health import Health
from workers.herald import Herald
from workers.registry import Registry
from workers.resources import (
    available_cpus,
    available_memory,
    bound_kernels,
    calm_openmp,
    device,
    keep_memory,
    limit_threads,
    spare_garbage,
    threads_for,
)
from workers.runner import Runner
from workers.runtime import Job, answer, run_alone
from workers.sizing import allowed_memory, describe, fitted
from workers.store.build import open_store
from workers.tasks import register_tasks, to_job
from workers.warming import Gate, Warmer

__all__ = ["Wiring", "app", "build"]

logger = logging.getLogger(__name__)

#: kombu's own visibility time-out (seconds), for when nobody renews leases.
_STOCK_VISIBILITY_S: Final = 3_600
_POOL: Final = "workers.celery_hooks.pool:BatchingPool"
_DISPATCHER: Final = "workers.celery_hooks.events:TurnDispatcher"
_CONSUMER: Final = "workers.celery_hooks.consumer:CortexConsumer"
_BACKEND: Final = "workers.celery_hooks.backend:BatchedRedisBackend"


calm_openmp()
bound_kernels()
keep_memory()


class Wiring:
    """What the worker's parts share: ``app.cortex``. Built when a worker starts, not when the module is imported."""

    def __init__(self, app: Celery, settings: Settings, fleet: FleetConfig) -> None:
        self.app = app
        self.settings = settings
        self.fleet = fleet
        self.node = ""
        self.dead_letters = DeadLetters(self.connect)
        self._registry: Registry | None = None
        self._registry_lock = threading.Lock()
        self._runners: dict[str, Runner] = {}
        self._local: Runner
        self._events: Events
        self._desk: CacheDesk | None = None
        self._warmer: Warmer | None = None
        self._sampler = Sampler.of(fleet.cache_warming)
        self._lease_keeper: LeaseKeeper | None = None
        self.health: Health | None = None

    def connect(self) -> redis.Redis:
        """A client of the broker's Redis, for what Cortex itself keeps there. Time-outs: never hangs."""
        timeout_s = self.settings.connect_timeout_s
        return redis.Redis.from_url(
            self.settings.broker, socket_timeout=max(timeout_s, 5.0), socket_connect_timeout=timeout_s
        )

    def _connect_cache(self) -> redis.Redis:
        return redis.Redis.from_url(self.settings.cache, **cache_options(Retry(NoBackoff(), 0), BULK_TIMEOUT_S))

    def _new_warmer(self, desk: CacheDesk, events: Events) -> Warmer | None:
        if self.fleet.cache_warming is None:
            return None
        busy = getattr(events, "has_interactive", bool)
        client = self._connect_cache()
        return Warmer(
            self.fleet.cache_warming, self.registry, client, desk.submit, busy, desk.counters, owner=self.node
        )

    def _new_desk(self, events: Events) -> CacheDesk:
        """The result cache's part of this worker."""
        # No blanks: a claim in Redis is the owner and its lane.
        owner = f"{os.getpid()}@{socket.gethostname()}:{uuid4().hex[:8]}".replace(" ", "_")
        breaker = Breaker(mask_url(self.settings.cache))
        tower = FlightTower(self._connect_cache(), owner, self.fleet.answers_max_bytes, breaker)
        desk = CacheDesk(
            tower,
            self.registry,
            events,
            Herald(self.registry, tower.activate),
            lambda job: self._runners[job.model].submit(job),
            counters=Counters(sampler=self._sampler),
            entry_max_bytes=self.fleet.cache.entry_max_size,
        )
        backend = self.app.backend
        if isinstance(backend, BatchedRedisBackend) and self.settings.cache == self.settings.results:
            backend.rider = desk.ledger
        return desk

    @property
    def queues(self) -> tuple[str, ...]:
        """The queues this worker consumes (``-Q``)."""
        return tuple(self.app.amqp.queues.consume_from)

    @property
    def image(self) -> str:
        """CORTEX_IMAGE, else the image whose queues are the consumed ones, else "custom"."""
        return self.settings.image or image_of(self.fleet, self.queues)

    @property
    def registry(self) -> Registry:
        """The models of the consumed queues."""
        with self._registry_lock:
            if self._registry is None:
                queues = set(self.queues)
                image = self.fleet.images.get(self.image)
                aliases = [alias for alias, model in self.fleet.models.items() if model.queue in queues]
                fleet, threads = self._within_limits(aliases, image)
                self._registry = Registry(
                    fleet,
                    aliases,
                    threads=threads,
                    device=device(),
                    models_dir=self.settings.models_dir,
                    cache_dir=self.settings.cache_dir,
                    store=open_store(fleet, self.settings, image),
                    clock=time.monotonic,
                )
            return self._registry

    def _within_limits(self, aliases: Sequence[str], image: ImageConfig | None) -> tuple[FleetConfig, int]:
        """The fleet with the memory that this worker has, and its compute threads; says what was found and set."""
        limits = read_limits()
        threads = threads_for(image, limits)
        memory_bytes = allowed_memory(available_memory(limits), image)
        fleet = fitted(self.fleet, memory_bytes, children=sum(self.fleet.models[name].children for name in aliases))
        cut = fleet is not self.fleet
        logger.log(
            logging.WARNING if cut else logging.INFO,
            "%.1f CPUs and %s MB of memory (cgroup: %s; image: %s): %d threads; %s%s",
            available_cpus(limits), f"{memory_bytes / 1e6:,.0f}", limits, self.image, threads,
            describe(fleet.memory_config), ", less than queues.yaml says" if cut else "",
        )  # fmt: skip
        return fleet, threads

    def start(self, events: Events) -> None:
        """Load the pinned models, side by side, and start the threads. Returns when all are warm or known to fail."""
        registry = self.registry
        self._desk = self._new_desk(Gate(events) if self.fleet.cache_warming is not None else events)
        self._warmer = self._new_warmer(self._desk, events)
        self._events = self._desk
        self._local = self._new_runner("local")
        self._runners = {alias: self._runner_for(alias) for alias in registry.models}
        self.health = Health(
            node=self.node,
            image=self.image,
            host=socket.gethostname(),
            queues=lambda: self.queues,
            registry=registry,
            runners=self._all_runners,
            in_flight=getattr(events, "in_flight", dict),
            connect=self.connect,
            settled=lambda: getattr(events, "settled", 0),
            held_up=getattr(events, "waits_for_redis", bool),
        )
        self.health.start()
        pinned = [alias for alias, model in registry.models.items() if model.config.load == "pinned"]
        with ThreadPoolExecutor(max_workers=max(1, len(pinned)), thread_name_prefix="load") as executor:
            list(executor.map(self._load_pinned, pinned))
        if self.settings.huge_pages:
            huge_pages.gather()
        spare_garbage()
        for runner in self._all_runners():
            runner.start()
        self._desk.start()
        if self._warmer is not None:
            self._warmer.start()
        if self.settings.transport == "cortex":
            self._lease_keeper = LeaseKeeper(self.connect, self.fleet.delivery.lease_s)
            self._lease_keeper.start()

    def _load_pinned(self, alias: str) -> None:
        try:
            self.registry.load(alias)
        except CortexError:
            # Logged by the registry, shown by `cortex models`; the other models serve, and a job tries again.
            logger.error("pinned model %s is unavailable; the worker starts without it", alias)

    def submit(self, job: Job) -> None:
        """Raises UnknownModel when this worker does not serve the job's model."""
        if job.model not in self._runners:
            self._adopt(job.model)
        assert self._desk is not None, "the worker has started"
        if self._sampler is not None and job.cache != "off":
            self._sampler.offer(Kind(job.model, job.task, job.group.params), job.inputs)
        self._desk.submit(job)

    def _adopt(self, alias: str) -> Runner:
        """The runner of a model whose queue was added while the worker runs (``celery control add_consumer``)."""
        if self.fleet.models[alias].queue in self.queues:
            self.registry.add(alias, self.fleet.models[alias])
        runner = self._runners[alias] = self._runner_for(alias)
        if runner.ident is None:
            runner.start()
        return runner

    def _runner_for(self, alias: str) -> Runner:
        hosted = self.registry.model(alias).config.children > 0
        return self._new_runner(alias) if hosted else self._local

    def _new_runner(self, name: str) -> Runner:
        return Runner(name, self.registry, self._events, stop_grace_s=self.settings.stop_grace_s)

    def _all_runners(self) -> list[Runner]:
        return list(dict.fromkeys(list(self._runners.values())))

    def note_errors(self, count: int) -> None:
        if count and self.health is not None:
            self.health.errors += count

    def stop_runners(self) -> list[Runner]:
        """Tell the runners to finish what has started; returns those still to be joined."""
        if self.health is not None:
            self.health.announce("stopping")
        if self._warmer is not None:
            self._warmer.stop()
        if self._desk is not None:
            self._desk.stop()
        runners = [runner for runner in self._all_runners() if runner.ident is not None]
        for runner in runners:
            runner.stop()
        return runners

    def close(self) -> None:
        if self._desk is not None:
            self._desk.close()
        if self._lease_keeper is not None:
            self._lease_keeper.stop()
        if self.health is not None:
            self.health.stop()
        if self._registry is not None:
            self._registry.close()

    def run_alone(self, task: Task, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """A batch of one, for stock pools and eager calls. Returns the answer or the error."""
        headers = {name: task.request.get(name) for name in (HEADER, "delivery_info")}
        try:
            job = to_job(task.request.id or "", task.name, args, kwargs, self.fleet, headers)
            with self.registry.using(job.model) as model:
                run_alone(job, model.loaded, model.budget(job.task))
                return answer(job, model.revision)
        except CortexError as error:
            return error


def image_of(fleet: FleetConfig, queues: Sequence[str]) -> str:
    """The image that consumes exactly these queues, with or without a GPU; "custom" when none does."""
    wanted = set(queues)
    for name, image in fleet.images.items():
        if wanted and wanted in (set(image.consumed(gpu=False)), set(image.consumed(gpu=True))):
            return name
    return "custom"


def build(settings: Settings | None = None, fleet: FleetConfig | None = None) -> Celery:
    """The worker's app, wired: the light client's app plus pool, backend, task bodies."""
    settings = settings or Settings.from_env()
    fleet = fleet or load_fleet(settings.queues_file)
    app = make_app(settings, fleet)
    app.cortex = Wiring(app, settings, fleet)
    app.conf.update(
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        worker_prefetch_multiplier=1,
        worker_send_task_events=True,
        worker_hijack_root_logger=True,
        worker_enable_remote_control=True,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        broker_connection_retry_on_startup=True,
    )
    if settings.pool == "cortex":
        app.conf.worker_pool = _POOL
    if settings.backend == "cortex":
        app.conf.result_backend = f"{_BACKEND}+{settings.results}"
    register_tasks(app)
    return app


@signals.celeryd_init.connect
def _configure_worker(
    sender: str | None = None, instance: Any = None, conf: Any = None, options: Any = None, **_: Any
) -> None:
    """A worker process (not Flower, not a client) is about to start: name it, size its prefetch, hook its transport."""
    wiring: Wiring | None = getattr(instance.app, "cortex", None)
    if wiring is None:
        return
    queues = _queue_names((options or {}).get("queues")) or wiring.fleet.queues
    for name in queues:
        if name not in instance.app.amqp.queues:
            # Celery's own answer is a traceback. (A signal's receiver may end the process, but not raise errors.)
            raise SystemExit(f"cortex: no model of queues.yaml uses queue {name!r}{nearest(name, wiring.fleet.queues)}")
    image = wiring.settings.image or image_of(wiring.fleet, queues)
    limit_threads(threads_for(wiring.fleet.images.get(image)))
    if sender and sender.startswith("celery@"):
        # Two workers on a host need two names, and no flag should be needed for that.
        instance.hostname = f"{image}.{os.getpid()}@{sender.partition('@')[2]}"
        trace.setup_worker_optimizations(instance.app, instance.hostname)
    wiring.node = instance.hostname
    if wiring.settings.pool == "cortex":
        conf.worker_concurrency = prefetch_jobs(wiring.fleet, queues, device())
        instance.app.events.dispatcher_cls = _DISPATCHER
    if wiring.settings.transport == "cortex":
        conf.broker_transport = register_transport()
        conf.worker_consumer = _CONSUMER
        conf.broker_transport_options = {**conf.broker_transport_options, **lease_options(wiring.fleet.delivery)}
        if wiring.settings.pool == "stock":
            # A place there is a process or a thread, which would stand idle.
            conf.broker_transport_options["interactive_share"] = 0.0
    else:
        conf.broker_transport_options = {**conf.broker_transport_options, "visibility_timeout": _STOCK_VISIBILITY_S}


def lease_options(delivery: Delivery) -> dict[str, Any]:
    """kombu's options for leases that the LeaseKeeper renews: sweep often, and let no dead sweeper block the others."""
    return {
        "visibility_timeout": delivery.lease_s,
        "unacked_restore_interval": delivery.sweep_s,
        "unacked_restore_throttle": 1,
        "unacked_mutex_expire": max(1, round(delivery.lease_s)),
    }


def _queue_names(given: Any) -> tuple[str, ...]:
    if isinstance(given, str):
        given = given.split(",")
    return tuple(name.strip() for name in given or () if name.strip())


def prefetch_jobs(fleet: FleetConfig, queues: Sequence[str], on: str) -> int:
    """Jobs a worker holds at once: twice its largest batch, so that the next one is ready when one ends.

    ``on``: its device.
    """
    largest = [model.batching.on(on).max_items for model in fleet.models.values() if model.queue in queues]
    return 2 * max(largest, default=1)


@signals.worker_ready.connect
def _announce_ready(sender: Any = None, **_: Any) -> None:
    wiring: Wiring | None = getattr(sender.app, "cortex", None)
    if wiring is not None and wiring.health is not None:
        wiring.health.announce("ready")


@signals.worker_shutting_down.connect
def _announce_stopping(sender: Any = None, **_: Any) -> None:
    wiring: Wiring | None = getattr(app, "cortex", None)
    if wiring is not None and wiring.health is not None:
        wiring.health.announce("stopping")


app = build()
