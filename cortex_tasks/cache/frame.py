"""What lies under a key in Redis: one answer's value in a versioned frame with a checksum.

``CXE1``, the kind, flags, a CRC-32 (of key, kind, flags and payload), the payload. Kind 1 is an embedding: its float32
bytes as they are, for float vectors hardly compress (docs/cache.md has the measurement). Kind 2 is any other value:
packed JSON (``codec.pack``), deflated where that pays.

Whatever is not exactly that (torn bytes, another version, another key's entry) is nothing: a miss, never an error.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from typing import Any, Final

from cortex_tasks import codec

__all__ = ["HEADER_BYTES", "opened", "sealed"]

_MAGIC: Final = b"CXE1"
_HEADER: Final = struct.Struct("<4sBBI")
HEADER_BYTES: Final = _HEADER.size
_VECTOR, _VALUE = 1, 2
_TRUNCATED, _DEFLATED = 1, 2
#: Smaller values are not worth deflate's time.
_DEFLATE_FROM_BYTES: Final = 256
#: The fastest: a higher level saves 3 % of a document and costs twice the time.
_LEVEL: Final = 1
#: No entry inflates to more than this.
_INFLATED_MAX_BYTES: Final = 64 * 1024 * 1024


def sealed(key: bytes, value: Mapping[str, Any]) -> bytes:
    """The frame of one wire value. Raises TypeError for what is no JSON type and no bytes."""
    if value.keys() == {"data", "truncated"} and isinstance(value["data"], bytes):
        return _framed(key, _VECTOR, _TRUNCATED if value["truncated"] else 0, value["data"])
    payload = codec.pack(value)
    # Bytes within it are float arrays, which do not deflate.
    if len(payload) >= _DEFLATE_FROM_BYTES and not any(isinstance(part, bytes) for part in value.values()):
        return _framed(key, _VALUE, _DEFLATED, zlib.compress(payload, _LEVEL))
    return _framed(key, _VALUE, 0, payload)


def _framed(key: bytes, kind: int, flags: int, payload: bytes) -> bytes:
    return _HEADER.pack(_MAGIC, kind, flags, zlib.crc32(payload, zlib.crc32(key + bytes((kind, flags))))) + payload


def opened(key: bytes, frame: bytes) -> dict[str, Any] | None:
    """The wire value in a frame, or None where there is none that can be trusted."""
    if len(frame) < HEADER_BYTES:
        return None
    magic, kind, flags, checksum = _HEADER.unpack_from(frame)
    payload = frame[HEADER_BYTES:]
    # Kind and flags as they stand in the frame.
    if magic != _MAGIC or zlib.crc32(payload, zlib.crc32(key + frame[4:6])) != checksum:
        return None
    if kind == _VECTOR:
        return {"data": payload, "truncated": bool(flags & _TRUNCATED)}
    return _value(payload, flags) if kind == _VALUE else None


def _value(payload: bytes, flags: int) -> dict[str, Any] | None:
    try:
        if flags & _DEFLATED:
            inflate = zlib.decompressobj()
            payload = inflate.decompress(payload, _INFLATED_MAX_BYTES)
            if not inflate.eof:
                return None
        value = codec.unpack(payload)
    except (ValueError, zlib.error):
        return None
    return value if isinstance(value, dict) else None
