from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortex_tasks.errors import ConfigError, CortexError, InferenceFailed, InvalidInput, ModelUnavailable
from cortex_tasks.payloads import AnnotateParams, EmbedParams, ForecastParams, Series
from tests.support.child_adapters import adapter
from tests.support.stub_models import fleet_of, registry_of
from workers import child_main, child_process, child_protocol, children
from workers.adapters.base import LoadContext
from workers.adapters.echo import EchoAdapter
from workers.children import ChildHost, split

OBEDIENT = adapter("ObedientAdapter")
PARAMS = AnnotateParams()


def context(**options: Any) -> LoadContext:
    return LoadContext("obedient", None, "", ("annotate",), options)


def host(processes: int = 1, *, time_limit_s: float = 60.0, **more: Any) -> ChildHost:
    return ChildHost(OBEDIENT, context(), processes, time_limit_s=time_limit_s, **more)


def ask(hosted: ChildHost, texts: Sequence[str]) -> list[Any]:
    items: list[Any] = hosted.prepare("annotate", texts, PARAMS)
    return hosted.finish("annotate", items, hosted.forward("annotate", items, PARAMS), PARAMS)


def said(outcomes: Sequence[Any]) -> list[Any]:
    return [type(outcome) if isinstance(outcome, CortexError) else outcome["said"] for outcome in outcomes]


def wait_until(true: Callable[[], object], timeout_s: float = 30.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline_s, "it did not happen in time"
        time.sleep(0.01)


def gone(pid: int) -> bool:
    """No such process, or only its status is left for whoever adopted it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.fixture(scope="module")
def pair() -> Iterator[ChildHost]:
    """Two children that the tests may kill: they are replaced."""
    hosted = host(2)
    yield hosted
    hosted.close()


# ------------------------------------------------------------------------------------------ as an adapter


def test_it_speaks_for_the_adapter_it_hosts(pair: ChildHost) -> None:
    assert pair.version == "obedient-7"
    assert pair.library == "obedience 1.0"
    assert pair.note == "does as it is told"
    assert pair.example("annotate") == (["say hello"], PARAMS)
    assert pair.size_bytes > 1_000_000


def test_200_items_come_back_in_order_from_both_children(pair: ChildHost) -> None:
    outcomes = ask(pair, [f"say {number}" for number in range(200)])
    assert said(outcomes) == [str(number) for number in range(200)]
    assert {outcome["pid"] for outcome in outcomes} == set(pair.pids)
    assert os.getpid() not in pair.pids


def test_one_item_and_no_item(pair: ChildHost) -> None:
    assert said(ask(pair, ["say one"])) == ["one"]
    assert ask(pair, []) == []


@pytest.mark.parametrize("text", ["say \0 é 漢字 🦊", 'say {"\\0bytes":[0,1]}', "say " + "x" * 2_000_000])
def test_any_text_travels_both_ways(pair: ChildHost, text: str) -> None:
    assert said(ask(pair, [text, "say next"])) == [text[4:], "next"]


def test_its_answers_are_those_of_the_adapter_in_this_process() -> None:
    bare = EchoAdapter()
    series = Series(ds=("2024-01-01", "2024-01-02", "2024-01-03"), y=(1.0, 2.5, -1e-300))
    cases: list[tuple[str, Any, Any]] = [
        ("embed", ["a", "b é", "c"], EmbedParams()),
        ("forecast", [series, series], ForecastParams(horizon=2)),
    ]
    hosted = ChildHost("echo", LoadContext("echo", None, "", ("embed", "forecast")), 2, time_limit_s=60.0)
    try:
        for task, inputs, params in cases:
            expected = bare.forward(task, bare.prepare(task, inputs, params), params)  # type: ignore[arg-type]
            assert hosted.forward(task, hosted.prepare(task, inputs, params), params) == expected  # type: ignore[arg-type]
        assert hosted.example("forecast") == bare.example("forecast")
        assert hosted.prepare("forecast", [series], ForecastParams(horizon=7))[0].cost_tokens == 10  # type: ignore[union-attr]
    finally:
        hosted.close()


@given(st.lists(st.integers(1, 1000), max_size=60), st.integers(1, 8))
def test_shares_cover_the_batch_in_order_and_none_is_empty(costs: list[int], parts: int) -> None:
    shares = split(costs, parts)
    assert [index for share in shares for index in share] == list(range(len(costs)))
    assert len(shares) <= parts
    assert all(shares)
    # No share is heavier than its due by more than the items at its two ends.
    for share in shares:
        assert sum(costs[i] for i in share) <= sum(costs) / parts + max(costs)


def test_shares_are_balanced_by_cost() -> None:
    assert split([1, 1, 1, 1], 2) == [range(2), range(2, 4)]
    assert split([6, 1, 1, 1, 1, 1, 1], 2) == [range(1), range(1, 7)]
    assert split([5], 4) == [range(1)]


# ------------------------------------------------------------------------------------------- bad items


def test_a_bad_item_fails_alone_with_its_own_typed_error(pair: ChildHost) -> None:
    outcomes = ask(pair, ["say a", "refuse", "say b", "fail", "error why", "unsendable", "say c"])
    assert said(outcomes) == ["a", InvalidInput, "b", InferenceFailed, InvalidInput, InferenceFailed, "c"]
    assert "ValueError: it was told to fail" in str(outcomes[3])
    assert outcomes[4].details == {"argument": "why"}
    assert "cannot be sent" in str(outcomes[5])


@pytest.mark.parametrize("neighbours", [0, 1, 5])
def test_an_item_that_ends_its_process_fails_alone(pair: ChildHost, neighbours: int) -> None:
    texts = [f"say {number}" for number in range(neighbours)]
    outcomes = ask(pair, [*texts, "exit", *texts])
    assert said(outcomes) == [*map(str, range(neighbours)), InferenceFailed, *map(str, range(neighbours))]
    assert "killed its process" in str(outcomes[neighbours])
    assert "status 3" in str(outcomes[neighbours])
    assert said(ask(pair, ["say still there", "say both"])) == ["still there", "both"]


def test_an_item_over_whose_process_one_accident_came_is_answered(pair: ChildHost, tmp_path: Path) -> None:
    assert said(ask(pair, [f"exit-once {tmp_path / 'mark'}"])) == [str(tmp_path / "mark")]


def test_an_item_that_takes_too_long_fails_alone() -> None:
    hosted = host(2, time_limit_s=1.5)
    try:
        outcomes = ask(hosted, ["say a", "hang", "say b", "say c"])
        assert said(outcomes) == ["a", InferenceFailed, "b", "c"]
        assert "took longer than 1.5 s" in str(outcomes[1])
    finally:
        hosted.close()


def test_each_answer_of_a_child_and_each_that_is_lost_is_progress(pair: ChildHost) -> None:
    seen: list[float] = []
    collect = pair._collect

    def noting(*given: Any) -> CortexError | None:
        seen.append(pair.progressed_s)
        return collect(*given)

    pair._collect = noting  # type: ignore[method-assign]
    began_s = time.monotonic()
    assert said(ask(pair, ["say a", "exit", "say b", "say c"])) == ["a", InferenceFailed, "b", "c"]
    assert began_s <= seen[0] < seen[-1] <= time.monotonic()
    assert seen == sorted(seen)


def test_a_child_killed_in_mid_forward_loses_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    hosted = host(2)
    outcomes: list[Any] = []
    texts = ["say a", f"hang-once {mark}", "say b", "say c"]
    caller = threading.Thread(target=lambda: outcomes.extend(ask(hosted, texts)))
    try:
        caller.start()
        wait_until(lambda: mark.exists() and mark.read_text().endswith("\n"))
        child, grandchild = map(int, mark.read_text().split())
        os.kill(child, signal.SIGKILL)
        caller.join(60)
        assert said(outcomes) == ["a", str(mark), "b", "c"]
        assert gone(child)
        wait_until(lambda: gone(grandchild))
        assert len(hosted.pids) == 2
        assert child not in hosted.pids
    finally:
        hosted.close()


def test_a_child_killed_while_idle_is_replaced(pair: ChildHost) -> None:
    victim = pair.pids[0]
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: gone(victim))
    assert said(ask(pair, [f"say {number}" for number in range(8)])) == [str(number) for number in range(8)]
    assert victim not in pair.pids
    assert len(pair.pids) == 2


def test_ctrl_c_is_not_for_children() -> None:
    hosted = host()
    try:
        (pid,) = hosted.pids
        assert os.getpgid(pid) != os.getpgrp()
        os.kill(pid, signal.SIGINT)
        assert [outcome["pid"] for outcome in ask(hosted, ["say a", "say b"])] == [pid, pid]
    finally:
        hosted.close()


# ------------------------------------------------------------------------------------------------ limits


def test_a_child_over_its_share_of_memory_is_replaced_between_batches() -> None:
    hosted = host(1, share_bytes=200_000_000)
    try:
        (first,) = hosted.pids
        assert said(ask(hosted, ["grow 1000000"])) == ["1000000"]
        assert hosted.pids == (first,)
        assert said(ask(hosted, ["grow 300000000", "say after"])) == ["300000000", "after"]
        assert hosted.pids != (first,)
        assert gone(first)
        assert said(ask(hosted, ["say fresh"])) == ["fresh"]
    finally:
        hosted.close()


def test_the_children_of_a_worker_share_the_process_pool() -> None:
    fleet = fleet_of(m={"adapter": OBEDIENT, "tasks": ["annotate"], "children": 2})
    registry = registry_of(fleet)
    try:
        hosted = registry.load("m").adapter
        assert isinstance(hosted, ChildHost)
        assert hosted._share_bytes == fleet.memory_config.process_pool // 2
    finally:
        registry.close()


def test_a_share_too_small_for_the_model_itself_does_not_replace_it_for_ever(
    caplog: pytest.LogCaptureFixture,
) -> None:
    hosted = host(1, share_bytes=1_000_000)
    try:
        before = hosted.pids
        assert said(ask(hosted, ["say a"])) == ["a"]
        assert hosted.pids == before
        assert "more than its share" in caplog.text
    finally:
        hosted.close()


def test_children_compute_in_one_thread_and_know_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORTEX_BROKER_URL", "redis://:secret@127.0.0.1/0")
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    hosted = host()
    try:
        assert said(ask(hosted, ["env CORTEX_BROKER_URL", "env OMP_NUM_THREADS"])) == [None, "1"]
    finally:
        hosted.close()


# ----------------------------------------------------------------------------------------- start and end


@pytest.mark.parametrize(
    ("load", "expected"),
    [("refuse", "fetch them"), ("exit", "exited with status 7"), ("raise", "ValueError: a torn file")],
)
def test_what_loading_raises_arrives_typed(load: str, expected: str) -> None:
    with pytest.raises(ModelUnavailable, match=expected) as caught:
        ChildHost(OBEDIENT, context(load=load), 2, time_limit_s=5.0)
    if load == "refuse":
        assert caught.value.details == {"where": "nowhere"}


def test_loading_is_bounded() -> None:
    with pytest.raises(ModelUnavailable, match=r"took longer than 0\.3 s"):
        ChildHost(OBEDIENT, context(load="hang"), 1, time_limit_s=5.0, start_limit_s=0.3)


def test_wrong_configuration_is_told_as_such() -> None:
    with pytest.raises(ConfigError, match="unknown adapter 'ehco'; did you mean 'echo'"):
        ChildHost("ehco", context(), 1, time_limit_s=5.0)
    with pytest.raises(ConfigError, match="options"):
        ChildHost(OBEDIENT, context(when=object()), 1, time_limit_s=5.0)
    with pytest.raises(ConfigError, match="set 'children'"):
        ChildHost.load(context())


def test_close_leaves_no_process_and_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    hosted = host(2)
    assert len(list(tmp_path.iterdir())) == 2
    assert said(ask(hosted, ["env TMPDIR"]))[0].startswith(str(tmp_path))
    pids = hosted.pids
    hosted.close()
    hosted.close()
    assert all(map(gone, pids))
    assert hosted.pids == ()
    assert list(tmp_path.iterdir()) == []
    (outcome,) = ask(hosted, ["say too late"])
    assert isinstance(outcome, ModelUnavailable)
    assert "shutting down" in str(outcome)


def test_close_ends_a_child_that_does_not_want_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_process, "POLITE_S", 0.2)
    monkeypatch.setattr(child_process, "TERM_S", 0.2)
    hosted = ChildHost(adapter("StubbornAdapter"), context(), 1, time_limit_s=5.0)
    (pid,) = hosted.pids
    hosted.close()
    assert gone(pid)


def test_close_from_another_thread_ends_a_forward(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(child_process, "POLITE_S", 0.2)
    mark = tmp_path / "mark"
    hosted = host(1)
    outcomes: list[Any] = []
    caller = threading.Thread(target=lambda: outcomes.extend(ask(hosted, [f"hang-once {mark}", "say b"])))
    caller.start()
    wait_until(lambda: mark.exists() and mark.read_text().endswith("\n"))
    hosted.close()
    caller.join(30)
    assert said(outcomes) == [ModelUnavailable, ModelUnavailable]
    assert all(gone(int(pid)) for pid in mark.read_text().split()[:1])
    wait_until(lambda: gone(int(mark.read_text().split()[1])))


PARENT = """
import sys, threading
from cortex_tasks.payloads import AnnotateParams
from tests.support.child_adapters import adapter
from workers.adapters.base import Item, LoadContext
from workers.children import ChildHost

host = ChildHost(adapter("ObedientAdapter"), LoadContext("o", None, "", ("annotate",)), 2, time_limit_s=600.0)
print(*host.pids, flush=True)
host.forward("annotate", [Item(f"hang-once {sys.argv[1]}")], AnnotateParams())
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_children_do_not_outlive_their_parent(tmp_path: Path, number: signal.Signals) -> None:
    mark, scratch = tmp_path / "mark", tmp_path / "scratch"
    scratch.mkdir()
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(scratch)}
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(mark)], stdout=subprocess.PIPE, text=True, env=env)
    assert parent.stdout is not None
    try:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        wait_until(lambda: mark.exists() and mark.read_text().endswith("\n"))
        pids.append(int(mark.read_text().split()[1]))
    finally:
        parent.send_signal(number)
        parent.wait(30)
        parent.stdout.close()
    wait_until(lambda: all(map(gone, pids)))
    wait_until(lambda: not list(scratch.iterdir()))


def test_the_conversation_knows_no_pickle() -> None:
    for module in (children, child_main, child_process, child_protocol):
        tree = ast.parse(Path(str(module.__file__)).read_text())
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not {name.partition(".")[0] for name in names} & {"pickle", "marshal", "shelve", "multiprocessing"}
