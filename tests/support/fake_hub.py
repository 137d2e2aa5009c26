"""A Hugging Face hub of one repository on loopback: as much of its HTTP API as fetching a snapshot takes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

__all__ = ["COMMIT", "FakeHub", "fake_hub"]

COMMIT = "d" * 40


class FakeHub(ThreadingHTTPServer):
    """``files``: the repository's; ``fetched``: names of those that were downloaded.

    A download of one of ``stalls`` stops in the middle until ``go_on`` is set, for at most ``hold_s``.
    """

    daemon_threads = True

    def __init__(self, repository: str, files: Mapping[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repository = repository
        self.files = dict(files)
        self.fetched: list[str] = []
        self.stalls: set[str] = set()
        self.stalled = threading.Event()
        self.go_on = threading.Event()
        self.hold_s = 60.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        api, resolved = f"/api/models/{self.server.repository}", f"/{self.server.repository}/resolve/{COMMIT}/"
        if path.startswith(f"{api}/tree/"):
            self._json([_entry(name, data) for name, data in self.server.files.items()])
        elif path == api or path.startswith(f"{api}/revision/"):
            siblings = [{"rfilename": name, "size": len(data)} for name, data in self.server.files.items()]
            self._json({"id": self.server.repository, "sha": COMMIT, "siblings": siblings})
        elif path.startswith(resolved) and (name := path.removeprefix(resolved)) in self.server.files:
            self._file(name)
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def _json(self, value: object) -> None:
        self._send(json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _file(self, name: str) -> None:
        data = self.server.files[name]
        if self.command == "GET":
            self.server.fetched.append(name)
        if self.command == "GET" and name in self.server.stalls:
            self._send_half(data)
            return
        self._send(data, _headers(data))

    def _send_half(self, data: bytes) -> None:
        self.send_response(200)
        for header, value in _headers(data).items():
            self.send_header(header, value)
        self.end_headers()
        self.wfile.write(data[: len(data) // 2])
        self.wfile.flush()
        self.server.stalled.set()
        self.server.go_on.wait(self.server.hold_s)
        with contextlib.suppress(OSError):  # who asked has been killed
            self.wfile.write(data[len(data) // 2 :])

    def _send(self, data: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(200)
        for header, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Silent: the tests read ``fetched``."""


def _headers(data: bytes) -> dict[str, str]:
    return {"Content-Length": str(len(data)), "ETag": f'"{_oid(data)}"', "X-Repo-Commit": COMMIT}


def _oid(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


def _entry(name: str, data: bytes) -> dict[str, object]:
    return {"type": "file", "path": name, "size": len(data), "oid": _oid(data)}


@contextmanager
def fake_hub(repository: str, files: Mapping[str, bytes]) -> Iterator[FakeHub]:
    with FakeHub(repository, files) as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.go_on.set()
            hub.shutdown()
            thread.join()
