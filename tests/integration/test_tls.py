"""Every way to Redis over TLS: both clients, Celery-native tasks, a real worker's broker and results."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from cortex_tasks import AsyncCortex, BrokerUnavailable, Cortex, Settings
from cortex_tasks.app import make_app
from cortex_tasks.config import FleetConfig
from cortex_tasks.tasks import register
from tests.support.redis_server import RedisServer
from tests.support.tls_proxy import TlsProxy, make_certificate
from tests.support.worker_process import WorkerProcess

pytestmark = [
    pytest.mark.fleet,
    pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl command to make a certificate with"),
]


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """A URL that names the certificate's authority, and one that does not, of a Redis with a worker behind TLS."""
    directory = tmp_path_factory.mktemp("tls")
    certificate, key = make_certificate(directory)
    with RedisServer(directory=directory) as server, TlsProxy(server.port, certificate, key) as proxy:
        stranger = f"rediss://127.0.0.1:{proxy.port}/0"
        trusted = f"{stranger}?ssl_ca_certs={certificate}"
        with WorkerProcess(trusted, directory / "worker.log", wait=False) as worker:
            worker.wait_ready(60)
            yield trusted, stranger


async def test_jobs_are_answered(urls: tuple[str, str], echo_fleet: FleetConfig) -> None:
    with Cortex(urls[0], fleet=echo_fleet, timeout_s=20) as client:
        assert client.embed("x", model="echo").dimensions
    async with AsyncCortex(urls[0], fleet=echo_fleet, timeout_s=20) as asynchronous:
        assert (await asynchronous.embed("x", model="echo")).dimensions


def test_celery_native_tasks_are_answered(urls: tuple[str, str], echo_fleet: FleetConfig) -> None:
    settings = Settings.model_validate({"broker_url": urls[0]})
    embed = register(make_app(settings, echo_fleet, fail_fast=True), settings, echo_fleet)["embed"]
    assert len(embed.delay(["x"], model="echo").get(timeout=20)["items"]) == 1


async def test_an_unknown_certificate_is_refused(urls: tuple[str, str], echo_fleet: FleetConfig) -> None:
    with (
        Cortex(urls[1], fleet=echo_fleet) as client,
        pytest.raises(BrokerUnavailable, match="CERTIFICATE_VERIFY_FAILED"),
    ):
        client.embed("x", model="echo")
    async with AsyncCortex(urls[1], fleet=echo_fleet) as asynchronous:
        with pytest.raises(BrokerUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
            await asynchronous.embed("x", model="echo")


def test_celery_refuses_it_too(urls: tuple[str, str], echo_fleet: FleetConfig) -> None:
    app = make_app(Settings.model_validate({"broker_url": urls[1]}), echo_fleet, fail_fast=True)
    with app.connection_for_write() as connection, pytest.raises(Exception, match="CERTIFICATE_VERIFY_FAILED"):
        connection.default_channel.client.ping()
    with pytest.raises(Exception, match="CERTIFICATE_VERIFY_FAILED"):
        app.backend.client.ping()
