"""Searches: near memory and a dictionary in Redis' place."""

from __future__ import annotations

import itertools
import json
import struct
from typing import Any, get_args

import pytest

from cortex_tasks.cache.frame import sealed
from cortex_tasks.cache.names import entry_prefix, generation_key, model_key
from cortex_tasks.cache.shelf import FRESH_S, Question, Search, Shelf
from cortex_tasks.catalog import TASKS
from cortex_tasks.derived import form_of, made
from cortex_tasks.keys import Address, stored_params
from cortex_tasks.payloads import (
    DecomposeParams,
    Decomposition,
    Embedding,
    EmbedParams,
    Encoding,
    Params,
    Result,
    Series,
    Timings,
)


class World:
    """A client's shelf, and Redis as a dictionary."""

    def __init__(self, adapter: str = "echo") -> None:
        self.now_s = 100.0
        self.adapter = adapter
        self.shelf = Shelf(10**6, 300, lambda: self.now_s)
        self.redis: dict[bytes, bytes] = {}
        self.reads: list[int] = []

    def activate(self, revision: str, alias: str = "m") -> None:
        self.redis[model_key(alias).encode()] = json.dumps({"revision": revision, "at": 0}).encode()

    def purge(self) -> None:
        for name in [name for name in self.redis if name.startswith(entry_prefix("m"))]:
            del self.redis[name]
        name = generation_key("m").encode()
        self.redis[name] = b"%d" % (int(self.redis.get(name, b"0")) + 1)

    def question(self, params: Params | None = None, alias: str = "m") -> Question:
        return self.shelf.question(TASKS["embed"], alias, params or EmbedParams(), self.adapter)

    def store(self, text: str, revision: str, *numbers: float, params: Params | None = None) -> bytes:
        stored = stored_params(params or EmbedParams(), self.adapter)
        key = Address("embed", "m", revision, stored.canonical()).key(text)
        value = {"data": struct.pack(f"<{len(numbers)}f", *numbers), "truncated": False}
        self.redis[entry_prefix("m") + key] = sealed(key, value)
        return entry_prefix("m") + key

    def ask(self, *texts: str, question: Question | None = None) -> list[tuple[Any, Any] | None]:
        """Vector and tier of each; None for a miss."""
        search = Search(self.shelf, question or self.question(), texts)
        while names := search.wants():
            self.reads.append(len(names))
            search.hear([self.redis.get(name) for name in names])
        search.count()
        return [_shown(item) for item in search.found]


def _shown(item: Result | None) -> tuple[Any, Any] | None:
    return None if item is None else (item.vector.tolist(), item.timings.cached)  # type: ignore[attr-defined]


@pytest.fixture
def world() -> World:
    world = World()
    world.activate("r1")
    return world


def test_known_inputs_are_found_in_redis_then_in_near_memory_and_unknown_ones_are_missed(world: World) -> None:
    world.store("a", "r1", 1.0)
    assert world.ask("a", "b") == [([1.0], "l2"), None]
    assert world.ask("a", "b", "a") == [([1.0], "near"), None, ([1.0], "near")]


def test_a_fresh_near_hit_asks_redis_nothing(world: World) -> None:
    world.store("a", "r1", 1.0)
    world.ask("a")
    reads = len(world.reads)
    item = world.shelf.nearby(world.question(), "a")
    assert _shown(item) == ([1.0], "near")
    assert world.ask("a") == [([1.0], "near")]
    assert len(world.reads) == reads


def test_what_is_known_of_the_revision_is_read_anew_after_half_a_second(world: World) -> None:
    world.store("a", "r1", 1.0)
    world.ask("a")
    world.now_s += FRESH_S
    assert world.shelf.nearby(world.question(), "a") is None
    reads = len(world.reads)
    assert world.ask("a") == [([1.0], "near")]
    assert world.reads[reads:] == [2]


def test_after_a_change_of_revision_the_old_answer_is_never_given_by_redis_and_near_memory_only_while_fresh(
    world: World,
) -> None:
    world.store("a", "r1", 1.0)
    world.ask("a")
    world.activate("r2")
    world.now_s += FRESH_S
    assert world.ask("a") == [None]
    world.store("a", "r2", 2.0)
    assert world.ask("a") == [([2.0], "l2")]


def test_a_search_under_way_while_the_revision_changes_finds_the_new_answers(world: World) -> None:
    world.store("a", "r1", 1.0)
    world.store("b", "r1", 1.5)
    world.ask("a")
    world.activate("r2")
    world.store("a", "r2", 2.0)
    # "a" is near and fresh, but reading "b" shows that the revision has changed: none of the old is given.
    assert world.ask("a", "b") == [([2.0], "l2"), None]


def test_a_purge_empties_near_memory(world: World) -> None:
    world.store("a", "r1", 1.0)
    world.ask("a")
    world.purge()
    world.now_s += FRESH_S
    assert world.ask("a") == [None]


def test_near_memory_is_not_served_while_redis_does_not_answer(world: World) -> None:
    world.store("a", "r1", 1.0)
    world.ask("a")
    world.now_s += FRESH_S
    search = Search(world.shelf, world.question(), ["a"])
    assert search.wants()
    assert search.found == [None]


def test_without_a_known_revision_there_are_no_hits() -> None:
    world = World()
    assert world.ask("a") == [None]
    world.redis[model_key("m").encode()] = b"{broken"
    assert world.ask("a") == [None]


def test_two_models_are_two_questions(world: World) -> None:
    world.store("a", "r1", 1.0)
    world.activate("r1", "other")
    assert world.ask("a", question=world.question(alias="other")) == [None]


def test_a_corrupt_entry_is_a_miss_and_its_neighbour_is_found(world: World) -> None:
    name = world.store("a", "r1", 1.0)
    world.store("b", "r1", 2.0)
    world.redis[name] = world.redis[name][:-1] + b"!"
    assert world.ask("a", "b") == [None, ([2.0], "l2")]


def test_a_value_that_does_not_fit_is_a_miss(world: World) -> None:
    name = world.store("a", "r1", 1.0)
    key = name.removeprefix(entry_prefix("m"))
    world.redis[name] = sealed(key, {"labels": []})
    assert world.ask("a") == [None]


def test_both_forms_of_an_embedding_come_from_one_stored_vector() -> None:
    world = World("sentence_transformers")
    world.activate("r1")
    world.store("a", "r1", 3.0, 4.0)
    scaled, raw = world.question(), world.question(EmbedParams(normalize=False))
    assert world.ask("a", question=scaled)[0] == (pytest.approx([0.6, 0.8]), "l2")
    assert world.ask("a", question=raw)[0] == ([3.0, 4.0], "l2")
    assert world.ask("a", question=scaled)[0] == (pytest.approx([0.6, 0.8]), "near")
    assert world.ask("a", question=raw)[0] == ([3.0, 4.0], "near")


@pytest.mark.parametrize("adapter", ["sentence_transformers", "echo"])
def test_every_form_comes_from_one_stored_vector_as_a_worker_makes_it(adapter: str) -> None:
    world = World(adapter)
    world.activate("r1")
    numbers = [float(number) for number in range(-8, 8)]
    world.store("a", "r1", *numbers)
    stored = {"data": struct.pack("<16f", *numbers), "truncated": False}
    for dimensions, encoding in itertools.product((None, 8, 16), get_args(Encoding)):
        params = EmbedParams(dimensions=dimensions, encoding=encoding)
        form = form_of(params, stored_params(params, adapter))
        wire: Any = made(form, [stored], "m")[0] if form is not None else stored
        expected = Embedding(model="m", revision="r1", timings=Timings(cached="l2"), **wire)
        search = Search(world.shelf, world.question(params), ["a"])
        while names := search.wants():
            search.hear([world.redis.get(name) for name in names])
        assert search.found == [expected]
    assert len(world.shelf.near) == 9


def test_more_dimensions_than_the_stored_vector_has_are_a_miss(world: World) -> None:
    world.store("a", "r1", 1.0, 2.0)
    world.store("b", "r1", 1.0, 2.0, 3.0)
    assert world.ask("a", "b", question=world.question(EmbedParams(dimensions=3)))[0] is None
    assert world.ask("b", question=world.question(EmbedParams(dimensions=3))) == [([1.0, 2.0, 3.0], "near")]


def test_what_is_no_vector_of_floats_is_a_miss_alone() -> None:
    world = World("sentence_transformers")
    world.activate("r1")
    name = world.store("a", "r1", 3.0, 4.0)
    world.store("b", "r1", 3.0, 4.0)
    key = name.removeprefix(entry_prefix("m"))
    world.redis[name] = sealed(key, {"data": b"12345", "truncated": False})
    assert world.ask("a", "b") == [None, (pytest.approx([0.6, 0.8]), "l2")]


def test_forgotten_answers_are_not_near_any_more(world: World) -> None:
    world.store("a", "r1", 1.0)
    world.ask("a")
    world.shelf.forget(world.question(), ["a"])
    assert world.ask("a") == [([1.0], "l2")]


def test_what_came_of_searches_is_counted(world: World) -> None:
    world.store("a", "r1", 1.0)
    world.ask("a", "b")
    world.ask("a")
    assert world.shelf.counters.take() == {"m": {"l2_hits": 1, "near_hits": 1, "misses": 1, "saved_tokens": 2}}


def test_what_one_caller_changes_of_an_answer_no_other_one_gets(world: World) -> None:
    series = Series(ds=("2024-01-01", "2024-01-02"), y=(1.0, 2.0))
    question = world.shelf.question(TASKS["decompose"], "m", DecomposeParams(), world.adapter)
    key = Address("decompose", "m", "r1", stored_params(DecomposeParams(), world.adapter).canonical()).key(series)
    columns = {name: [0.0, 0.0] for name in ("y", "trend", "residual")}
    value = {"ds": list(series.ds), **columns, "seasonalities": {"weekly": [0.25, 0.5]}}
    world.redis[entry_prefix("m") + key] = sealed(key, value)

    def ask() -> Decomposition:
        search = Search(world.shelf, question, [series])
        while names := search.wants():
            search.hear([world.redis.get(name) for name in names])
        (found,) = search.found
        assert isinstance(found, Decomposition)
        return found

    def nearby() -> Decomposition:
        found = world.shelf.nearby(question, series)
        assert isinstance(found, Decomposition)
        return found

    for look, tier in ((ask, "l2"), (ask, "near"), (ask, "near"), (nearby, "near"), (nearby, "near")):
        answer = look()
        assert (answer.timings.cached, answer.seasonalities) == (tier, {"weekly": (0.25, 0.5)})
        answer.seasonalities["weekly"] = ()
