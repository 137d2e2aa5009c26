"""Payload <-> wire: the answer of a job, its two encodings, and the names of things in Redis.

An answer is stored as part of Celery's result meta (``{"status": ..., "result": <answer>, ...}``). Two
encodings carry it, told apart by their first bytes, so that one decoder reads both:

* JSON text, kombu's dialect (bytes as ``{"__type__": "base64", ...}``): what any Celery client understands;
* packed: ``CXP1``, a uint32 (little-endian) length, that many bytes of JSON in which each ``bytes`` value is
  ``{"$": [offset, length]}``, then the bytes themselves. Used for clients that ask for it in the job's headers.

Neither is pickle, and decoding either runs no code.

A packed answer is stored behind the mark by which Celery knows a compressed one, and which names what undoes it: a
Celery program looks that name up in kombu's registry and gets JSON, whatever its own settings. kombu finds this module
by the package's entry point ``kombu.serializers`` while it is imported itself, in every Celery program beside Cortex:
so this module imports little, and of kombu nothing that looks for entry points.
"""

from __future__ import annotations

import json
import struct
from bisect import bisect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from kombu import compression
from kombu.utils import json as kombu_json

if TYPE_CHECKING:
    from cortex_tasks.payloads import Lane

__all__ = [
    "CONTENT_TYPE",
    "HEADER",
    "PRIORITY_STEPS",
    "REPLY_MAGIC",
    "Answer",
    "Heard",
    "dumps",
    "lane_of",
    "loads",
    "pack",
    "priority_of",
    "queue_key",
    "queue_keys",
    "read_reply",
    "register_serializer",
    "reply_channel",
    "result_key",
    "serializer",
    "unpack",
]

CONTENT_TYPE: Final = "application/x-cortex"
SERIALIZER: Final = "cortex"
#: The message header that holds Cortex's own delivery options, a dict:
#: ``packed`` (bool: the submitter reads packed answers), ``sent_at`` (epoch seconds, float),
#: ``cache`` ("use" | "refresh" | "off"). All are optional.
HEADER: Final = "cortex"

#: kombu's default steps: a foreign client may use any of them, so workers serve all.
PRIORITY_STEPS: Final = (0, 3, 6, 9)
_SEP: Final = "\x06\x16"
_LANE_PRIORITY: Final[dict[Lane, int]] = {"interactive": 0, "bulk": 9}
_REPLY_PREFIX: Final = "cortex:reply:"
_RESULT_PREFIX: Final = "celery-task-meta-"

_MAGIC: Final = b"CXP1"
#: ``COMPRESSED_PAYLOAD_MAGIC`` of celery 5.7, and the name of what undoes the packing.
_MARK: Final = b"\0celery-compressed\0" + CONTENT_TYPE.encode() + b"\0"
#: Begins a message on a reply channel that carries results.
REPLY_MAGIC: Final = b"CXR1"
#: A finished job's id, and its result meta where the announcement carried it.
Heard = tuple[str, bytes | None]
_LENGTH: Final = struct.Struct("<I")
_LENGTHS: Final = struct.Struct("<II")


# ------------------------------------------------------------------------------------------- names in Redis


def priority_of(lane: Lane) -> int:
    """The AMQP-style priority of a lane; Redis lists of lower numbers are served first."""
    return _LANE_PRIORITY[lane]


def lane_of(priority: float | None) -> Lane:
    """The lane of a message's priority (None counts as 0)."""
    return "bulk" if (priority or 0) >= 6 else "interactive"


def queue_key(queue: str, priority: int = 0) -> str:
    """The Redis list of a queue at a priority, as kombu names it."""
    step = PRIORITY_STEPS[bisect(PRIORITY_STEPS, priority) - 1]
    return f"{queue}{_SEP}{step}" if step else queue


def queue_keys(queue: str) -> tuple[str, ...]:
    """All the Redis lists of a queue, first served first."""
    return tuple(queue_key(queue, step) for step in PRIORITY_STEPS)


def result_key(job_id: str) -> str:
    """The key of a job's result meta; also the channel on which stock Celery announces it."""
    return f"{_RESULT_PREFIX}{job_id}"


def reply_channel(client_id: str) -> str:
    """The channel of one client, its jobs' ``reply_to``; ``read_reply`` reads its messages."""
    return f"{_REPLY_PREFIX}{client_id}"


def is_reply_channel(reply_to: Any) -> bool:
    """Whether a message's ``reply_to`` names a Cortex client's channel (stock Celery puts a bare id there, and
    anyone may put anything there)."""
    return isinstance(reply_to, str) and reply_to.startswith(_REPLY_PREFIX) and reply_to.isascii()


def read_reply(message: bytes) -> list[Heard]:
    """The finished jobs that a message on a reply channel names, each with its result meta if that is carried.

    A message is the jobs' ids, space-separated; or ``CXR1``, then for each job the lengths of its id and of its meta
    (little-endian uint32; 0: not carried), the id and the meta. What is torn or forged is left out.
    """
    if not message.startswith(REPLY_MAGIC):
        return [(job_id, None) for job_id in message.decode(errors="replace").split()]
    found: list[Heard] = []
    at = len(REPLY_MAGIC)
    while at + _LENGTHS.size <= len(message):
        id_bytes, meta_bytes = _LENGTHS.unpack_from(message, at)
        middle = at + _LENGTHS.size + id_bytes
        end = middle + meta_bytes
        if end > len(message):
            break
        job_id = message[at + _LENGTHS.size : middle].decode(errors="replace")
        found.append((job_id, message[middle:end] or None))
        at = end
    return found


# ------------------------------------------------------------------------------------------------- answers


@dataclass(frozen=True, slots=True)
class Answer:
    """What a job's task returns. ``items`` holds, for each input in order, ``{"value": {...}}`` or
    ``{"error": {"code", "message", "details"?}}``."""

    task: str
    model: str
    revision: str
    #: The fields of ``payloads.Timings``.
    timings: Mapping[str, Any]
    items: list[dict[str, Any]]
    #: The submitter reads the packed encoding.
    packed: bool = False

    def __json__(self) -> dict[str, Any]:
        return {
            "cortex": 1,
            "task": self.task,
            "model": self.model,
            "revision": self.revision,
            "timings": self.timings,
            "items": self.items,
        }

    def __repr__(self) -> str:
        """Short: Flower and the worker's log show it."""
        failed = sum("error" in item for item in self.items)
        bad = f", {failed} failed" if failed else ""
        return (
            f"<{self.task} {self.model}@{self.revision[:8]}: {len(self.items)} items{bad}, "
            f"forward {self.timings.get('forward_ms', 0.0):.1f} ms>"
        )


def dumps(meta: Any) -> bytes | str:
    """Encode a result meta: packed when its answer asks for it, else kombu's JSON."""
    result = meta.get("result") if isinstance(meta, dict) else None
    if not (isinstance(result, Answer) and result.packed):
        text: str = kombu_json.dumps(meta)
        return text
    return pack(meta, _MARK)


class _Packer:
    """Packs one value at a time. Kept from one to the next: to set an encoder up takes as long as a short answer."""

    __slots__ = ("_blobs", "_encode", "_offset")

    def __init__(self) -> None:
        self._encode = json.JSONEncoder(separators=(",", ":"), default=self._placed).encode

    def pack(self, value: Any, mark: bytes) -> bytes:
        self._blobs: list[bytes] = []
        self._offset = 0
        head = self._encode(value).encode()
        blobs, self._blobs = self._blobs, []
        return b"".join((mark, _MAGIC, _LENGTH.pack(len(head)), head, *blobs))

    def _placed(self, part: Any) -> Any:
        if isinstance(part, bytes):
            place = {"$": [self._offset, len(part)]}
            self._blobs.append(part)
            self._offset += len(part)
            return place
        if isinstance(part, Answer):
            return part.__json__()
        return kombu_json.JSONEncoder().default(part)


class _Unpacker:
    """Unpacks one value at a time, and is kept as a packer is."""

    __slots__ = ("_body", "_decode", "_raw")

    def __init__(self) -> None:
        self._decode = json.JSONDecoder(object_hook=self._fetched).raw_decode

    def unpack(self, raw: bytes) -> Any:
        start = len(_MAGIC) + _LENGTH.size
        if len(raw) < start:
            raise ValueError("a packed answer ends within its header")
        body = start + _LENGTH.unpack_from(raw, len(_MAGIC))[0]
        if len(raw) < body:
            raise ValueError("a packed answer ends within its JSON part")
        self._raw, self._body = raw, body
        head = raw[start:body].decode()
        value, end = self._decode(head)
        if end != len(head):
            raise ValueError("a packed answer's JSON part is followed by something else")
        self._raw = b""
        return value

    def _fetched(self, value: dict[str, Any]) -> Any:
        if "$" in value and len(value) == 1:
            at, length = value["$"]
            first = self._body + at
            if not self._body <= first <= first + length <= len(self._raw):
                raise ValueError("a packed answer's bytes are missing")
            return self._raw[first : first + length]
        # kombu's own types are rare here, and its hook takes longer than all else.
        return kombu_json.object_hook(value) if "__type__" in value else value


#: Each is used by one thread at a time, and those that failed are not kept.
_packers: list[_Packer] = []
_unpackers: list[_Unpacker] = []


def pack(value: Any, mark: bytes = b"") -> bytes:
    """JSON types and bytes, packed, behind ``mark``. Raises TypeError for anything else."""
    try:
        packer = _packers.pop()
    except IndexError:
        packer = _Packer()
    packed = packer.pack(value, mark)
    _packers.append(packer)
    return packed


def loads(data: bytes | str | memoryview) -> Any:
    """Decode either encoding. Raises ValueError on anything else."""
    raw = data.encode() if isinstance(data, str) else bytes(data).removeprefix(_MARK)
    try:
        return _unpacked(raw) if raw.startswith(_MAGIC) else kombu_json.loads(raw)
    except (TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"not an answer: {type(error).__name__}: {error}") from error


def unpack(data: bytes) -> Any:
    """What ``pack`` packed. Raises ValueError on anything else."""
    if not data.startswith(_MAGIC):
        raise ValueError("not packed")
    return loads(data)


def _unpacked(raw: bytes) -> Any:
    try:
        unpacker = _unpackers.pop()
    except IndexError:
        unpacker = _Unpacker()
    value = unpacker.unpack(raw)
    _unpackers.append(unpacker)
    return value


# ------------------------------------------------------------------------------------ for kombu's registries


def _to_json(packed: bytes) -> bytes:
    text: str = kombu_json.dumps(unpack(packed))
    return text.encode()


def _from_json(text: bytes) -> bytes:
    return pack(kombu_json.loads(text))


#: Encode, decode, content type, content encoding: what the entry point names.
serializer: Final = (dumps, loads, CONTENT_TYPE, "binary")

compression.register(_from_json, _to_json, CONTENT_TYPE)


def register_serializer() -> None:
    """Make kombu know the ``cortex`` serializer also where the package runs without being installed. Idempotent."""
    from kombu.serialization import register

    register(SERIALIZER, *serializer)
