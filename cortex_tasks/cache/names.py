"""What the cache is called in Redis, and which revision of a model answers now.

=================================  ==========================================================================
``cortex:cache:e:<alias>:<key>``   an answer (``frame``), with the model's ``cache_ttl_s``
``cortex:cache:f:<alias>:<key>``   who computes it now: ``<owner> <lane>``; see ``workers.flights``
``cortex:cache:o:<owner>``         a worker that computes is alive
``cortex:cache:g:<alias>``         counts the purges of a model
``cortex:cache:index``             sorted set of the entries with their sizes, by when they end (epoch seconds)
``cortex:cache:bytes``             how many bytes the index says there are
``cortex:cache:stats:<alias>``     hash of counters
``cortex:cache:popular:<slot>``    models, and with an alias inputs, asked for in half an hour; see ``popular``
``cortex:cache:warm:<alias>:<s>``   which worker warms a model that was due at that epoch second
``cortex:model:<alias>``           JSON: the revision that answers, and when a worker last said so
=================================  ==========================================================================
"""

from __future__ import annotations

import json
from typing import Any, Final

__all__ = [
    "ACTIVATE",
    "BYTES",
    "ENTRY_OVERHEAD_BYTES",
    "INDEX",
    "RECORD_TTL_S",
    "SILENT_AFTER_S",
    "activate_arguments",
    "active_revision",
    "entry_prefix",
    "flight_prefix",
    "generation_key",
    "model_key",
    "owner_key",
    "stats_key",
    "warming_key",
]

INDEX: Final = "cortex:cache:index"
BYTES: Final = "cortex:cache:bytes"
#: What Redis and the index take for an entry beside its bytes.
ENTRY_OVERHEAD_BYTES: Final = 250

#: A revision is remembered for so long after the last worker of it has gone.
RECORD_TTL_S: Final = 86_400
#: A revision that no worker has confirmed for so long gives way to one that a living worker has.
SILENT_AFTER_S: Final = 15.0

#: Say that a revision answers. KEYS: the record. ARGV: revision, epoch seconds, 1 for a model that was just loaded
#: (it takes over at once; else only from a revision that nobody confirms any more), SILENT_AFTER_S, RECORD_TTL_S.
#: Returns the revision that answers.
ACTIVATE: Final = """
local known = redis.call('GET', KEYS[1])
if known and ARGV[3] == '0' then
  local ok, record = pcall(cjson.decode, known)
  if ok and record.revision ~= ARGV[1] and tonumber(ARGV[2]) - record.at < tonumber(ARGV[4]) then
    return record.revision
  end
end
redis.call('SET', KEYS[1], cjson.encode({revision = ARGV[1], at = tonumber(ARGV[2])}), 'EX', ARGV[5])
return ARGV[1]
"""


def activate_arguments(revision: str, now_s: float, *, loaded: bool) -> list[Any]:
    """ARGV of ACTIVATE. ``now_s``: epoch seconds."""
    return [revision, now_s, int(loaded), SILENT_AFTER_S, RECORD_TTL_S]


def active_revision(record: bytes | None) -> str | None:
    """The revision that a stored record names; None when there is none that can be read."""
    if record is None:
        return None
    try:
        revision = json.loads(record)["revision"]
    except (ValueError, KeyError, TypeError):
        return None
    return revision if isinstance(revision, str) and revision else None


def entry_prefix(alias: str) -> bytes:
    """What the keys of a model's answers begin with; the rest is ``keys.Address.key``."""
    return f"cortex:cache:e:{alias}:".encode()


def flight_prefix(alias: str) -> bytes:
    """What the keys of a model's flights begin with."""
    return f"cortex:cache:f:{alias}:".encode()


def owner_key(owner: str) -> str:
    return f"cortex:cache:o:{owner}"


def generation_key(alias: str) -> str:
    return f"cortex:cache:g:{alias}"


def model_key(alias: str) -> str:
    return f"cortex:model:{alias}"


def warming_key(alias: str, due_s: int) -> str:
    return f"cortex:cache:warm:{alias}:{due_s}"


def stats_key(alias: str) -> str:
    return f"cortex:cache:stats:{alias}"
