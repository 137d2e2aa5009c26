"""The load: clients of a fleet in a process of their own, commanded by a benchmark (see ``processes.Peer``).

CPU times and rates are taken here, at the edges of what is measured. ``sessions`` names the processes whose CPU time
counts; this one's is added as ``client``.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, Final

from benchmarks import texts
from benchmarks.cpu import cpu_s
from benchmarks.processes import serve
from cortex_tasks import AsyncCortex, Cortex

#: Nothing that is measured takes as long; what does has gone wrong.
_TIMEOUT_S: Final = 120.0
#: What a worker says of an answer.
_TIMINGS: Final = ("queue_ms", "prepare_ms", "forward_ms", "finish_ms", "batch_items")
_KINDS: Final = {"short": texts.short, "varied": texts.varied}


class _Span:
    """The part of a run that counts: answers, wall-clock and CPU seconds."""

    def __init__(self, sessions: Mapping[str, int]) -> None:
        self._sessions = {**sessions, "client": os.getpid()}
        self.answers = 0

    def begin(self) -> None:
        self.answers = 0
        self._cpu_s, self._began_s = cpu_s(self._sessions), time.perf_counter()

    def end(self) -> dict[str, Any]:
        ended_s, answers = time.perf_counter(), self.answers
        after = cpu_s(self._sessions)
        return {
            "answers": answers,
            "began_s": self._began_s,
            "ended_s": ended_s,
            "per_s": answers / (ended_s - self._began_s),
            "cpu_us": {name: (after[name] - self._cpu_s[name]) * 1e6 / max(1, answers) for name in after},
        }


def hello() -> dict[str, Any]:
    """Answered once everything is imported."""
    return {"pid": os.getpid()}


def singles(
    *, model: str, kind: str, seed: int, in_flight: int, warm_s: float, seconds: float, sessions: Mapping[str, int]
) -> dict[str, Any]:
    """Independent calls of one text each, ``in_flight`` of them at any time, from one event loop."""
    return asyncio.run(_singles(model, _KINDS[kind](seed), in_flight, warm_s, seconds, _Span(sessions)))


async def _singles(
    model: str, source: Iterator[str], in_flight: int, warm_s: float, seconds: float, span: _Span
) -> dict[str, Any]:
    over = False

    async def one_after_the_other(cortex: AsyncCortex) -> None:
        for text in source:
            await cortex.embed(text, model=model, cache="off")
            span.answers += 1
            if over:
                return

    async with AsyncCortex(timeout_s=_TIMEOUT_S) as cortex, asyncio.TaskGroup() as group:
        for _ in range(in_flight):
            group.create_task(one_after_the_other(cortex))
        await asyncio.sleep(warm_s)
        span.begin()
        await asyncio.sleep(seconds)
        # However short the run, each loop's text counts once.
        while span.answers < in_flight:
            await asyncio.sleep(0.01)
        found = span.end()
        over = True
    return found


def stream(
    *, model: str, kind: str, seed: int, count: int, chunk: int | None, window: int | None, sessions: Mapping[str, int]
) -> dict[str, Any]:
    """``Cortex.map`` over so many texts, from the first submission to the last answer."""
    span = _Span(sessions)
    with Cortex(timeout_s=_TIMEOUT_S) as cortex:
        source = islice(_KINDS[kind](seed), count)
        span.begin()
        for _ in cortex.map("embed", source, model, chunk=chunk, window=window, cache="off", errors="raise"):
            span.answers += 1
        return span.end()


def saturate(*, model: str, seed: int) -> dict[str, Any]:
    """A bulk ``map`` that never runs out of texts: until this process is stopped."""
    with Cortex(timeout_s=_TIMEOUT_S) as cortex:
        for _ in cortex.map("embed", texts.varied(seed), model, cache="off", errors="raise"):
            pass
    raise RuntimeError("the texts ran out")


def first(*, model: str) -> dict[str, Any]:
    """One text, for which a worker need not be there yet; when (epoch seconds) it was answered."""
    with Cortex(timeout_s=_TIMEOUT_S) as cortex:
        cortex.embed("The first text of a new worker.", model=model, cache="off")
        return {"answered_at": time.time()}


def one_by_one(*, model: str, kind: str, seed: int, count: int) -> dict[str, Any]:
    """One text at a time: the milliseconds of each call."""
    return {"latencies_ms": asyncio.run(_one_by_one(model, islice(_KINDS[kind](seed), count)))}


async def _one_by_one(model: str, source: Iterable[str]) -> list[float]:
    latencies_ms = []
    async with AsyncCortex(timeout_s=_TIMEOUT_S) as cortex:
        # Connects, subscribes, and finds the worker awake.
        for text in islice(texts.short(-1), 5):
            await cortex.embed(text, model=model, cache="off")
        for text in source:
            began_s = time.perf_counter()
            await cortex.embed(text, model=model, cache="off")
            latencies_ms.append((time.perf_counter() - began_s) * 1e3)
    return latencies_ms


class _Turns:
    """A client that stays open from one command to the next, for texts asked in turns with something else."""

    def begin(self, *, model: str) -> dict[str, Any]:
        self._model, self._loop = model, asyncio.Runner()
        self._loop.run(self._open())
        return {}

    async def _open(self) -> None:
        self._cortex = AsyncCortex(timeout_s=_TIMEOUT_S)
        # Connects, subscribes, and finds the worker awake.
        for text in islice(texts.short(-1), 5):
            await self._cortex.embed(text, model=self._model, cache="off")

    def ask(self, *, kind: str, seed: int) -> dict[str, Any]:
        """The milliseconds of one text."""
        return {"latency_ms": self._loop.run(self._ask(next(_KINDS[kind](seed))))}

    async def _ask(self, text: str) -> float:
        began_s = time.perf_counter()
        await self._cortex.embed(text, model=self._model, cache="off")
        return (time.perf_counter() - began_s) * 1e3

    def end(self) -> dict[str, Any]:
        self._loop.run(self._cortex.aclose())
        self._loop.close()
        return {}


def arrivals(*, model: str, seed: int, rate_per_s: float, seconds: float) -> dict[str, Any]:
    """Single texts that arrive as they would from many strangers (Poisson), whether or not answers keep up.

    A call's milliseconds count from when it was due to arrive, so that a stall is charged to all it delayed. Of each
    answer, in the order in which they came, also when it did (epoch seconds) and the worker's timings.
    """
    random_s = random.Random(seed).expovariate
    due_s: list[float] = []
    at_s = random_s(rate_per_s)
    while at_s < seconds or not due_s:
        due_s.append(at_s)
        at_s += random_s(rate_per_s)
    return {"answers": asyncio.run(_arrivals(model, texts.varied(seed), due_s))}


async def _arrivals(model: str, source: Iterator[str], due_s: list[float]) -> list[dict[str, float]]:
    answers = []

    async def call(cortex: AsyncCortex, text: str, due_s: float) -> None:
        found = (await cortex.embed(text, model=model, cache="off")).timings
        latency_ms, answered_at = (time.perf_counter() - due_s) * 1e3, time.time()
        stages = {name: getattr(found, name) for name in _TIMINGS}
        answers.append({"latency_ms": latency_ms, "answered_at": answered_at, **stages})

    async with AsyncCortex(timeout_s=_TIMEOUT_S) as cortex:
        await cortex.embed("The first call also connects.", model=model, cache="off")
        began_s = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for text, at_s in zip(source, due_s, strict=False):
                await asyncio.sleep(max(0.0, began_s + at_s - time.perf_counter()))
                group.create_task(call(cortex, text, began_s + at_s))
    return answers


if __name__ == "__main__":
    turns = _Turns()
    serve(
        begin_turns=turns.begin,
        one_turn=turns.ask,
        end_turns=turns.end,
        hello=hello,
        first=first,
        singles=singles,
        stream=stream,
        saturate=saturate,
        one_by_one=one_by_one,
        arrivals=arrivals,
    )
