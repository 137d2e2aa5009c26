"""A user's own Celery tasks beside Cortex's, for callbacks, chains and chords."""

from __future__ import annotations

from typing import Any

from celery import shared_task


@shared_task(name="tests.count_items")
def count_items(answer: dict[str, Any]) -> int:
    """How many inputs a job's answer holds."""
    return len(answer["items"])


@shared_task(name="tests.total_items")
def total_items(answers: list[dict[str, Any]]) -> int:
    return sum(len(answer["items"]) for answer in answers)


@shared_task(name="tests.note", bind=True)
def note(self: Any, value: Any, key: str) -> None:
    """Leave a mark in Redis, so that a test sees that a callback ran."""
    self.app.backend.client.rpush(key, repr(value)[:80])


@shared_task(name="tests.note_error", bind=True)
def note_error(self: Any, failed_id: str, key: str) -> None:
    """An errback of the kind that is sent as a task, with the failed job's id."""
    self.app.backend.client.rpush(key, failed_id)


@shared_task(name="tests.same")
def same(value: Any) -> Any:
    """What it was given: the first link of a chain."""
    return value
