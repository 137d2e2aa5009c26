"""Batches in parts: how they are cut, that the answers are the same, and what a failed part leaves behind."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import BertConfig, BertModel

from workers.engines import side_by_side
from workers.engines.onednn import use_onednn
from workers.engines.side_by_side import SideBySide, cut
from workers.engines.torch import TorchEngine

ROOT = Path(__file__).resolve().parents[4]

#: Costs of rows, and a number of parts that is not greater.
rows_and_parts = st.lists(st.floats(1, 1e4), min_size=1, max_size=100).flatmap(
    lambda costs: st.tuples(st.just(costs), st.integers(1, len(costs)))
)


@given(rows_and_parts)
def test_every_row_is_in_one_part_and_no_part_is_empty(given_: tuple[list[float], int]) -> None:
    costs, parts = given_
    slices = cut(costs, parts)
    assert len(slices) == parts
    assert slices[0].start == 0
    assert slices[-1].stop == len(costs)
    assert all(one.stop == after.start for one, after in pairwise(slices))
    assert all(part.start < part.stop for part in slices)


@given(rows_and_parts)
def test_parts_differ_from_the_mean_by_less_than_two_rows(given_: tuple[list[float], int]) -> None:
    costs, parts = given_
    mean, most = sum(costs) / parts, max(costs)
    assert all(sum(costs[part]) <= mean + 2 * most + 1e-6 for part in cut(costs, parts))


@pytest.mark.parametrize(
    ("lengths", "parts"),
    [
        ([500], 1),  # one row is for all threads
        ([20, 20, 20], 1),  # too little for two
        ([10, 10, 200], 1),  # one part would wait for the other
        ([64, 64], 2),
        ([10, 20, 30, 70], 2),
    ],
)
def test_small_and_unequal_batches_stay_whole(lengths: list[int], parts: int) -> None:
    assert len(SideBySide(2, 1 / 1536).parts(lengths)) == parts


@given(st.lists(st.integers(1, 512), min_size=1, max_size=64), st.integers(1, 8))
def test_no_part_is_much_costlier_than_the_mean(lengths: list[int], threads: int) -> None:
    parts = SideBySide(threads, 0).parts(lengths)
    assert [length for part in parts for length in lengths[part]] == lengths
    assert len(parts) in (1, threads)
    assert len(parts) == 1 or max(sum(lengths[part]) for part in parts) <= 1.2 * sum(lengths) / threads + 1e-6


def test_each_part_computes_with_one_thread_in_the_callers_mode_and_the_others_keep_theirs() -> None:
    seen: list[tuple[int, int, bool]] = []
    together = threading.Barrier(3)

    def note(_: int) -> None:
        together.wait(10)
        seen.append((threading.get_ident(), torch.get_num_threads(), torch.is_inference_mode_enabled()))

    before = torch.get_num_threads()
    with torch.inference_mode():
        torch.set_num_threads(3)
        try:
            SideBySide(3, 0).run(note, range(3))
            later: list[int] = []
            thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
            thread.start()
            thread.join()
            assert torch.get_num_threads() == 3
            assert later == [3]
        finally:
            torch.set_num_threads(before)
    assert len({ident for ident, _, _ in seen}) == 3
    assert threading.get_ident() not in {ident for ident, _, _ in seen}
    assert {(threads, mode) for _, threads, mode in seen} == {(1, True)}


def test_on_a_thread_of_the_crew_a_batch_is_whole() -> None:
    side = SideBySide(2, 1 / 1536)
    crew = side.crew
    assert crew is not None
    assert crew.threads == 2
    together = threading.Barrier(2)

    def parts(_: int) -> tuple[str, int, int]:
        together.wait(10)
        return threading.current_thread().name, torch.get_num_threads(), len(side.parts([64, 64]))

    assert set(crew.executor.map(parts, range(2))) == {("part_0", 1, 1), ("part_1", 1, 1)}
    assert len(side.parts([64, 64])) == 2
    assert SideBySide(1, 0).crew is None


def test_models_that_are_loaded_side_by_side_have_the_same_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    both = threading.Barrier(2)

    class Meeting(ThreadPoolExecutor):
        def __init__(self, *given: Any, **more: Any) -> None:
            with suppress(threading.BrokenBarrierError):
                both.wait(0.2)
            super().__init__(*given, **more)

    monkeypatch.setattr(side_by_side, "ThreadPoolExecutor", Meeting)
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(2) as loaders:
            # No other test has so many.
            one, other = loaders.map(lambda _: SideBySide(9, 0).crew, range(2))
    finally:
        torch.set_num_threads(before)
    assert one is not None
    assert one == other
    one.executor.shutdown()


def test_a_part_that_fails_is_told_when_the_others_are_through() -> None:
    through: list[int] = []
    failed = threading.Event()

    def compute(part: int) -> None:
        if part == 0:
            failed.set()
            raise MemoryError("no room")
        assert failed.wait(10)
        through.append(part)

    side = SideBySide(2, 0)
    with pytest.raises(MemoryError, match="no room"):
        side.run(compute, [0, 1])
    assert through == [1]
    side.run(through.append, [2, 3])
    assert sorted(through) == [1, 2, 3]


@pytest.mark.models
@pytest.mark.parametrize("lengths", [[5, 9, 20, 30, 30, 33], [33, 30, 30, 20, 9, 5]])
def test_in_parts_a_model_answers_as_whole(lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(7)
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=40, initializer_range=0.3,
    )  # fmt: skip
    model = BertModel(config).eval().requires_grad_(False)
    use_onednn(model)
    shape = (len(lengths), max(lengths))
    mask = (torch.arange(shape[1])[None] < torch.tensor(lengths)[:, None]).long()
    features = {"input_ids": torch.randint(0, 50, shape), "attention_mask": mask, "modality": "text"}

    class Transformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

    def states(threads: int) -> tuple[torch.Tensor, int]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        parts: list[slice] = []
        run = SideBySide.run
        monkeypatch.setattr(SideBySide, "run", lambda self, compute, cut: (parts.extend(cut), run(self, compute, cut)))
        try:
            with torch.inference_mode():
                return TorchEngine(Transformer(), "token_embeddings", "fp32", threads).encode(features), len(parts)
        finally:
            torch.set_num_threads(before)
            monkeypatch.setattr(SideBySide, "run", run)

    monkeypatch.setattr(side_by_side, "_LEAST_TOKENS", 16)
    (whole, none), (in_parts, two) = states(1), states(2)
    assert (none, two) == (0, 2)
    torch.testing.assert_close(in_parts, whole, atol=2e-5, rtol=1e-5)
    assert not in_parts[mask == 0].any()


def test_threads_that_come_later_begin_with_the_process_setting() -> None:
    """In a process of its own, where nothing has used the threads before: each must start before the setting is
    restored, or the one that starts late would set all to one thread."""
    program = """
import threading, torch
torch.set_num_threads(4)
from workers.engines.side_by_side import SideBySide
side = SideBySide(4, 0)
for _ in range(50):
    side.run(lambda part: None, range(4))
found = []
thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
thread.start(); thread.join()
print(found[0])
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["4"]
