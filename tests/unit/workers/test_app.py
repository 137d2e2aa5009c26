"""The wiring: images, node names, prefetch, leases, adoption of models."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery

from cortex_tasks.config import Delivery, FleetConfig, Settings, default_queues_file, load_fleet
from cortex_tasks.errors import CortexError, UnknownModel
from tests.support.redis_server import RedisServer
from tests.support.stub_models import Listener, fleet_of, job
from tests.support.worker_process import WorkerProcess
from workers import app as app_module
from workers import resources
from workers.app import build, image_of, lease_options, prefetch_jobs
from workers.cgroup import CgroupLimits


def settings(**given: Any) -> Settings:
    return Settings(broker_url="redis://127.0.0.1:1/0", **given)


@pytest.fixture(scope="module")
def default_fleet() -> FleetConfig:
    return load_fleet(default_queues_file())


def configured(app: Celery, sender: str, queues: Any = None) -> tuple[str, Celery]:
    """What celeryd_init makes of a worker of this app: its node name; the app's conf is changed."""
    instance = SimpleNamespace(app=app, hostname=sender)
    app_module._configure_worker(sender=sender, instance=instance, conf=app.conf, options={"queues": queues})
    return instance.hostname, app


@pytest.fixture(autouse=True)
def threads_told(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What compute libraries would be told; the environment of the tests stays as it is."""
    told: list[int] = []
    monkeypatch.setattr(app_module, "limit_threads", told.append)
    return told


@pytest.fixture
def no_optimizations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Celery's own set-up of a worker process, which would make the app this process's current one."""
    monkeypatch.setattr(app_module.trace, "setup_worker_optimizations", lambda *_: None)


# ------------------------------------------------------------------------------------------------ images


def test_an_image_is_known_by_its_queues(default_fleet: FleetConfig) -> None:
    for name in ("nlp", "ml"):
        for gpu in (False, True):
            assert image_of(default_fleet, default_fleet.images[name].consumed(gpu=gpu)) == name
    assert image_of(default_fleet, ["spacy", "minilm", "distilbert"]) == "nlp"
    assert image_of(default_fleet, ["minilm"]) == "custom"
    assert image_of(default_fleet, []) == "custom"


@pytest.mark.usefixtures("no_optimizations")
@pytest.mark.parametrize(
    ("image", "queues", "node"),
    [
        (None, "minilm,spacy,distilbert", "nlp"),
        (None, ["minilm"], "custom"),
        ("prod", "minilm", "prod"),
    ],
)
def test_a_node_is_named_after_its_image_and_process(
    default_fleet: FleetConfig, image: str | None, queues: Any, node: str
) -> None:
    named, _ = configured(build(settings(image=image), default_fleet), "celery@box", queues)
    assert named == f"{node}.{os.getpid()}@box"


def test_a_name_that_was_chosen_stays(default_fleet: FleetConfig) -> None:
    app = build(settings(), default_fleet)
    named, _ = configured(app, "mine@box")
    assert named == "mine@box"
    assert app.cortex.node == "mine@box"


def test_other_apps_are_left_alone() -> None:
    plain = Celery("plain", set_as_current=False)
    before = plain.conf.worker_concurrency
    named, _ = configured(plain, "celery@box")
    assert (named, plain.conf.worker_concurrency) == ("celery@box", before)


# --------------------------------------------------------------------------------------- sizes and leases


def test_a_worker_holds_two_of_its_largest_batches() -> None:
    fleet = fleet_of(small={"batching": {"max_items": 4}}, large={"batching": {"max_items": 50}})
    assert prefetch_jobs(fleet, ["small"], "cpu") == 8
    assert prefetch_jobs(fleet, ["small", "large"], "cpu") == 100
    assert prefetch_jobs(fleet, ["elsewhere"], "cpu") == 2


def test_a_worker_with_a_gpu_holds_two_of_the_gpus_batches() -> None:
    fleet = fleet_of(both={"batching": {"max_items": 4, "gpu": {"max_items": 500}}})
    assert [prefetch_jobs(fleet, ["both"], device) for device in ("cpu", "cuda")] == [8, 1_000]


def test_renewed_leases_are_swept_often(default_fleet: FleetConfig) -> None:
    options = lease_options(Delivery(lease_s=30, sweep_s=5))
    assert options == {
        "visibility_timeout": 30,
        "unacked_restore_interval": 5,
        "unacked_restore_throttle": 1,
        "unacked_mutex_expire": 30,
    }
    assert lease_options(Delivery(lease_s=1, sweep_s=0.2))["unacked_mutex_expire"] >= 1


@pytest.mark.usefixtures("no_optimizations")
def test_places_are_kept_for_interactive_jobs_only_where_a_place_is_no_process() -> None:
    fleet = fleet_of(m={})
    hooked, beside_stock = (
        configured(build(settings(pool=pool), fleet), "celery@box", "m")[1].conf.broker_transport_options
        for pool in ("cortex", "stock")
    )
    assert "interactive_share" not in hooked
    assert beside_stock["interactive_share"] == 0


@pytest.mark.usefixtures("no_optimizations")
def test_every_hook_is_on_and_can_be_switched_back() -> None:
    fleet = fleet_of(m={})
    hooked = configured(build(settings(), fleet), "celery@box", "m")[1].conf
    assert hooked.worker_pool == "workers.celery_hooks.pool:BatchingPool"
    assert hooked.result_backend.startswith("workers.celery_hooks.backend:BatchedRedisBackend+redis://")
    assert hooked.broker_transport == "cortex"
    assert hooked.worker_consumer == "workers.celery_hooks.consumer:CortexConsumer"
    assert hooked.worker_concurrency == prefetch_jobs(fleet, ["m"], "cpu")
    assert hooked.broker_transport_options["visibility_timeout"] == fleet.delivery.lease_s
    stock = configured(build(settings(pool="stock", backend="stock", transport="stock"), fleet), "celery@box", "m")[1]
    assert stock.conf.worker_pool == "prefork"
    assert stock.conf.result_backend.startswith("redis://")
    assert stock.conf.broker_transport is None
    assert stock.conf.worker_consumer == "celery.worker.consumer:Consumer"
    # Nobody renews leases there: a time-out of seconds would run slow jobs twice.
    assert stock.conf.broker_transport_options["visibility_timeout"] == 3_600


def test_what_every_worker_promises() -> None:
    conf = build(settings(), fleet_of(m={})).conf
    assert conf.task_acks_late
    assert conf.worker_prefetch_multiplier == 1
    assert conf.accept_content == ["json"]
    assert not conf.task_create_missing_queues


def test_time_outs_keep_redis_from_hanging_the_worker() -> None:
    client = build(settings(connect_timeout_s=2), fleet_of(m={})).cortex.connect()
    options = client.get_connection_kwargs()
    assert (options["socket_timeout"], options["socket_connect_timeout"]) == (5.0, 2)


# ------------------------------------------------------------------------------------- the container's limits


@pytest.fixture
def in_a_container(monkeypatch: pytest.MonkeyPatch) -> CgroupLimits:
    limits = CgroupLimits(2.5, 2 * 10**9, "v2")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    for module in (app_module, resources):
        monkeypatch.setattr(module, "read_limits", lambda: limits)
    return limits


@pytest.mark.usefixtures("in_a_container", "no_optimizations")
def test_a_containers_limits_reach_whatever_takes_cpus_or_memory(
    default_fleet: FleetConfig, caplog: pytest.LogCaptureFixture, threads_told: list[int], tmp_path: Path
) -> None:
    app = configured(build(settings(models_dir=tmp_path), default_fleet), "celery@box", "minilm,spacy,distilbert")[1]
    app.amqp.queues.select(["minilm", "spacy", "distilbert"])
    registry = app.cortex.registry
    given = default_fleet.memory_config
    assert threads_told == [2]
    assert registry._threads == 2
    assert registry.memory.budget_bytes < given.model_cache / 4
    assert registry.fits._max_bytes < given.model_cache / 16 / 4
    assert registry.limits.inference_buffer < given.inference_buffer / 4
    assert registry._buffer_tokens(SimpleNamespace(token_bytes=10**6)) < 200
    assert registry._child_bytes == given.process_pool
    assert [disk.max_bytes < given.shared_memory / 4 for disk in registry.store.disks][-1]
    (line,) = [record.getMessage() for record in caplog.records if "CPUs" in record.getMessage()]
    assert line.startswith("2.5 CPUs and 2,000 MB of memory (cgroup: v2, 2.50 CPUs, 2,000 MB; image: nlp): 2 threads; ")
    assert line.endswith("less than queues.yaml says")


@pytest.mark.usefixtures("in_a_container")
def test_the_images_own_limit_holds_where_it_is_smaller(default_fleet: FleetConfig) -> None:
    image = default_fleet.images["nlp"].model_copy(update={"cpus": 1.0, "memory": 1_500 * 10**6})
    fleet, threads = build(settings(), default_fleet).cortex._within_limits(["minilm"], image)
    assert threads == 1
    assert fleet.memory_config.model_cache < 500 * 10**6


# ----------------------------------------------------------------------------------------------- adoption


@pytest.fixture
def wiring(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A started wiring that consumes queue ``m`` of a fleet with another, without health or leases."""
    monkeypatch.setattr(app_module, "Health", lambda **_: SimpleNamespace(
        start=lambda: None, stop=lambda: None, announce=lambda state: None, errors=0
    ))  # fmt: skip
    fleet = fleet_of(
        m={"load": "pinned"}, broken={"load": "pinned", "queue": "m", "adapter": "nowhere:Nothing"}, late={}
    )
    app = build(settings(transport="stock"), fleet)
    app.amqp.queues.select(["m"])
    made = app.cortex
    made.listener = Listener()
    made.start(made.listener)
    yield made
    for runner in made.stop_runners():
        runner.join(20)
    made.close()


def test_pinned_models_are_ready_and_a_broken_one_stops_nobody(wiring: Any) -> None:
    assert wiring.registry.model("m").state == "ready"
    assert wiring.registry.model("broken").state == "unavailable"
    wiring.submit(job("a", "x"))
    wiring.listener.wait("finished", "a")


def test_models_of_other_queues_are_not_served(wiring: Any) -> None:
    with pytest.raises(UnknownModel, match="wrong queue"):
        wiring.submit(job("astray", "x", model="late"))


def test_a_queue_that_is_added_brings_its_models(wiring: Any) -> None:
    wiring.app.amqp.queues.select_add("late")
    assert wiring.queues == ("m", "late")
    wiring.submit(job("a", "x", model="late"))
    wiring.listener.wait("finished", "a")
    assert wiring.registry.model("late").state == "ready"
    assert len(wiring._all_runners()) == 1, "models of one process share a thread"


def test_a_job_by_itself_needs_no_pool(wiring: Any) -> None:
    task = wiring.app.tasks["cortex.embed"]
    answered = wiring.run_alone(task, (["x"], "m"), {})
    assert answered.items == [{"value": {"said": "x"}}]
    assert isinstance(wiring.run_alone(task, (["x"], "nowhere"), {}), CortexError)
    assert isinstance(wiring.run_alone(task, (["x"], "broken"), {}), CortexError)


# ------------------------------------------------------------------------------------------ command line


@pytest.mark.fleet
def test_an_unknown_queue_is_said_at_once(worker_log: Any, redis_server: RedisServer) -> None:
    with WorkerProcess(redis_server.url, worker_log, queues="echo,ecoh", wait=False) as worker:
        assert worker.process.wait(30) != 0
    assert worker.tail() == "cortex: no model of queues.yaml uses queue 'ecoh'; did you mean 'echo'?"
