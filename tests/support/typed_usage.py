"""Ordinary use of the clients, for the type checker; nothing here is run."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from datetime import datetime
from typing import Any, assert_type

import numpy as np
from numpy.typing import NDArray

from cortex_tasks import (
    Anomalies,
    AsyncCortex,
    AsyncJob,
    Classification,
    Cortex,
    CortexError,
    Decomposition,
    Document,
    Embedding,
    Features,
    FilledMask,
    Forecast,
    Job,
    JobResult,
    Series,
)

SERIES = Series(ds=("2024-01-01", "2024-01-02"), y=(1.0, 2.0))


def texts(cortex: Cortex) -> None:
    assert_type(cortex.embed("a"), Embedding)
    assert_type(cortex.embed("a").vector, NDArray[np.float32])
    assert_type(cortex.embed(["a", "b"], model="minilm", lane="bulk", normalize=False), JobResult[Embedding])
    assert_type(cortex.embed(("a",))[0], Embedding | CortexError)
    assert_type(cortex.embed(["a"]).values(), tuple[Embedding, ...])
    assert_type(cortex.annotate("a", include=("entities",)), Document)
    assert_type(cortex.classify(["a"], top_k=2), JobResult[Classification])
    assert_type(cortex.zero_shot("a", ["x", "y"], multi_label=True), Classification)
    assert_type(cortex.zero_shot(["a"], ("x",)), JobResult[Classification])
    assert_type(cortex.fill_mask("a [MASK]"), FilledMask)
    assert_type(cortex.features("a", pooling="mean"), Features)
    assert_type(cortex.embed("a", dimensions=64, encoding="int8").vector, NDArray[np.float32])
    assert_type(cortex.embed("a").codes, NDArray[Any])
    cortex.embed("a", encoding="int4")  # type: ignore[call-overload]
    cortex.embed("a", normalise=True)  # type: ignore[call-overload]
    cortex.embed(7)  # type: ignore[call-overload]
    cortex.features("a", pooling="max")  # type: ignore[call-overload]


def series(cortex: Cortex) -> None:
    assert_type(cortex.forecast(SERIES, horizon=3), Forecast)
    assert_type(cortex.forecast({"ds": ["2024-01-01"], "y": [1]}), Forecast)
    assert_type(cortex.forecast([("2024-01-01", 1.0), ("2024-01-02", 2.0)]), Forecast)
    assert_type(cortex.forecast([(datetime(2024, 1, 1), 1.0)]), Forecast)
    assert_type(cortex.forecast([SERIES, SERIES]), JobResult[Forecast])
    assert_type(cortex.decompose(SERIES, growth="flat"), Decomposition)
    assert_type(cortex.detect_anomalies([SERIES], interval_width=0.9), JobResult[Anomalies])


def jobs(cortex: Cortex) -> None:
    assert_type(cortex.submit("embed", ["a"], "minilm", deadline_s=5), Job[Any])
    assert_type(cortex.map("embed", (str(n) for n in range(9))), Iterator[Any | CortexError])


async def coroutines(cortex: AsyncCortex) -> None:
    assert_type(await cortex.embed("a"), Embedding)
    assert_type(await cortex.embed(["a"]), JobResult[Embedding])
    assert_type(await cortex.forecast(SERIES), Forecast)
    assert_type(await cortex.submit("embed", "a"), AsyncJob[Any])
    assert_type(cortex.map("embed", ["a"]), AsyncIterator[Any | CortexError])
