"""alias -> model: loading, warming, revisions, failures that are remembered, closing."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any, ClassVar, Self

import pytest

from cortex_tasks.config import FleetConfig, ModelConfig
from cortex_tasks.errors import CortexError, InvalidInput, ModelUnavailable, UnknownModel
from cortex_tasks.payloads import Params
from tests.support.stub_models import PATIENCE_S, Panic, StubAdapter, fleet_of, registry_of
from workers.adapters import Item, LoadContext
from workers.registry import RETRY_LOAD_S, Registry, revision_of


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_000.0

    def __call__(self) -> float:
        return self.now_s


class Steered(StubAdapter):
    """A stub whose loads and passes the test steers."""

    failure: ClassVar[BaseException | None] = None
    made: ClassVar[list[Steered]] = []
    contexts: ClassVar[list[LoadContext]] = []
    forward_failure: ClassVar[Exception | None] = None
    tokens: ClassVar[int] = 0

    @classmethod
    def load(cls, context: LoadContext) -> Self:
        cls.contexts.append(context)
        if cls.failure is not None:
            raise cls.failure
        adapter = cls()
        cls.made.append(adapter)
        return adapter

    @property
    def token_bytes(self) -> int:
        return self.tokens

    def forward(self, task: str, items: Sequence[Item], params: Params) -> Sequence[Any]:
        if self.forward_failure is not None:
            raise self.forward_failure
        return [{"said": item.data} for item in items]


class WithoutWeights(Steered):
    weights_optional = True
    note = ""


STEERED = f"{__name__}:Steered"


@pytest.fixture(autouse=True)
def steered() -> Iterator[type[Steered]]:
    Steered.failure, Steered.forward_failure, Steered.tokens = None, None, 0
    Steered.made, Steered.contexts = [], []
    yield Steered
    Steered.failure, Steered.forward_failure, Steered.tokens = None, None, 0


def fleet(**changes: Any) -> FleetConfig:
    return fleet_of(m={"adapter": STEERED, **changes})


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def registry(clock: Clock) -> Registry:
    return registry_of(fleet(), clock)


# ---------------------------------------------------------------------------------------------- loading


def test_a_load_warms_and_names_the_revision(registry: Registry) -> None:
    model = registry.load("m")
    assert model.state == "ready"
    assert Steered.made[0].prepared == ["warm"]
    assert len(model.revision) == 32
    card = model.card()
    assert (card.alias, card.queue, card.state, card.size_bytes) == ("m", "m", "ready", 7)
    assert card.revision == model.revision


def test_a_ready_model_is_not_loaded_again(registry: Registry) -> None:
    assert registry.load("m") is registry.load("m")
    assert len(Steered.made) == 1


def test_loads_of_one_model_at_once_are_one(registry: Registry) -> None:
    barrier = threading.Barrier(4)

    def load() -> None:
        barrier.wait(PATIENCE_S)
        registry.load("m")

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert len(Steered.made) == 1


def test_the_adapter_is_told_what_it_needs(tmp_path: Path, clock: Clock) -> None:
    (tmp_path / "config.json").write_text("{}")
    declared = fleet(source=f"file:{tmp_path}", options={"depth": 2})
    registry = Registry(declared, ["m"], threads=3, device="cuda:1", models_dir=None, clock=clock)
    registry.load("m")
    (context,) = Steered.contexts
    assert (context.alias, context.snapshot, context.threads, context.device) == ("m", tmp_path, 3, "cuda:1")
    assert context.digest
    assert context.options == {"depth": 2}


def test_an_unknown_model_was_sent_to_the_wrong_queue(registry: Registry) -> None:
    with pytest.raises(UnknownModel, match="wrong queue") as caught:
        registry.model("other")
    assert caught.value.details == {"model": "other"}


def test_a_model_can_be_added(registry: Registry) -> None:
    before = registry.models
    registry.add("late", fleet_of(late={}).models["late"])
    assert registry.model("late").state == "idle"
    assert "late" not in before, "who walks over the models must not see them change"
    assert registry.load("late").state == "ready"


# --------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize("failure", [ModelUnavailable("no weights"), InvalidInput("odd")])
def test_a_failed_load_is_remembered_then_tried_again(registry: Registry, clock: Clock, failure: CortexError) -> None:
    Steered.failure = failure
    with pytest.raises(type(failure), match=str(failure)):
        registry.load("m")
    model = registry.model("m")
    assert (model.state, model.reason, model.error) == ("unavailable", str(failure), failure)
    assert not registry.may_load(model)
    clock.now_s += RETRY_LOAD_S
    assert registry.may_load(model)
    Steered.failure = None
    assert registry.load("m").state == "ready"
    assert (model.error, model.reason) == (None, "")
    assert not registry.may_load(model)


@pytest.mark.parametrize(
    "failure", [OSError(28, "No space left on device"), MemoryError("no memory"), SystemExit(3), Panic()]
)
def test_a_cause_that_may_pass_is_tried_again_sooner(registry: Registry, clock: Clock, failure: BaseException) -> None:
    Steered.failure = failure
    with pytest.raises(ModelUnavailable, match=type(failure).__name__) as caught:
        registry.load("m")
    assert caught.value.details == {"transient": True}
    model = registry.model("m")
    assert not registry.may_load(model)
    clock.now_s += 1.0
    assert registry.may_load(model)


def test_a_load_on_the_main_thread_can_be_interrupted(registry: Registry) -> None:
    Steered.failure = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        registry.load("m")
    Steered.failure = None
    assert registry.load("m").state == "ready"


def test_a_model_that_fails_its_warm_up_is_closed(registry: Registry) -> None:
    Steered.forward_failure = RuntimeError("cannot compute")
    with pytest.raises(ModelUnavailable, match="cannot compute"):
        registry.load("m")
    assert Steered.made[0].closed
    assert registry.model("m").adapter is None
    with pytest.raises(ModelUnavailable, match="cannot compute"):
        _ = registry.model("m").loaded


def test_a_model_that_fails_while_its_budget_is_measured_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = registry_of(fleet(backend="torch"))

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no memory for so many tokens")

    monkeypatch.setattr("workers.registry.BudgetLearner.calibrate", fail)
    with pytest.raises(ModelUnavailable, match="no memory"):
        registry.load("m")
    assert Steered.made[0].closed
    assert registry.model("m").adapter is None


def test_an_example_that_is_refused_makes_the_model_unavailable(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Steered, "prepare", lambda *_: [InvalidInput("not this")])
    with pytest.raises(ModelUnavailable, match="not this"):
        registry.load("m")


def test_absent_weights_are_an_error_unless_the_adapter_copes() -> None:
    source = {"source": "file:/nonexistent/model"}
    with pytest.raises(ModelUnavailable, match="nonexistent"):
        registry_of(fleet(**source)).load("m")
    model = registry_of(fleet(adapter=f"{__name__}:WithoutWeights", **source)).load("m")
    assert model.state == "ready"
    assert "nonexistent" in model.reason
    assert Steered.contexts[-1].snapshot is None


# -------------------------------------------------------------------------------- revisions and budgets


def test_the_revision_changes_with_each_ingredient(monkeypatch: pytest.MonkeyPatch) -> None:
    config: ModelConfig = fleet().models["m"]
    adapter = Steered()
    revisions = [revision_of(config, adapter, "digest"), revision_of(config, adapter, "other digest")]
    changes: list[dict[str, Any]] = [
        {"adapter": "echo"},
        {"backend": "onnx"},
        {"precision": "int8"},
        {"options": {"depth": 2}},
    ]
    revisions += [revision_of(config.model_copy(update=change), adapter, "digest") for change in changes]
    monkeypatch.setattr(Steered, "version", "2")
    revisions.append(revision_of(config, adapter, "digest"))
    monkeypatch.setattr(Steered, "library", "stub 2.0")
    revisions.append(revision_of(config, adapter, "digest"))
    assert len(set(revisions)) == len(revisions)
    assert revision_of(config, adapter, "digest") == revisions[-1]


def test_where_a_model_is_served_does_not_change_its_revision() -> None:
    config = fleet().models["m"]
    moved = config.model_copy(update={"queue": "elsewhere", "images": ("other",), "load": "pinned", "children": 2})
    assert revision_of(config, Steered(), "d") == revision_of(moved, Steered(), "d")


def test_a_learned_budget_never_exceeds_the_inference_buffer() -> None:
    declared = fleet(backend="torch", batching={"max_items": 8, "max_padded_tokens": 4_096})
    Steered.tokens = declared.memory_config.inference_buffer // 500
    ticks = iter(range(10**6))
    registry = registry_of(declared, lambda: next(ticks) / 1e3)
    model = registry.load("m")
    assert model.learners["embed"].ceiling_tokens == 500
    assert model.budget("embed").max_padded_tokens <= 500
    assert model.card().budget_tokens == model.learners["embed"].best_tokens


def test_a_model_that_comes_back_keeps_what_was_learned_unless_its_revision_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ticks = iter(range(10**6))
    registry = registry_of(fleet(backend="torch"), lambda: next(ticks) / 1e3)
    learned = registry.load("m").learners
    assert learned
    for expected in (True, False):
        registry._let_go("m")
        registry.memory.forget("m")
        assert registry.model("m").adapter is None
        if not expected:
            monkeypatch.setattr(Steered, "version", "another")
        assert (registry.load("m").learners is learned) is expected


@pytest.mark.parametrize("seed", range(5))
def test_tasks_learn_budgets_of_their_own_though_a_token_costs_one_three_times_the_other(seed: int) -> None:
    per_s = {
        "classify": {128: 167, 256: 183, 512: 209, 1_024: 225, 2_048: 237, 4_096: 232, 8_192: 229},
        "features": {128: 79, 256: 78, 512: 77, 1_024: 75, 2_048: 65, 4_096: 57, 8_192: 50},
    }
    random, drift, used = Random(seed), 0.0, []
    ticks = iter(range(10**6))
    declared = fleet(tasks=["classify", "features"], backend="torch", batching={"max_padded_tokens": 8_192})
    model = registry_of(declared, lambda: next(ticks) / 1e3).load("m")
    for _ in range(3_000):
        task = random.choice(("classify", "features"))
        tokens = model.budget(task).max_padded_tokens
        drift += -drift / 50 + random.gauss(0, 0.02)
        rate = per_s[task][tokens] * math.exp(drift + random.gauss(0, 0.08))
        model.learners[task].observe(tokens, tokens, tokens / rate)
        used.append((task, per_s[task][tokens]))
    for task, rates in per_s.items():
        lately = [rate for name, rate in used[2_000:] if name == task]
        assert sum(lately) >= 0.95 * max(rates.values()) * len(lately), task
    largest = max(learner.best_tokens for learner in model.learners.values())
    assert model.card().budget_tokens == largest > model.learners["features"].best_tokens


@pytest.mark.parametrize(("device", "tokens", "items"), [("cpu", 1_000, 8), ("cuda:0", 50_000, 600)])
def test_a_batch_holds_what_the_device_is_given(device: str, tokens: int, items: int) -> None:
    batching = {"max_items": 8, "max_padded_tokens": 1_000, "gpu": {"max_items": 600, "max_padded_tokens": 50_000}}
    declared = fleet(batching=batching)
    registry = Registry(declared, ["m"], threads=1, device=device, models_dir=None, clock=lambda: 0.0)
    registry.add("later", declared.models["m"])
    for alias in ("m", "later"):
        assert registry.model(alias).budget("embed") == (items, tokens)
    assert registry.load("m").card().budget_tokens == tokens


@pytest.mark.parametrize("changes", [{"backend": "native"}, {"backend": "torch", "batching": {"learn": False}}])
def test_a_budget_that_is_not_learned_is_the_configured_one(changes: dict[str, Any]) -> None:
    model = registry_of(fleet(**changes)).load("m")
    assert not model.learners
    assert model.budget("embed").max_padded_tokens == model.config.batching.max_padded_tokens


# ------------------------------------------------------------------------------------- in and out of memory


def tight(clock: Clock, **models: dict[str, Any]) -> Registry:
    """A registry with room for two stubs of 7 bytes."""
    plain = fleet_of(**{alias: {"adapter": STEERED, **changes} for alias, changes in models.items()})
    l1 = plain.model_storage.l1_memory.model_copy(update={"size": 15})
    return registry_of(
        plain.model_copy(update={"model_storage": plain.model_storage.model_copy(update={"l1_memory": l1})}), clock
    )


def test_the_longest_unused_model_makes_room_and_is_loaded_again_when_needed(clock: Clock) -> None:
    registry = tight(clock, a={}, b={}, c={})
    for alias in ("a", "b", "c"):
        clock.now_s += 1
        registry.load(alias)
    assert {alias: model.state for alias, model in registry.models.items()} == {"a": "idle", "b": "ready", "c": "ready"}
    assert [adapter.closed for adapter in Steered.made] == [True, False, False]
    clock.now_s += 1
    assert registry.load("a").state == "ready"
    assert registry.model("b").state == "idle"
    assert registry.memory.used_bytes == 14
    assert (registry.store.counters.evictions, registry.store.counters.reloads) == (2, 1)


def test_a_model_in_use_is_never_closed(clock: Clock) -> None:
    registry = tight(clock, a={}, b={})
    with registry.using("a") as model:
        clock.now_s += 10_000
        registry.memory.let_idle_go()
        assert model.loaded is Steered.made[0]
        assert not Steered.made[0].closed
    clock.now_s += 10_000
    assert registry.memory.let_idle_go() == ["a"]
    assert Steered.made[0].closed
    assert registry.model("a").state == "idle"
    assert not registry.hold(registry.model("a"))
    with registry.using("a") as model:
        assert model.loaded is Steered.made[1]
    assert (registry.store.counters.evictions, registry.store.counters.reloads) == (1, 1)
    assert model.card().loads == 2


def test_a_pinned_model_does_not_go_for_being_idle(clock: Clock) -> None:
    registry = tight(clock, a={"load": "pinned"})
    registry.load("a")
    clock.now_s += 10_000
    assert registry.memory.let_idle_go() == []


def test_a_failed_load_gives_its_place_back(clock: Clock) -> None:
    registry = tight(clock, a={})
    Steered.forward_failure = RuntimeError("cannot compute")
    with pytest.raises(ModelUnavailable):
        registry.load("a")
    assert registry.memory.used_bytes == 0


def test_a_model_that_is_too_large_says_what_it_needs(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Steered, "size_bytes", 10**6)
    with pytest.raises(ModelUnavailable, match=r"model 'a' needs 1\.0 MB of memory and models may take 0\.0 MB"):
        tight(clock, a={}).load("a")
    assert Steered.made[0].closed


def test_the_models_of_a_queue_share_its_waiting_jobs(clock: Clock) -> None:
    registry = tight(clock, a={"queue": "q"}, b={"queue": "q"})
    registry.model("a").jobs = 8
    registry.load("a")
    registry.load("b")
    registry.note_depths({"q": 20, "other": 3})
    waiting = {alias: one.waiting for alias, one in registry.memory._residency.residents.items()}
    assert waiting == {"a": 18.0, "b": 2.0}


def test_a_batch_is_cut_to_the_inference_buffer_though_its_budget_is_not_learned() -> None:
    declared = fleet(backend="torch", batching={"learn": False, "max_padded_tokens": 4_096})
    Steered.tokens = declared.memory_config.inference_buffer // 500
    model = registry_of(declared).load("m")
    assert model.budget("embed").max_padded_tokens == 500
    assert model.card().budget_tokens == 500


# ---------------------------------------------------------------------------------------------- closing


def test_close_closes_every_model_though_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = registry_of(fleet_of(a={"adapter": STEERED}, b={"adapter": STEERED}, idle={"adapter": STEERED}))
    registry.load("a")
    registry.load("b")

    def fail() -> None:
        raise OSError("already gone")

    monkeypatch.setattr(Steered.made[0], "close", fail)
    registry.close()
    assert Steered.made[1].closed


def test_a_card_is_a_snapshot(registry: Registry) -> None:
    card = registry.model("m").card()
    assert card.state == "idle"
    registry.load("m")
    assert card.state == "idle"
