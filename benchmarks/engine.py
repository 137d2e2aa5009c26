"""The raw engine: the worker's own adapter in a process without any queue, commanded by a benchmark.

What a program without a fleet reaches on the same cores: texts tokenised at once, sorted by length, cut into batches of
the size that proves the fastest here, with the threads that a worker would take, as calm and as well placed as there,
and with memory and garbage kept as there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, wraps
from itertools import islice
from typing import Any, Final

from benchmarks import texts
from benchmarks.processes import ROOT, serve
from benchmarks.stats import percentile
from benchmarks.trials import shares_of_fastest
from cortex_tasks.config import Batching, ModelConfig, load_fleet
from cortex_tasks.payloads import EmbedParams
from workers.adapters import Adapter, Item, LoadContext, adapter_class
from workers.placement import Placement
from workers.resources import bound_kernels, calm_openmp, device, keep_memory, spare_garbage, threads_for
from workers.store.sources import Snapshot, resolve

_ALIAS: Final = "minilm"
_TASK: Final = "embed"
_PARAMS: Final = EmbedParams()
#: Padded tokens of a batch that are tried; with the largest the model's limit of items is what ends most batches.
_BUDGETS: Final = (512, 1_024, 2_048, 4_096, 8_192, 16_384)
#: Texts of a trial, where there is time for them: several of the largest batches; and where there is not.
_TRIAL_TEXTS: Final = 640
_FEWEST_TEXTS: Final = 128
#: Texts of a trial for each second that all of them may take.
_TEXTS_A_SECOND: Final = 32
_KINDS: Final = {"short": texts.short, "varied": texts.varied}

calm_openmp()
bound_kernels()
keep_memory()
#: As a worker's: models load elsewhere, and its thread is placed while they compute.
_runner = ThreadPoolExecutor(1)
_placement = Placement()


@cache
def _config() -> ModelConfig:
    return load_fleet(os.environ.get("CORTEX_QUEUES_FILE") or ROOT / "queues.yaml").models[_ALIAS]


def _limits() -> Batching:
    return _config().batching.on(device())


@cache
def _snapshot() -> Snapshot:
    return resolve(_config().source, _config().revision, models_dir=None)


@cache
def _adapter() -> Adapter:
    config, snapshot = _config(), _snapshot()
    context = LoadContext(
        alias=_ALIAS,
        snapshot=snapshot.path,
        digest=snapshot.digest,
        tasks=config.tasks,
        options=config.options,
        threads=threads_for(None),
        device=device(),
        precision=config.precision,
        backend=config.backend,
    )
    return adapter_class(config.adapter).load(context)


@cache
def _encoder() -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(_snapshot().path), device=device())


def hello() -> dict[str, Any]:
    """Load and warm both; says where the weights are."""
    warm = list(islice(texts.varied(-1), 40))
    # A thread that ends: with a second set of compute threads, OpenMP hardly spins at all (7 -> 12 ms a pass).
    with ThreadPoolExecutor(1) as loader:
        loader.submit(_prepared, warm).result()
    _runner.submit(_run, warm, _BUDGETS[0]).result()
    _runner.submit(encode, seed=-2, count=8).result()
    spare_garbage()
    return {"threads": threads_for(None), "device": device(), "snapshot": str(_snapshot().path)}


def budget(*, seconds: float, apart: bool = False) -> dict[str, Any]:
    """The padded tokens of a batch that are the fastest for ``rate``, or for ``rate_apart``, and how all that were
    tried compare; on a GPU the largest that the model allows. ``seconds``: how long to try."""
    if device() != "cpu":
        return {"tokens": _limits().max_padded_tokens, "shares": {}}
    count = max(_FEWEST_TEXTS, min(_TRIAL_TEXTS, int(_TEXTS_A_SECOND * seconds)))

    def per_s(tokens: int, turn: int) -> float:
        command = rate_apart if apart else rate
        return float(command(seed=-3 - turn, count=count, budget_tokens=tokens)["per_s"])

    shares = shares_of_fastest(per_s, _BUDGETS, seconds)
    return {"tokens": max(shares, key=shares.__getitem__), "shares": shares}


def rate(*, seed: int, count: int, kind: str = "varied", budget_tokens: int | None = None) -> dict[str, Any]:
    """Texts a second over so many, and the median duration of a batch's forward pass. ``budget_tokens``: None for the
    largest batches that the model allows."""
    source = list(islice(_KINDS[kind](seed), count))
    began_s = time.perf_counter()
    batches_ms = _run(source, budget_tokens or _limits().max_padded_tokens)
    return {**_rate(count, began_s), "batch_ms": percentile(batches_ms, 50)}


def rate_apart(*, seed: int, count: int, budget_tokens: int) -> dict[str, Any]:
    """The same with a batch on each core at a time, each with its part of the budget, as a worker runs them where many
    texts wait; on one core, or a GPU, it is the same."""
    adapter, source = _adapter(), list(islice(texts.varied(seed), count))
    crew = adapter.crew
    began_s = time.perf_counter()
    if crew is None:
        _run(source, budget_tokens)
    else:

        def run(batch: list[Item]) -> None:
            adapter.finish(_TASK, batch, adapter.forward(_TASK, batch, _PARAMS), _PARAMS)

        items = sorted(_prepared(source), key=lambda item: item.cost_tokens)
        # The longest first: the last ones, which may leave a core idle, are short then.
        list(crew.executor.map(run, reversed(list(_batches(items, budget_tokens // crew.threads)))))
    return _rate(count, began_s)


def stages(*, seed: int, count: int, chunk: int) -> dict[str, Any]:
    """CPU microseconds a short text, on all threads of this process: to tokenise it, so many at a time, and what the
    adapter does around a batch as large as the model's limits allow."""
    adapter, source = _adapter(), list(islice(texts.short(seed), count))
    began_s = time.process_time()
    items = [item for first in range(0, count, chunk) for item in _prepared(source[first : first + chunk])]
    tokenised_s = time.process_time()
    for batch in _batches(sorted(items, key=lambda item: item.cost_tokens), _limits().max_padded_tokens):
        adapter.finish(_TASK, batch, adapter.forward(_TASK, batch, _PARAMS), _PARAMS)
    ended_s = time.process_time()
    return {
        "tokenise_cpu_us": (tokenised_s - began_s) * 1e6 / count,
        "around_cpu_us": (ended_s - tokenised_s) * 1e6 / count,
    }


def encode(*, seed: int, count: int) -> dict[str, Any]:
    """``SentenceTransformer.encode`` over the same texts, in its default batches."""
    source = list(islice(texts.varied(seed), count))
    encoder = _encoder()
    began_s = time.perf_counter()
    with _placement:
        encoder.encode(source)
    return _rate(count, began_s)


def _rate(count: int, began_s: float) -> dict[str, Any]:
    ended_s = time.perf_counter()
    return {"answers": count, "began_s": began_s, "ended_s": ended_s, "per_s": count / (ended_s - began_s)}


def forward_ms(*, seed: int, count: int) -> dict[str, Any]:
    """The milliseconds of the bare forward pass of each text by itself."""
    adapter = _adapter()
    items = _prepared(list(islice(texts.short(seed), count)))
    durations_ms = []
    for item in items:
        began_s = time.perf_counter()
        with _placement:
            adapter.forward(_TASK, [item], _PARAMS)
        durations_ms.append((time.perf_counter() - began_s) * 1e3)
    return {"durations_ms": durations_ms}


def _prepared(source: Sequence[str]) -> list[Item]:
    return [item for item in _adapter().prepare(_TASK, source, _PARAMS) if isinstance(item, Item)]


def _run(source: Sequence[str], budget_tokens: int) -> list[float]:
    """Prepare, forward and finish; returns each forward pass' milliseconds."""
    adapter = _adapter()
    durations_ms = []
    for batch in _batches(sorted(_prepared(source), key=lambda item: item.cost_tokens), budget_tokens):
        began_s = time.perf_counter()
        with _placement:
            raw = adapter.forward(_TASK, batch, _PARAMS)
        durations_ms.append((time.perf_counter() - began_s) * 1e3)
        adapter.finish(_TASK, batch, raw, _PARAMS)
    return durations_ms


def _batches(items: Sequence[Item], budget_tokens: int) -> Iterator[list[Item]]:
    """Items, shortest first, in batches of at most the model's items and so many padded tokens."""
    most = _limits().max_items
    batch: list[Item] = []
    for item in items:
        if batch and (len(batch) == most or (len(batch) + 1) * item.cost_tokens > budget_tokens):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def _by_runner(command: Callable[..., Mapping[str, Any]]) -> Callable[..., Mapping[str, Any]]:
    @wraps(command)
    def run(**arguments: Any) -> Mapping[str, Any]:
        return _runner.submit(command, **arguments).result()

    return run


if __name__ == "__main__":
    by_runner = {
        command.__name__: _by_runner(command) for command in (budget, rate, rate_apart, stages, encode, forward_ms)
    }
    serve(hello=hello, **by_runner)
