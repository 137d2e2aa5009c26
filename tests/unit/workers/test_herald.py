"""Who tells clients which revision answers."""

from __future__ import annotations

from tests.support.stub_models import StubAdapter, fleet_of, ready, registry_of
from workers.herald import Herald


class World:
    def __init__(self) -> None:
        self.now_s = 10.0
        self.reachable = True
        self.told: list[tuple[str, str, bool]] = []
        self.registry = registry_of(fleet_of(m={}, idle={}))
        ready(self.registry, "m", StubAdapter())
        self.herald = Herald(self.registry, self.activate, lambda: self.now_s)

    def activate(self, alias: str, revision: str, *, loaded: bool) -> bool:
        if self.reachable:
            self.told.append((alias, revision, loaded))
        return self.reachable

    def turn(self, after_s: float = 0.0) -> list[tuple[str, str, bool]]:
        self.now_s += after_s
        self.told = []
        self.herald.turn()
        return self.told


def test_a_loaded_model_is_told_at_once_and_confirmed_later() -> None:
    world = World()
    assert world.turn() == [("m", "rev", True)]
    assert world.turn(0.5) == []
    assert world.turn(2.0) == [("m", "rev", False)]


def test_a_new_revision_is_told_at_once() -> None:
    world = World()
    world.turn()
    world.registry.model("m").revision = "new"
    assert world.turn(0.1) == [("m", "new", True)]


def test_what_could_not_be_told_is_told_as_soon_as_it_can_be() -> None:
    world = World()
    world.reachable = False
    assert world.turn() == []
    world.reachable = True
    assert world.turn(0.1) == [("m", "rev", True)]


def test_a_confirmation_that_failed_is_repeated() -> None:
    world = World()
    world.turn()
    world.reachable = False
    world.turn(2.0)
    world.reachable = True
    assert world.turn(0.1) == [("m", "rev", False)]
