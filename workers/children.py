"""An adapter hosted in child processes: for models that hold the GIL (spaCy) or fit on every call (Prophet).

``ChildHost`` looks like any adapter. The children tokenise, compute and finish; the worker's own process only
estimates costs, cuts a batch into shares of about equal cost, hands them out and puts the answers back in order.

A child that dies or takes too long is replaced at once. The items it held are tried again one by one, so that
one item fails, not its neighbours: an item that ends two children while alone, or takes too long alone, gets
InferenceFailed.
"""

from __future__ import annotations

import logging
import math
import select
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Final, Self

from cortex_tasks.catalog import task_spec
from cortex_tasks.errors import ConfigError, CortexError, InferenceFailed, ModelUnavailable
from cortex_tasks.payloads import Params, Series
from workers.adapters.base import Adapter, Item, LoadContext
from workers.child_process import Child, end
from workers.child_protocol import inputs_from_wire, inputs_to_wire

__all__ = ["START_LIMIT_S", "ChildHost", "split"]

logger = logging.getLogger(__name__)

#: How long a child may take to import its library, load and warm its model.
START_LIMIT_S: Final = 180.0
#: A child is over its share only when it has grown by this factor since it was ready.
_GROWTH: Final = 1.5


def split(costs: Sequence[int], parts: int) -> list[range]:
    """Cut a batch into at most ``parts`` contiguous, non-empty ranges of about equal cost."""
    total, done = sum(costs), 0
    starts = [0] if costs else []
    for index, cost in enumerate(costs):
        # The middle of the item decides which part it belongs to.
        if index and len(starts) < parts and (done + cost / 2) * parts >= total * len(starts):
            starts.append(index)
        done += cost
    return [range(start, stop) for start, stop in pairwise([*starts, len(costs)])]


@dataclass(slots=True, eq=False)
class _Share:
    """Items that go to a child together. ``losses`` counts the children that ended over it while it was one item."""

    items: range
    losses: int = 0


@dataclass(slots=True)
class _Batch:
    """One ``forward``: what waits, who holds what, and what came out."""

    task: str
    params: dict[str, Any]
    inputs: list[Any]
    waiting: deque[_Share]
    held: dict[Child, _Share] = field(default_factory=dict)
    outcomes: list[Any] = field(init=False)

    def __post_init__(self) -> None:
        self.outcomes = [None] * len(self.inputs)

    def hand(self, child: Child, limit_s: float) -> None:
        share = self.held[child] = self.waiting.popleft()
        inputs = [self.inputs[index] for index in share.items]
        child.ask({"task": self.task, "params": self.params, "inputs": inputs}, limit_s)

    def settle(self, share: _Share, outcomes: Sequence[Any]) -> None:
        for index, outcome in zip(share.items, outcomes, strict=True):
            self.outcomes[index] = outcome

    def lost(self, share: _Share, error: CortexError, overdue: bool) -> None:
        """The child that held the share is gone: try its items alone, or tell the culprit."""
        if len(share.items) > 1:
            self.waiting.extendleft(_Share(range(index, index + 1)) for index in reversed(share.items))
        elif overdue:
            self.settle(share, [InferenceFailed(f"this input was given up: {error}")])
        elif share.losses:
            self.settle(share, [InferenceFailed(f"this input killed its process twice, alone in it: {error}")])
        else:
            share.losses += 1
            self.waiting.appendleft(share)

    def give_up(self, error: CortexError) -> None:
        """There is no child left to ask."""
        for share in self.waiting:
            self.settle(share, [error] * len(share.items))
        self.waiting.clear()


class ChildHost(Adapter):
    """``processes`` children, each with the adapter loaded. ``close`` may come from another thread."""

    def __init__(
        self,
        adapter_name: str,
        context: LoadContext,
        processes: int,
        *,
        time_limit_s: float,
        share_bytes: int | None = None,
        start_limit_s: float = START_LIMIT_S,
    ) -> None:
        """Start the children in parallel and wait until all are warm.

        ``time_limit_s``: for one share of a batch. ``share_bytes``: what each child may hold; one above it is
        replaced between batches. Raises what loading raised (ConfigError, ModelUnavailable).
        """
        self._adapter_name, self._context = adapter_name, replace(context, threads=1)
        self._processes, self._time_limit_s, self._start_limit_s = processes, time_limit_s, start_limit_s
        self._share_bytes = share_bytes
        self._children: list[Child] = []
        self._closed = False
        #: Guards the list of children; never held while waiting.
        self._lock = threading.Lock()
        self._one_forward = threading.Lock()
        try:
            self._fill_up()
            while any(child.facts is None for child in self._children):
                for child in self._answering():
                    child.take()
        except BaseException:
            self.close()
            raise
        self._introduce(self._children[0].facts or {})

    def _introduce(self, facts: dict[str, Any]) -> None:
        # Adapter.version belongs to a class; this object stands for the hosted one.
        vars(self)["version"] = facts["version"]
        self.note = facts["note"]
        self.engine, self.precision, self.figures = facts["engine"]
        self._library = facts["library"]
        self._examples = facts["examples"]
        heaviest = max(child.ready_bytes for child in self._children)
        if self._share_bytes is not None and heaviest > self._share_bytes:
            logger.warning(
                "a child of model %s holds %d MB when just loaded, more than its share of %d MB: raise "
                "memory_config.process_pool or lower its children; it is replaced when it has grown by half",
                self._context.alias, heaviest // 10**6, self._share_bytes // 10**6,
            )  # fmt: skip

    @classmethod
    def load(cls, context: LoadContext) -> Self:
        raise ConfigError(
            f"models.{context.alias}.adapter: children are not an adapter; name the adapter and set 'children'"
        )

    @property
    def pids(self) -> tuple[int, ...]:
        """The children's process ids."""
        return tuple(child.pid for child in self._snapshot())

    @property
    def size_bytes(self) -> int:
        return sum(child.memory_bytes for child in self._snapshot())

    @property
    def library(self) -> str:
        return str(self._library)

    def example(self, task: str) -> tuple[Sequence[Any], Params]:
        inputs, params = self._examples[task]
        return inputs_from_wire(task, inputs), task_spec(task).params.model_validate(params)

    def prepare(self, task: str, inputs: Sequence[Any], params: Params) -> list[Item | CortexError]:
        """Costs are estimated: four characters a token, a point a point; the children do the real work."""
        return [Item(value, _cost(value, params)) for value in inputs]

    def forward(self, task: str, items: Sequence[Item], params: Params) -> Sequence[Any]:
        """Finished wire values; what fails, fails as its own item's CortexError. Raises nothing."""
        ranges = split([item.cost_tokens for item in items], self._processes)
        batch = _Batch(
            task=task,
            params=params.model_dump(mode="json"),
            inputs=inputs_to_wire(item.data for item in items),
            waiting=deque(map(_Share, ranges)),
        )
        with self._one_forward:
            failure = self._try_fill_up()
            while batch.waiting or batch.held:
                # One more child has answered, started or failed.
                self.progressed_s = time.monotonic()
                self._hand_out(batch)
                for child in self._answering():
                    failure = self._collect(child, batch) or failure
                if not self._children:
                    batch.give_up(failure or ModelUnavailable(f"model {self._context.alias!r} has no process"))
            self._recycle()
        return batch.outcomes

    def close(self) -> None:
        with self._lock:
            self._closed = True
        end(self._snapshot())
        # A forward in another thread notices that its children are gone, and returns.
        with self._one_forward:
            for child in self._snapshot():
                self._drop(child)

    # ------------------------------------------------------------------------------- the children

    def _snapshot(self) -> list[Child]:
        with self._lock:
            return list(self._children)

    def _start(self) -> None:
        """Raises ModelUnavailable."""
        with self._lock:
            if self._closed:
                raise ModelUnavailable(f"model {self._context.alias!r} is shutting down")
            self._children.append(Child(self._adapter_name, self._context, self._start_limit_s))

    def _drop(self, child: Child) -> None:
        with self._lock:
            if child in self._children:
                self._children.remove(child)
        child.kill()

    def _fill_up(self) -> None:
        """Replace what died while idle or could not be started before. Raises ModelUnavailable."""
        for child in self._snapshot():
            if not child.alive:
                self._drop(child)
        while len(self._children) < self._processes:
            self._start()

    def _try_fill_up(self) -> CortexError | None:
        try:
            self._fill_up()
        except CortexError as error:
            return error
        return None

    def _answering(self) -> list[Child]:
        """Wait for the children that owe an answer: those that gave it, died, or are past their deadline."""
        owing = {child.fileno(): child for child in self._snapshot() if child.owes}
        if not owing:
            return []
        poller = select.poll()
        for fd in owing:
            poller.register(fd, select.POLLIN)
        wait_s = min(child.deadline_s for child in owing.values()) - time.monotonic()
        ready = {fd for fd, _ in poller.poll(math.ceil(max(wait_s, 0.0) * 1e3))}
        now_s = time.monotonic()
        return [child for fd, child in owing.items() if fd in ready or child.deadline_s <= now_s]

    def _hand_out(self, batch: _Batch) -> None:
        for child in self._snapshot():
            if batch.waiting and child.facts is not None and not child.owes:
                batch.hand(child, self._time_limit_s)

    def _collect(self, child: Child, batch: _Batch) -> CortexError | None:
        """Take what a child owes. Returns why there is one child less, if so."""
        share = batch.held.pop(child, None)
        try:
            outcomes = child.take(self.memo)
        except CortexError as error:
            self._drop(child)
            if share is None:
                logger.error("a child of model %s did not start: %s", self._context.alias, error)
                return error
            logger.warning("%s; it held %d inputs", error, len(share.items))
            failure = self._try_fill_up()
            if self._closed and failure is not None:
                batch.settle(share, [failure] * len(share.items))
            else:
                batch.lost(share, error, child.overdue)
            return failure
        if outcomes is None and share is not None:
            batch.held[child] = share
        elif outcomes is not None and share is not None:
            batch.settle(share, outcomes)
        return None

    def _recycle(self) -> None:
        """Replace children that hold more than their share of the memory."""
        if self._share_bytes is None:
            return
        for child in self._snapshot():
            held_bytes = child.memory_bytes
            if child.facts is not None and held_bytes > max(self._share_bytes, _GROWTH * child.ready_bytes):
                logger.info("a child of model %s grew to %d MB and is replaced", self._context.alias,
                            held_bytes // 10**6)  # fmt: skip
                self._drop(child)
        self._try_fill_up()


def _cost(value: Any, params: Params) -> int:
    if isinstance(value, Series):
        return len(value.y) + int(getattr(params, "horizon", 0))
    return len(value) // 4 + 1
