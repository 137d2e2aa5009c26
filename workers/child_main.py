"""The child's side of ``workers.children``: ``python -m workers.child_main <socket fd> <scratch directory>``.

It loads one adapter, answers requests one after another, and is gone when the worker is, however that ended.
"""

from __future__ import annotations

import logging
import os
import select
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Collection, Sequence
from typing import Any

from cortex_tasks.catalog import task_spec
from cortex_tasks.errors import CortexError, InferenceFailed, ModelUnavailable
from cortex_tasks.payloads import Params
from workers.adapters import Adapter, LoadContext, adapter_class
from workers.child_protocol import (
    Channel,
    context_from_wire,
    encode,
    inputs_from_wire,
    inputs_to_wire,
    outcome_to_wire,
)

__all__ = ["answer", "load", "main", "serve"]


def load(name: str, context: LoadContext) -> Adapter:
    """Load the adapter and warm it with its own example of each task. Raises ConfigError, ModelUnavailable."""
    try:
        adapter = adapter_class(name).load(context)
    except CortexError:
        raise
    except Exception as error:
        raise ModelUnavailable(
            f"model {context.alias!r} could not be loaded: {type(error).__name__}: {str(error)[:300]}"
        ) from error
    for task in context.tasks:
        for outcome in answer(adapter, task, *adapter.example(task)):
            if isinstance(outcome, CortexError):
                raise ModelUnavailable(f"model {context.alias!r} failed on its own example of {task!r}: {outcome}")
    return adapter


def answer(adapter: Adapter, task: str, inputs: Sequence[Any], params: Params) -> list[Any]:
    """A wire value or a CortexError an input, in order. What the batch cannot do together is done one by one."""
    try:
        return _together(adapter, task, inputs, params)
    except Exception as error:
        if len(inputs) == 1:
            return [_as_item_error(error)]
    return [answer(adapter, task, [value], params)[0] for value in inputs]


def _together(adapter: Adapter, task: str, inputs: Sequence[Any], params: Params) -> list[Any]:
    outcomes: list[Any] = list(adapter.prepare(task, inputs, params))
    if len(outcomes) != len(inputs):
        raise InferenceFailed(f"the adapter prepared {len(outcomes)} items for {len(inputs)} inputs")
    items = _good(outcomes)
    if items:
        _settle(outcomes, items, adapter.forward(task, list(items.values()), params))
    raw = _good(outcomes)
    if raw:
        _settle(outcomes, raw, adapter.finish(task, [items[i] for i in raw], list(raw.values()), params))
    return outcomes


def _good(outcomes: Sequence[Any]) -> dict[int, Any]:
    return {index: entry for index, entry in enumerate(outcomes) if not isinstance(entry, CortexError)}


def _settle(outcomes: list[Any], places: Collection[int], results: Sequence[Any]) -> None:
    if len(results) != len(places):
        raise InferenceFailed(f"the model returned {len(results)} answers for {len(places)} inputs")
    for place, result in zip(places, results, strict=True):
        outcomes[place] = result


def _as_item_error(error: Exception) -> CortexError:
    if isinstance(error, CortexError):
        return error
    return InferenceFailed(f"the model failed on this input: {type(error).__name__}: {str(error)[:300]}")


def serve(channel: Channel) -> None:
    """Load what the worker names, then answer it until it has no more to say."""
    try:
        first = channel.receive()
        try:
            adapter = load(first["adapter"], context_from_wire(first["context"]))
        except CortexError as error:
            channel.send({"error": error.to_wire()})
            return
        try:
            channel.send({"ready": _facts(adapter, first["context"]["tasks"])})
            adapter.memo = _WorkersMemo(channel)
            while True:
                channel.send({"outcomes": _reply(adapter, channel.receive())})
        finally:
            adapter.close()
    except EOFError:
        return  # the worker is done with this child


class _WorkersMemo:
    """What the worker keeps for its children: they have no connection of their own."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def recall(self, key: str) -> bytes | None:
        self._channel.send({"recall": key})
        value: bytes | None = self._channel.receive()["recalled"]
        return value

    def keep(self, key: str, value: bytes) -> None:
        self._channel.send({"keep": key, "value": value})


def _facts(adapter: Adapter, tasks: Sequence[str]) -> dict[str, Any]:
    examples = {task: adapter.example(task) for task in tasks}
    return {
        "version": adapter.version,
        "library": adapter.library,
        "note": adapter.note,
        "engine": [adapter.engine, adapter.precision, adapter.figures],
        "examples": {
            task: [inputs_to_wire(inputs), params.model_dump(mode="json")]
            for task, (inputs, params) in examples.items()
        },
    }


def _reply(adapter: Adapter, request: dict[str, Any]) -> list[dict[str, Any]]:
    task = request["task"]
    params = task_spec(task).params.model_validate(request["params"])
    outcomes = answer(adapter, task, inputs_from_wire(task, request["inputs"]), params)
    return [_sendable(outcome) for outcome in outcomes]


def _sendable(outcome: Any) -> dict[str, Any]:
    """The outcome's wire form; what cannot travel fails its own item only."""
    wire = outcome_to_wire(outcome)
    try:
        encode(wire)
    except (TypeError, ValueError) as error:
        return outcome_to_wire(InferenceFailed(f"the model's answer to this input cannot be sent: {error}"))
    return wire


def _leave_with_worker(fd: int, scratch: str) -> None:
    """Wait until the worker's end of the socket is gone, then end this process group at once.

    Only a hang-up counts: data and the worker's half-close are the main thread's business. The group holds
    what the model's library may have started (Prophet's optimiser is a process of its own).
    """
    poller = select.poll()
    poller.register(fd, 0)
    poller.poll()
    shutil.rmtree(scratch, ignore_errors=True)
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def main() -> None:
    fd, scratch = int(sys.argv[1]), sys.argv[2]
    # Ctrl-C is for the worker, which lets its children finish.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.set_inheritable(fd, False)
    logging.basicConfig(level=logging.WARNING, format="[%(asctime)s: %(levelname)s/child %(process)d] %(message)s")
    threading.Thread(target=_leave_with_worker, args=(fd, scratch), daemon=True).start()
    try:
        serve(Channel(socket.socket(fileno=fd)))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
