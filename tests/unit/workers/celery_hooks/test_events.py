"""Task events leave once a turn of the hub, not every 24."""

from __future__ import annotations

from typing import Any

from celery import Celery

from workers.celery_hooks.events import TurnDispatcher


def test_events_wait_for_the_end_of_the_turn() -> None:
    sent: list[Any] = []
    app = Celery("t", set_as_current=False, broker="memory://")
    with app.connection() as connection:
        dispatcher = TurnDispatcher(connection, hostname="h", app=app, enabled=True, buffer_group={"task"})
        dispatcher._publish = lambda event, *_, **__: sent.append(event)  # type: ignore[method-assign]
        turn_over: list[bool] = []
        dispatcher.on_send_buffered = lambda: turn_over.append(True)
        for n in range(200):
            dispatcher.send("task-succeeded", uuid=str(n))
        assert sent == []
        assert turn_over, "the hub is asked to flush at the end of its turn"
        dispatcher.flush()
    (together,) = sent
    assert [event["uuid"] for event in together] == [str(n) for n in range(200)]


def test_a_message_of_events_stays_bounded() -> None:
    app = Celery("t", set_as_current=False, broker="memory://")
    dispatcher = TurnDispatcher(None, hostname="h", app=app, enabled=False, buffer_limit=24)
    assert dispatcher.buffer_limit == 1_000
