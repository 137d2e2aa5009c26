"""A started pool without a broker, and requests that note what is done to them: the test's thread is the hub's."""

from __future__ import annotations

import select
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Literal

from celery import Celery

from cortex_tasks.config import Settings
from cortex_tasks.errors import CortexError
from tests.support.stub_models import PATIENCE_S, StubAdapter, fleet_of
from workers.app import build
from workers.celery_hooks.pool import BatchingPool


class PoolRequest:
    """Celery's side of a job: what the pool touches of it, and what was done to it, in ``log``."""

    def __init__(self, bench: PoolBench, job_id: Any, *inputs: Any, redelivered: bool = False, **given: Any) -> None:
        self.log: list[str] = []
        self.id = job_id
        self.stamps: dict[str, Any] = given.pop("stamps", {})
        self.name = given.pop("task", "cortex.embed")
        self.task = bench.app.tasks[self.name]
        self._payload = given.pop("payload", ([], {"inputs": list(inputs), "model": "m", **given}, {}))
        self.delivery_info = {"redelivered": redelivered}
        self.message = SimpleNamespace(_raw={}, delivery_tag=f"tag-{job_id}", channel=SimpleNamespace(qos=None))
        self.acknowledged = False
        self.returned: Any = None
        self.pid: int | None = None
        self._already_revoked = False
        self._terminate_on_ack: Any = None
        self.is_revoked: Callable[[], bool] = lambda: False
        self.on_start: Callable[[], None] = lambda: None
        self.on_callback: Callable[[], None] = lambda: None
        self.bench = bench

    def on_accepted(self, pid: int, _: float) -> None:
        self.pid = pid
        self.on_start()
        self.log.append("accepted")
        if self._terminate_on_ack is not None:
            self._announce_terminated()

    def terminate(self, ticket: Any) -> None:
        """Celery's ``revoke(terminate=True)``."""
        if self.pid is not None:
            self._announce_terminated()
        else:
            self._terminate_on_ack = (self.bench.pool, None)
        ticket.terminate()

    def _announce_terminated(self) -> None:
        self.bench.pool.terminate_job(self.pid or 0)
        self.log.append("terminated")
        self.acknowledge()
        self._already_revoked = True

    def on_success(self, returned: Any) -> None:
        self.returned = returned
        self.log.append("success")
        self.bench.answered.append(self.id)
        self.on_callback()
        self.acknowledge()

    def on_failure(self, returned: Any) -> None:
        self.returned = returned
        self.log.append("failure")
        self.on_callback()

    def revoked(self) -> bool:
        return self.is_revoked()

    def acknowledge(self) -> None:
        if not self.acknowledged:
            self.acknowledged = True
            self.log.append("acknowledged")

    def reject(self, requeue: bool) -> None:
        assert requeue
        self.acknowledged = True
        self.log.append("given back")
        self.bench.given_back.append(self.id)


class PoolBench:
    """A started pool without a broker; ``turn_until`` is its hub."""

    def __init__(self, tracer: Literal["cortex", "stock"] = "stock") -> None:
        settings = Settings(broker_url="redis://127.0.0.1:1/0", transport="stock", tracer=tracer, huge_pages=False)
        self.app: Celery = build(settings, fleet_of(m={"load": "pinned", "batching": {"max_items": 2}}))
        self.app.amqp.queues.select(["m"])
        self.answered: list[Any] = []
        self.given_back: list[Any] = []
        self.traced: list[tuple[Any, ...]] = []
        self.trace_failure: Exception | None = None
        self.pool = BatchingPool(limit=8, app=self.app)
        self.pool.on_start()
        self.readers: dict[int, Callable[[], None]] = {}
        self.timers: list[Callable[[], None]] = []
        self.pool.register_with_event_loop(
            SimpleNamespace(
                add_reader=self.readers.__setitem__, call_repeatedly=lambda every, call: self.timers.append(call)
            )
        )
        self.app.cortex.health.state = "ready"

    @property
    def adapter(self) -> StubAdapter:
        adapter = self.app.cortex.registry.model("m").loaded
        assert isinstance(adapter, StubAdapter)
        return adapter

    def trace(self, name: str, job_id: Any, headers: Any, payload: Any, *_: Any) -> tuple[int, Any, float]:
        """Celery's tracer, in short: run the task's ``__call__``."""
        self.traced.append((name, job_id))
        if self.trace_failure is not None:
            raise self.trace_failure
        args, kwargs, _embed = payload or ([], {}, {})
        try:
            return 0, self.app.tasks[name](*args, **kwargs), 0.0
        except CortexError as error:
            return 1, error, 0.0

    def apply(self, request: PoolRequest, headers: dict[str, Any] | None = None) -> Any:
        return self.pool.on_apply(
            self.trace,
            (request.name, request.id, headers or {}, b"", "application/json", "utf-8"),
            accept_callback=request.on_accepted,
            callback=request.on_success,
            error_callback=request.on_failure,
            timeout=1.0,
            soft_timeout=None,
            correlation_id=request.id,
        )

    def send(self, job_id: Any, *inputs: Any, **given: Any) -> PoolRequest:
        request = PoolRequest(self, job_id, *inputs, **given)
        self.apply(request)
        return request

    def turn_until(self, true: Callable[[], object]) -> None:
        until_s = time.monotonic() + PATIENCE_S
        while not true():
            assert time.monotonic() < until_s, "not in time"
            for fd in select.select(list(self.readers), [], [], 0.05)[0]:
                self.readers[fd]()

    def runner_idle(self) -> None:
        """Wait until the runner is through with a job, of which the hub has yet to hear."""
        until_s = time.monotonic() + PATIENCE_S
        while not any(what in ("answered", "finished") for what, _ in list(self.pool._inbox)):
            assert time.monotonic() < until_s, "not in time"
            time.sleep(0.001)

    def hold(self, job_id: str) -> PoolRequest:
        """A job whose forward pass waits until ``adapter.gate`` is set."""
        self.adapter.gate.clear()
        self.adapter.entered.clear()
        held = self.send(job_id, job_id)
        assert self.adapter.entered.wait(PATIENCE_S)
        return held
