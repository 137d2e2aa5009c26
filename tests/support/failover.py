"""A Redis whose address leads to another server from one moment to the next, as managed services do it."""

from __future__ import annotations

from pathlib import Path
from typing import Self

import redis

from tests.support.redis_server import RedisServer, free_port


class Failover:
    """Two servers behind one address, of which new connections reach the first, and after ``happen`` the other."""

    def __init__(self, directory: Path) -> None:
        self._files = [directory / name for name in ("old", "new")]
        self._servers = [RedisServer("--unixsocket", str(file), directory=directory) for file in self._files]
        self._address = directory / "address"
        self._address.symlink_to(self._files[0])
        self.url = f"unix://{self._address}"

    def happen(self) -> None:
        self._address.unlink()
        self._address.symlink_to(self._files[1])
        with redis.Redis.from_url(self._servers[0].url) as old:
            old.replicaof("127.0.0.1", free_port())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.stop()
