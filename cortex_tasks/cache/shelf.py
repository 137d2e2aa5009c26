"""Which answers are known: what to ask Redis for, and what its replies mean. No IO happens here.

Near memory may serve an answer only while the model's revision and its count of purges are known to be the present
ones: they are read with every look into Redis, and anew when what is known of them is older than FRESH_S. So nobody
is given an answer of an old revision, or one that was purged, for longer than that, nor while Redis does not answer.

An answer enters near memory when it was found in Redis, that is, when it is asked for a second time: what is asked
once costs no memory, and what is computed costs its client nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pydantic import ValidationError

from cortex_tasks.cache.counters import Counters
from cortex_tasks.cache.frame import opened
from cortex_tasks.cache.names import active_revision, entry_prefix, generation_key, model_key
from cortex_tasks.cache.near import Near, weigh
from cortex_tasks.cache.popular import Kind, Sampler
from cortex_tasks.catalog import TaskSpec
from cortex_tasks.derived import Form, form_of, made
from cortex_tasks.keys import Address, stored_params
from cortex_tasks.payloads import Embedding, Params, Result, Timings, unchecked, unshared

__all__ = ["FRESH_S", "Question", "Search", "Shelf", "tokens_of"]

#: How long what is known of a model's revision and purges may be used without asking again.
FRESH_S: Final = 0.5
#: Inputs of one look into Redis, which serves nobody else meanwhile.
SEARCH_INPUTS: Final = 512

#: What the frame of a vector holds, and what its form adds: of known types, so that a result needs no check of its own.
_VECTOR_FIELDS: Final = frozenset({"data", "truncated", "encoding", "scale"})
_NEAR: Final = Timings(cached="near")
_L2: Final = Timings(cached="l2")


def tokens_of(values: Sequence[Any]) -> int:
    """About how many tokens these inputs are: four characters each, and each point of a series."""
    return sum([len(value) // 4 + 1 if isinstance(value, str) else len(value.y) for value in values])


@dataclass(frozen=True, slots=True, eq=False)
class _Present:
    """What is known of a model: replaced as a whole when it changes."""

    revision: str | None
    generation: bytes | None
    #: Marks what was put into near memory since.
    stamp: int


class _Model:
    """One model's present revision. ``fresh_until_s``: monotonic seconds."""

    __slots__ = ("fresh_until_s", "present")

    def __init__(self) -> None:
        self.present = _Present(None, None, 0)
        self.fresh_until_s = 0.0


class Question:
    """A kind of question: task, model, parameters."""

    def __init__(self, spec: TaskSpec, alias: str, params: Params, adapter: str, model: _Model) -> None:
        stored = stored_params(params, adapter)
        self.spec, self.alias, self.model = spec, alias, model
        self.entries = entry_prefix(alias)
        self.names = [model_key(alias).encode(), generation_key(alias).encode()]
        self._canonical = stored.canonical()
        self.kind = Kind(alias, spec.name, self._canonical)
        self._form = form_of(params, stored)
        #: Tells forms of one stored answer apart in near memory.
        self.form = repr(tuple(self._form)).encode() if self._form is not None else b""
        self._addressed: tuple[_Present, Address] | None = None

    def address(self, present: _Present) -> Address:
        known = self._addressed
        if known is None or known[0] is not present:
            address = Address(self.spec.name, self.alias, present.revision or "", self._canonical)
            self._addressed = known = (present, address)
        return known[1]

    def items(self, values: Sequence[Mapping[str, Any]], revision: str) -> list[Result | None]:
        """Typed results of stored values; None for one that does not fit this version of Cortex."""
        if self._form is not None:
            values = _formed(self._form, values, self.alias)
        fixed = {"model": self.alias, "revision": revision, "timings": _L2}
        return [self._item(value, fixed) for value in values]

    def _item(self, value: Mapping[str, Any], fixed: Mapping[str, Any]) -> Result | None:
        if self.spec.result is Embedding and type(value.get("data")) is bytes and value.keys() <= _VECTOR_FIELDS:
            return unchecked(Embedding, {"truncated": False, "encoding": "float32", "scale": 1.0, **value, **fixed})
        try:
            return self.spec.result.model_validate({**value, **fixed})
        except ValidationError:
            return None


def _formed(form: Form, values: Sequence[Mapping[str, Any]], alias: str) -> list[Mapping[str, Any]]:
    """Stored values in a form. One that has no such form is empty, which is a miss: its worker says why."""
    try:
        formed = made(form, values, alias)
    except (KeyError, ValueError, TypeError):
        # One of them is no vector of float32: it alone is a miss.
        return [_formed(form, [value], alias)[0] for value in values] if len(values) > 1 else [{}]
    return [value if isinstance(value, dict) else {} for value in formed]


class Shelf:
    """What the searches of one client share. ``clock``: monotonic seconds."""

    def __init__(
        self,
        near_bytes: int,
        near_ttl_s: float,
        clock: Callable[[], float] = time.monotonic,
        sampler: Sampler | None = None,
    ) -> None:
        """``sampler``: notes the inputs that are found here; of the others their worker does."""
        self.clock = clock
        self.near = Near(near_bytes, near_ttl_s, clock)
        self.counters = Counters(clock, sampler)
        self._models: dict[str, _Model] = {}

    def question(self, spec: TaskSpec, alias: str, params: Params, adapter: str) -> Question:
        """``adapter``: the model's, as queues.yaml names it."""
        return Question(spec, alias, params, adapter, self._models.setdefault(alias, _Model()))

    def nearby(self, question: Question, value: Any) -> Result | None:
        """The answer to one checked input, if near memory has it and may serve it."""
        model = question.model
        present = model.present
        if self.clock() >= model.fresh_until_s or present.revision is None:
            return None
        item = self._near(question.address(present).key(value) + question.form, present)
        if item is not None:
            self.counters.add(question.alias, near_hits=1, saved_tokens=tokens_of([value]))
            if self.counters.sampler is not None:
                self.counters.sampler.offer(question.kind, (value,))
        return item

    def _near(self, key: bytes, present: _Present) -> Result | None:
        item: Result | None = self.near.get(key, present.stamp)
        if item is not None and item.timings is _L2:
            # Made once, when it is asked for again: most answers never are.
            item = item.model_copy(update={"timings": _NEAR})
            self._keep(key, item, present)
        return unshared(item) if item is not None else None

    def _keep(self, key: bytes, item: Result, present: _Present) -> None:
        data = item.__dict__.get("data")
        self.near.put(key, item, len(data) if isinstance(data, bytes) else weigh(item), present.stamp)

    def forget(self, question: Question, values: Sequence[Any]) -> None:
        """Drop these from near memory: they are computed anew."""
        present = question.model.present
        for key in question.address(present).keys(values):
            self.near.discard(key + question.form)


class Search:
    """One look for the answers to some checked inputs, at most SEARCH_INPUTS of them.

    While ``wants()`` names keys, give ``hear`` what MGET says to them. Then ``found`` holds a result or None for each
    input. Giving up at any moment leaves only what may be served.
    """

    def __init__(self, shelf: Shelf, question: Question, values: Sequence[Any]) -> None:
        self._shelf, self._question, self._values = shelf, question, values
        self.found: list[Result | None] = [None] * len(values)
        self._rounds = 0
        self._begin(question.model.present)
        if self._shelf.clock() < question.model.fresh_until_s:
            self.found = list(self._held)
            if not self._missing:
                self._done = True

    def _begin(self, present: _Present) -> None:
        """Look through near memory. What is found is held until it is known that it may be served."""
        self._present = present
        self._done = False
        self._held: list[Result | None] = [None] * len(self._values)
        self._keys: list[bytes] = []
        self._missing: list[int] = []
        if present.revision is not None:
            question, shelf = self._question, self._shelf
            self._keys = question.address(present).keys(self._values)
            if len(shelf.near):
                self._held = [shelf._near(key + question.form, present) for key in self._keys]
            self._missing = [index for index, item in enumerate(self._held) if item is None]

    def wants(self) -> list[bytes]:
        """Keys to read next; none when the search is over."""
        if self._done:
            return []
        self._asked_s = self._shelf.clock()
        entries = self._question.entries
        return [*self._question.names, *(entries + self._keys[index] for index in self._missing)]

    def hear(self, replies: Sequence[bytes | None]) -> None:
        """What is stored under the keys that ``wants`` named."""
        revision, generation = active_revision(replies[0]), replies[1]
        self._rounds += 1
        present, model = self._present, self._question.model
        if revision is not None and revision == present.revision and generation == present.generation:
            if model.present is present:
                # Of when it was asked: it may have changed since Redis looked.
                model.fresh_until_s = self._asked_s + FRESH_S
            self.found = list(self._held)
            self._take(replies[2:])
            self._done = True
            return
        self.found = [None] * len(self._values)
        if model.present is present:
            model.present = _Present(revision, generation, present.stamp + 1)
            model.fresh_until_s = 0.0
        if revision is None or self._rounds > 2:
            self._done = True
        else:
            self._begin(model.present)

    def _take(self, frames: Sequence[bytes | None]) -> None:
        indexes: list[int] = []
        values: list[Mapping[str, Any]] = []
        for index, frame in zip(self._missing, frames, strict=True):
            value = None if frame is None else opened(self._keys[index], frame)
            if value is not None:
                indexes.append(index)
                values.append(value)
        if not values:
            return
        question, shelf = self._question, self._shelf
        keeps = shelf.near.max_bytes > 0
        for index, item in zip(indexes, question.items(values, self._present.revision or ""), strict=True):
            if item is not None:
                self.found[index] = item
                if keeps:
                    shelf._keep(self._keys[index] + question.form, unshared(item), self._present)

    def count(self) -> None:
        """Count what came of it."""
        known = [value for value, item in zip(self._values, self.found, strict=True) if item is not None]
        l2 = sum(item is not None and item.timings is _L2 for item in self.found)
        counters = self._shelf.counters
        counters.add(
            self._question.alias,
            l2_hits=l2,
            near_hits=len(known) - l2,
            misses=len(self.found) - len(known),
            saved_tokens=tokens_of(known),
        )
        if counters.sampler is not None:
            counters.sampler.offer(self._question.kind, known)
