"""Nothing is logged while a lock is held: a handler may need it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from cortex_tasks import testing
from cortex_tasks.quiet import Quiet, warn
from cortex_tasks.testing.wires import MemoryWire
from tests.support.stub_models import PATIENCE_S

log = logging.getLogger("cortex_tasks.test_quiet")


@contextmanager
def handling(handle: Callable[[str], object]) -> Iterator[None]:
    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            handle(record.getMessage())

    handler = Handler()
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


def test_a_warning_waits_for_the_end_of_the_outermost_block() -> None:
    said: list[tuple[str, bool]] = []
    lock = threading.Lock()
    with handling(lambda message: said.append((message, lock.locked()))):
        with Quiet(), lock:
            warn(log, "first of %s", 2)
            with Quiet():
                warn(log, "second")
            assert said == []
            other = threading.Thread(target=warn, args=(log, "of another thread"))
            other.start()
            other.join(PATIENCE_S)
            assert said.pop() == ("of another thread", True)
        warn(log, "later")
    assert said == [("first of 2", False), ("second", False), ("later", False)]


def test_a_warning_is_not_lost_with_an_error() -> None:
    said: list[str] = []
    with handling(said.append), suppress(KeyError), Quiet():
        warn(log, "before")
        raise KeyError
    assert said == ["before"]


@pytest.mark.parametrize("at", ["listen", "push"])
def test_a_handler_may_ask_for_something_itself(monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    """What is warned of while a thread publishes for others, and while it subscribes, holding two locks."""
    real, said = getattr(MemoryWire, at), list[str]()

    def warning(*args: object, **options: object) -> object:
        if not said:
            warn(log, "a warning")
        return real(*args, **options)

    def ask(message: str) -> None:
        said.append(message)
        said.append(client.embed(message).model)

    with testing.fleet() as fleet, handling(ask):
        monkeypatch.setattr(MemoryWire, at, warning)
        client = fleet.client()
        asking = threading.Thread(target=client.embed, args=("text",), daemon=True)
        asking.start()
        asking.join(PATIENCE_S)
        assert not asking.is_alive()
    assert said == ["a warning", "minilm"]
