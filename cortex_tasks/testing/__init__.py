"""A fleet for tests: real clients, real messages and real answers, but no Redis, no workers and no models.

::

    import pytest
    from cortex_tasks import testing

    @pytest.fixture
    def fleet():
        with testing.fleet() as fleet:
            yield fleet

    def test_search(fleet):
        index = build_index(fleet.client(), ["one", "two"])     # your code, given a Cortex
        assert [job.inputs for job in fleet.jobs] == [["one", "two"]]

The answers are those of ``cortex_tasks.echo``: made up, but always the same for the same input. A handler of your
own gives others::

    def angry(task, model, inputs, params):
        return [{"labels": [{"label": "ANGRY", "score": 1.0}]} for text in inputs]

    with testing.fleet(angry) as fleet:
        assert fleet.client().classify("Hm.").label == "ANGRY"

What goes wrong in production can be tried out: ``hold`` and ``release`` (slow models), ``without_workers``,
``full_queues``, ``broker_down``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cortex_tasks.config import FleetConfig
from cortex_tasks.testing.local import Handler, LocalFleet, RecordedJob, echo_fleet

__all__ = ["Handler", "LocalFleet", "RecordedJob", "echo_fleet", "fleet"]


@contextmanager
def fleet(
    handler: Handler | None = None, fleet: FleetConfig | None = None, *, clock: Callable[[], float] = time.time
) -> Iterator[LocalFleet]:
    """A fleet for the length of a ``with`` block; its synchronous clients are closed at the end.

    ``fleet``: by default ``echo_fleet()``. ``clock``: epoch seconds, for deadlines.
    """
    local = LocalFleet(handler, fleet, clock=clock)
    try:
        yield local
    finally:
        local.close()
