"""The shared Celery app: queues, routes, serializers, and quick failure for submitters."""

from __future__ import annotations

import ssl
import subprocess
import sys

import pytest
import redis
from celery import Celery, current_app
from celery.exceptions import QueueNotFound

from cortex_tasks.app import broker_options, make_app, queue_of
from cortex_tasks.config import FleetConfig, load_fleet
from cortex_tasks.config import default_queues_file as default_file
from cortex_tasks.errors import UnknownModel
from cortex_tasks.settings import Settings
from workers.celery_hooks.transport import register_transport


@pytest.fixture(scope="module")
def fleet() -> FleetConfig:
    return load_fleet(default_file())


@pytest.fixture(scope="module")
def app(fleet: FleetConfig) -> Celery:
    return make_app(Settings(), fleet)


def queue_for(app: Celery, task: str, **kwargs: object) -> str:
    return str(app.amqp.router.route({}, task, (), kwargs)["queue"].name)


def test_a_task_goes_to_the_queue_of_its_model(app: Celery) -> None:
    assert queue_for(app, "cortex.embed", model="minilm") == "minilm"
    assert queue_for(app, "cortex.classify", model="sentiment") == "distilbert"
    assert queue_for(app, "cortex.forecast") == "prophet"
    assert app.amqp.router.route({}, "cortex.embed", (["x"], "minilm"), {})["queue"].name == "minilm"
    with pytest.raises(UnknownModel, match="did you mean 'minilm'"):
        queue_for(app, "cortex.embed", model="minlm")


def test_an_explicit_queue_wins_and_a_mistyped_one_fails(app: Celery) -> None:
    route = app.amqp.router.route({"queue": "spacy"}, "cortex.embed", (), {"model": "minilm"})
    assert route["queue"].name == "spacy"
    with pytest.raises(QueueNotFound):
        app.amqp.router.route({"queue": "spcy"}, "cortex.embed", (), {"model": "minilm"})


def test_queues_are_those_that_any_celery_app_would_declare(app: Celery, fleet: FleetConfig) -> None:
    assert tuple(app.amqp.queues) == fleet.queues
    stock = Celery("stock", set_as_current=False).amqp.queues["minilm"]
    ours = app.amqp.queues["minilm"]
    assert (ours.exchange.name, ours.routing_key, ours.exchange.type) == (
        stock.exchange.name, stock.routing_key, stock.exchange.type,
    )  # fmt: skip


def test_nothing_but_json_and_our_own_encoding_is_accepted(app: Celery) -> None:
    assert app.conf.accept_content == ["json"]
    assert app.conf.task_serializer == "json"
    assert (app.conf.result_serializer, set(app.conf.result_accept_content)) == ("cortex", {"json", "cortex"})


def test_time_outs_and_lifetimes_come_from_the_configuration(fleet: FleetConfig) -> None:
    settings = Settings(connect_timeout_s=1.5)
    app = make_app(settings, fleet)
    assert app.conf.result_expires == fleet.delivery.result_ttl_s
    options = broker_options(fleet, settings)
    assert (options["visibility_timeout"], options["socket_connect_timeout"]) == (fleet.delivery.lease_s, 1.5)
    assert options["priority_steps"] == [0, 3, 6, 9]
    # A worker keeps Celery's patience; a submitter does not.
    assert "max_retries" not in app.conf.broker_transport_options
    assert make_app(settings, fleet, fail_fast=True).conf.broker_transport_options["max_retries"] == 1


def test_a_users_current_app_stays_current(fleet: FleetConfig) -> None:
    mine = Celery("mine")
    mine.set_current()
    make_app(Settings(), fleet)
    assert current_app._get_current_object() is mine


def test_queue_of(fleet: FleetConfig) -> None:
    assert queue_of(fleet, "cortex.zero_shot", "mnli") == "distilbert"
    assert queue_of(fleet, "embed", None) == "minilm"


def test_importing_it_reads_no_environment_and_its_app_does() -> None:
    code = (
        "import os; os.environ['CORTEX_BROKER_URL'] = 'nonsense'\n"
        "import cortex_tasks.app as module, cortex_tasks.tasks\n"
        "from cortex_tasks.errors import ConfigError\n"
        "try: module.app\n"
        "except ConfigError as error: assert 'CORTEX_BROKER_URL' in str(error)\n"
        "else: raise SystemExit('no error')\n"
        "os.environ['CORTEX_BROKER_URL'] = 'redis://somewhere:1'\n"
        "assert module.app is module.app and module.app.conf.broker_url == 'redis://somewhere:1'\n"
        "from cortex_tasks.tasks import embed; assert embed.app is module.app\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", {"ssl_cert_reqs": ssl.CERT_REQUIRED}),
        ("?ssl_ca_certs=/etc/ca.pem", {"ssl_cert_reqs": ssl.CERT_REQUIRED, "ssl_ca_certs": "/etc/ca.pem"}),
        ("?ssl_cert_reqs=none", {"ssl_cert_reqs": ssl.CERT_NONE}),
    ],
)
def test_certificates_are_verified_unless_the_url_says_otherwise(
    fleet: FleetConfig, query: str, expected: dict[str, object]
) -> None:
    settings = Settings.model_validate({
        "broker_url": f"rediss://h:7000/1{query}", "result_url": f"rediss://h:7001/1{query}",
    })  # fmt: skip
    app = make_app(settings, fleet)
    # Under the worker's own name for its transport the scheme no longer says TLS.
    app.conf.broker_transport = register_transport()
    for options in (
        app.connection_for_write().ssl,
        app.backend.connparams,
        redis.Redis.from_url(settings.broker).get_connection_kwargs(),
    ):
        made = redis.SSLConnection(**{name: value for name, value in options.items() if name.startswith("ssl_")})
        assert made.cert_reqs == expected["ssl_cert_reqs"]
        assert made.ca_certs == expected.get("ssl_ca_certs")
        assert made.check_hostname is (made.cert_reqs is ssl.CERT_REQUIRED)


def test_a_plain_url_is_not_tls(app: Celery) -> None:
    assert app.connection_for_write().ssl is False
    assert "ssl_cert_reqs" not in app.backend.connparams
