"""A small HTTP server of the fleet's figures.

    GET /metrics         all of them, in Prometheus' text format
    GET /queues/<name>   one queue, in JSON: {"queue", "ready", "unacked", "total", …}, for KEDA's metrics-api trigger
    GET /healthz         whether this server runs

Redis away: 503, and the server goes on. It tells nothing secret and takes nothing in.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

from cortex_tasks.errors import BrokerUnavailable
from cortex_tasks.metrics import Snapshot, render

__all__ = ["Exporter"]

logger = logging.getLogger(__name__)

#: An autoscaler asks for each queue by itself, and several may ask: Redis is read once.
_FRESH_S: Final = 1.0
_TEXT: Final = "text/plain; version=0.0.4; charset=utf-8"
#: A client that sends nothing for so long is let go.
_PATIENCE_S: Final = 10.0


class Exporter(ThreadingHTTPServer):
    """``serve_forever`` until ``shutdown``. ``read``: the fleet now; raises BrokerUnavailable."""

    daemon_threads = True

    def __init__(
        self, address: tuple[str, int], read: Callable[[], Snapshot], clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(address, _Handler)
        self._read, self._clock = read, clock
        self._lock = threading.Lock()
        self._last: tuple[float, Snapshot] | None = None

    def snapshot(self) -> Snapshot:
        """What Redis said at most a second ago. Raises BrokerUnavailable."""
        with self._lock:
            if self._last is None or self._clock() - self._last[0] > _FRESH_S:
                self._last = (self._clock(), self._read())
            return self._last[1]

    def answer(self, path: str) -> tuple[HTTPStatus, str, str]:
        """Status, content type and body for a path."""
        if path == "/healthz":
            return HTTPStatus.OK, _TEXT, "ok\n"
        try:
            if path == "/metrics":
                return HTTPStatus.OK, _TEXT, render(self.snapshot())
            if path.startswith("/queues/"):
                return self._queue(path.removeprefix("/queues/"))
        except BrokerUnavailable as error:
            logger.warning("%s", error)
            return HTTPStatus.SERVICE_UNAVAILABLE, _TEXT, f"{error}\n"
        return HTTPStatus.NOT_FOUND, _TEXT, "/metrics, /queues/<name>, /healthz\n"

    def _queue(self, name: str) -> tuple[HTTPStatus, str, str]:
        for depth in self.snapshot().depths:
            if depth.queue == name:
                found = {**asdict(depth), "ready": depth.ready, "total": depth.total}
                return HTTPStatus.OK, "application/json", json.dumps(found) + "\n"
        return HTTPStatus.NOT_FOUND, _TEXT, "no such queue\n"


class _Handler(BaseHTTPRequestHandler):
    server: Exporter
    timeout = _PATIENCE_S

    def do_GET(self) -> None:
        status, kind, body = self.server.answer(self.path.partition("?")[0])
        data = body.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        logger.debug(format, *args)
