"""Exit codes that scripts can use."""

from __future__ import annotations

from typing import Final

from cortex_tasks import errors as e

__all__ = ["EPILOG", "FAILED", "INTERRUPTED", "exit_code"]

FAILED: Final = 1
INTERRUPTED: Final = 130

#: The first class that fits counts.
_CODES: Final[tuple[tuple[type[e.CortexError], int], ...]] = (
    (e.ConfigError, 2),
    (e.RequestError, 2),
    (e.BrokerUnavailable, 3),
    (e.ResultTimeout, 4),
    (e.DeadlineExceeded, 4),
    (e.QueueFull, 5),
)

EPILOG: Final = """\b
Exit codes:
  0    done
  1    an input or a job failed; a check found something wrong
  2    wrong usage, a wrong setting or queues.yaml, an unknown task or model
  3    Redis does not answer, or refuses
  4    no answer in time, or no worker consumes the queue
  5    the queue is full; try again later
  130  interrupted (Ctrl-C)
  141  the reader of the output has gone
"""


def exit_code(error: e.CortexError) -> int:
    """The exit code of an error that ended a command."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), FAILED)
