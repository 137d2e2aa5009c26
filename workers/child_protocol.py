"""What a worker and its child processes say to each other: JSON with bytes, in frames on a stream socket.

A frame: a uint64 (the length of the rest) and a uint32 (the length of the JSON part), both little-endian; the
JSON, in which each ``bytes`` value is ``{"\\0bytes": [offset, length]}``; then the bytes themselves. Decoding
runs no code.

The worker speaks first and tells the child what to load; the child answers ``{"ready": facts}`` or
``{"error": wire error}``. Each further request ``{"task", "params", "inputs"}`` is answered with
``{"outcomes": [...]}``, one ``{"value": ...}`` or ``{"error": wire error}`` an input. Before it answers, a child may
say ``{"recall": key}``, which the worker answers with ``{"recalled": bytes or null}``, and ``{"keep": key, "value":
bytes}``, which it does not answer. When the worker shuts its
side down the child finishes what it does and leaves.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from cortex_tasks.catalog import InputKind, task_spec
from cortex_tasks.errors import CortexError, error_from_wire
from cortex_tasks.payloads import Series
from workers.adapters.base import LoadContext

__all__ = [
    "Channel",
    "context_from_wire",
    "context_to_wire",
    "decode",
    "encode",
    "inputs_from_wire",
    "inputs_to_wire",
    "outcome_from_wire",
    "outcome_to_wire",
]

_HEAD: Final = struct.Struct("<QI")
_BYTES: Final = "\0bytes"


# -------------------------------------------------------------------------------------------------- frames


def encode(message: Any) -> bytes:
    """A frame. Raises TypeError or ValueError for what JSON and bytes cannot say."""
    blobs: list[bytes] = []
    offset = 0

    def place(value: Any) -> Any:
        nonlocal offset
        if not isinstance(value, bytes):
            raise TypeError(f"{type(value).__name__} is neither JSON nor bytes")
        blobs.append(value)
        offset += len(value)
        return {_BYTES: [offset - len(value), len(value)]}

    text = json.dumps(message, default=place, separators=(",", ":")).encode()
    return b"".join((_HEAD.pack(_HEAD.size - 8 + len(text) + offset, len(text)), text, *blobs))


def decode(body: memoryview, json_bytes: int) -> Any:
    """The message of a frame's rest: ``json_bytes`` of JSON, then the bytes values."""
    blobs = body[json_bytes:]

    def fetch(value: dict[str, Any]) -> Any:
        if value.keys() != {_BYTES}:
            return value
        offset, length = value[_BYTES]
        return bytes(blobs[offset : offset + length])

    return json.loads(bytes(body[:json_bytes]), object_hook=fetch)


class Channel:
    """One end of the conversation. EOFError: the other end is gone. TimeoutError: it was silent for too long."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: Any, timeout_s: float | None = None) -> None:
        frame = encode(message)
        self._socket.settimeout(timeout_s)
        try:
            self._socket.sendall(frame)
        except TimeoutError:
            raise
        except OSError as error:
            raise EOFError(str(error)) from error

    def receive(self, timeout_s: float | None = None) -> Any:
        self._socket.settimeout(timeout_s)
        length, json_bytes = _HEAD.unpack(self._exactly(_HEAD.size))
        return decode(self._exactly(length - (_HEAD.size - 8)), json_bytes)

    def _exactly(self, size: int) -> memoryview:
        buffer = memoryview(bytearray(size))
        filled = 0
        while filled < size:
            try:
                count = self._socket.recv_into(buffer[filled:])
            except TimeoutError:
                raise
            except OSError as error:
                raise EOFError(str(error)) from error
            if count == 0:
                raise EOFError("the other end closed the channel")
            filled += count
        return buffer

    def finish(self) -> None:
        """Say that nothing more will be sent; the other end may still answer."""
        try:
            self._socket.shutdown(socket.SHUT_WR)
        except OSError:
            return  # it is gone already

    def close(self) -> None:
        self._socket.close()


# ------------------------------------------------------------------------------------------- what they say


def context_to_wire(context: LoadContext) -> dict[str, Any]:
    return {
        "alias": context.alias,
        "snapshot": None if context.snapshot is None else str(context.snapshot),
        "digest": context.digest,
        "tasks": list(context.tasks),
        "options": dict(context.options),
        "threads": context.threads,
        "device": context.device,
        "precision": context.precision,
        "backend": context.backend,
        "cache_dir": None if context.cache_dir is None else str(context.cache_dir),
        "cache_bytes": context.cache_bytes,
        "cache_ttl_s": context.cache_ttl_s,
        "gate_cosine": context.gate_cosine,
        "gate_top10": context.gate_top10,
    }


def context_from_wire(wire: dict[str, Any]) -> LoadContext:
    paths = {name: None if wire[name] is None else Path(wire[name]) for name in ("snapshot", "cache_dir")}
    return LoadContext(**{**wire, **paths, "tasks": tuple(wire["tasks"])})


def inputs_to_wire(inputs: Iterable[Any]) -> list[Any]:
    return [{"ds": value.ds, "y": value.y} if isinstance(value, Series) else value for value in inputs]


def inputs_from_wire(task: str, wire: Sequence[Any]) -> list[Any]:
    """The inputs again; they were validated before they were sent."""
    if task_spec(task).input is not InputKind.SERIES:
        return list(wire)
    return [Series.model_construct(ds=tuple(value["ds"]), y=tuple(value["y"])) for value in wire]


def outcome_to_wire(outcome: Any) -> dict[str, Any]:
    return {"error": outcome.to_wire()} if isinstance(outcome, CortexError) else {"value": outcome}


def outcome_from_wire(wire: dict[str, Any]) -> Any:
    """A wire value or a CortexError."""
    return error_from_wire(wire["error"]) if "error" in wire else wire["value"]
