"""The fleet in Prometheus' text format: queues and workers, from Redis; and a small server of it.

The same figures as ``cortex status``. ``sum by (queue) (cortex_queue_jobs)`` is the signal to scale by; an autoscaler
that asks for one figure in JSON (KEDA's trigger ``metrics-api``) gets it as ``total`` of ``/queues/<name>``.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Final

from cortex_tasks.depths import QueueDepth
from cortex_tasks.errors import CortexError
from cortex_tasks.presence import WorkerCard

__all__ = ["MetricsServer", "exposition"]

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
#: A name, its kind, what it means, and its samples: labels and a value.
_Family = tuple[str, str, str, list[tuple[dict[str, str], float]]]


def exposition(cards: Sequence[WorkerCard], depths: Sequence[QueueDepth], now_s: float) -> Iterator[str]:
    """Line by line. ``now_s``: epoch seconds."""
    for name, kind, meaning, samples in (*_queues(depths), *_workers(cards, now_s), *_models(cards)):
        yield f"# HELP {name} {meaning}"
        yield f"# TYPE {name} {kind}"
        for labels, value in samples:
            inner = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
            yield f"{name}{{{inner}}} {value:.15g}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _queues(depths: Sequence[QueueDepth]) -> Iterable[_Family]:
    states = ("interactive", "bulk", "unacked")
    yield "cortex_queue_jobs", "gauge", "Jobs that wait (by lane) or are in a worker's hands (unacked).", [
        ({"queue": depth.queue, "state": state}, getattr(depth, state)) for depth in depths for state in states
    ]  # fmt: skip
    yield "cortex_queue_orphaned_jobs", "gauge", "Unacked jobs whose worker no longer renews its claim.", [
        ({"queue": depth.queue}, depth.orphaned) for depth in depths
    ]  # fmt: skip
    yield "cortex_queue_dead_letters", "gauge", "Parked jobs.", [
        ({"queue": depth.queue}, depth.dead) for depth in depths
    ]  # fmt: skip


def _workers(cards: Sequence[WorkerCard], now_s: float) -> Iterable[_Family]:
    states = Counter((card.image, "silent" if card.is_silent(now_s) else card.state) for card in cards)
    yield "cortex_workers", "gauge", "Workers, by image and state.", [
        ({"image": image, "state": state}, number) for (image, state), number in sorted(states.items())
    ]  # fmt: skip
    for field, meaning in (("jobs", "Jobs answered."), ("errors", "Inputs and jobs that failed.")):
        yield f"cortex_worker_{field}_total", "counter", meaning, [
            ({"node": card.node, "image": card.image}, getattr(card, field)) for card in cards
        ]  # fmt: skip
    yield "cortex_worker_model_memory_bytes", "gauge", "Models loaded in the worker's own process.", [
        ({"node": card.node, "image": card.image}, card.store.memory_bytes) for card in cards
    ]  # fmt: skip


def _models(cards: Sequence[WorkerCard]) -> Iterable[_Family]:
    held = [({"node": card.node, "model": model.alias}, model) for card in cards for model in card.models]
    for field, meaning in (("items", "Inputs computed."), ("batches", "Forward passes."), ("loads", "Loads.")):
        yield f"cortex_model_{field}_total", "counter", meaning, [
            (labels, getattr(model, field)) for labels, model in held
        ]  # fmt: skip
    yield "cortex_model_ready", "gauge", "1 where the model is loaded and warm.", [
        (labels, float(model.state == "ready")) for labels, model in held
    ]  # fmt: skip
    yield "cortex_model_load_seconds", "gauge", "The last load.", [
        (labels, model.load_ms / 1e3) for labels, model in held
    ]  # fmt: skip


class MetricsServer(ThreadingHTTPServer):
    """Answers ``GET /metrics`` with the lines of ``read`` and ``GET /queues/<name>`` with one of ``read_queues``; 503
    and the reason where they raise CortexError."""

    daemon_threads = True

    def __init__(
        self,
        address: tuple[str, int],
        read: Callable[[], Iterable[str]],
        read_queues: Callable[[], Sequence[QueueDepth]],
    ) -> None:
        """Raises OSError where the address cannot be had."""
        self.read, self.read_queues = read, read_queues
        super().__init__(address, _Handler)


class _Handler(BaseHTTPRequestHandler):
    server: MetricsServer
    #: A scraper that connects and says nothing; seconds.
    timeout = 10.0

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        try:
            if path == "/metrics":
                self._answer(200, "".join(f"{line}\n" for line in self.server.read()))
            elif path.startswith("/queues/"):
                self._answer_queue(path.removeprefix("/queues/"))
            elif path == "/healthcheck":
                self._answer(200, "OK\n")
            else:
                self._answer(404, "not here: /metrics, /queues/<name>\n")
        except CortexError as error:
            self._answer(503, f"{error}\n")

    def _answer_queue(self, name: str) -> None:
        for depth in self.server.read_queues():
            if depth.queue == name:
                figures = {**asdict(depth), "ready": depth.ready, "total": depth.total}
                self._answer(200, json.dumps(figures) + "\n", "application/json")
                return
        self._answer(404, "no such queue\n")

    def _answer(self, status: int, text: str, content_type: str = CONTENT_TYPE) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """A line for every scrape tells nobody anything."""
