"""``Cortex`` and ``AsyncCortex`` behind one face, for suites that run over both, and over what a client switches."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from cortex_tasks import AsyncCortex, Cortex, CortexError
from cortex_tasks.config import FleetConfig
from cortex_tasks.settings import Settings

#: What a client's settings switch back to stock.
SWITCHES: dict[str, dict[str, str]] = {
    "cortex": {},
    "stock-publish": {"publish": "stock"},
    "stock-replies": {"replies": "stock"},
    "all-stock": {"publish": "stock", "replies": "stock"},
}
KINDS = ("sync", "async")
#: Every client: "sync-cortex", "async-stock-publish", ...
CLIENTS = [f"{kind}-{switch}" for kind in KINDS for switch in SWITCHES]


class AnyClient(Protocol):
    """Embeddings, of whatever client. ``options`` are the verbs'."""

    def embed(self, inputs: Any, **options: Any) -> Any: ...
    def embed_at_once(self, texts: Sequence[str], **options: Any) -> list[Any]:
        """One call a text, all at the same moment."""

    def map(self, texts: Iterable[str], **options: Any) -> list[Any]: ...
    def submit(self, inputs: Any, **options: Any) -> Any:
        """The job."""

    def submit_at_once(self, texts: Sequence[str], **options: Any) -> list[Any]:
        """A job a text; an error where one was refused."""

    def result(self, job: Any) -> Any: ...
    def close(self) -> None: ...


def any_client(name: str, url: str, fleet: FleetConfig, timeout_s: float = 30.0) -> AnyClient:
    """``name``: one of CLIENTS."""
    kind, _, switch = name.partition("-")
    settings = Settings.model_validate({"broker_url": url, **SWITCHES[switch]})
    if kind == "sync":
        return _Threads(Cortex(settings=settings, fleet=fleet, timeout_s=timeout_s))
    return _Loop(AsyncCortex(settings=settings, fleet=fleet, timeout_s=timeout_s))


class _Threads:
    def __init__(self, client: Cortex) -> None:
        self._client = client

    def embed(self, inputs: Any, **options: Any) -> Any:
        return self._client.embed(inputs, **options)

    def embed_at_once(self, texts: Sequence[str], **options: Any) -> list[Any]:
        with ThreadPoolExecutor(len(texts)) as threads:
            return list(threads.map(lambda text: self._client.embed(text, **options), texts))

    def map(self, texts: Iterable[str], **options: Any) -> list[Any]:
        return list(self._client.map("embed", texts, progress=False, **options))

    def submit(self, inputs: Any, **options: Any) -> Any:
        return self._client.submit("embed", inputs, **options)

    def submit_at_once(self, texts: Sequence[str], **options: Any) -> list[Any]:
        def one(text: str) -> Any:
            try:
                return self.submit(text, **options)
            except CortexError as error:
                return error

        with ThreadPoolExecutor(len(texts)) as threads:
            return list(threads.map(one, texts))

    def result(self, job: Any) -> Any:
        return job.result()

    def close(self) -> None:
        self._client.close()


class _Loop:
    def __init__(self, client: AsyncCortex) -> None:
        self._client = client
        self._runner = asyncio.Runner()
        self._run = self._runner.run

    def embed(self, inputs: Any, **options: Any) -> Any:
        return self._run(self._client.embed(inputs, **options))

    def embed_at_once(self, texts: Sequence[str], **options: Any) -> list[Any]:
        async def all_of_them() -> list[Any]:
            return await asyncio.gather(*(self._client.embed(text, **options) for text in texts))

        return self._run(all_of_them())

    def map(self, texts: Iterable[str], **options: Any) -> list[Any]:
        async def all_of_them() -> list[Any]:
            return [item async for item in self._client.map("embed", texts, progress=False, **options)]

        return self._run(all_of_them())

    def submit(self, inputs: Any, **options: Any) -> Any:
        return self._run(self._client.submit("embed", inputs, **options))

    def submit_at_once(self, texts: Sequence[str], **options: Any) -> list[Any]:
        async def all_of_them() -> list[Any]:
            jobs = (self._client.submit("embed", text, **options) for text in texts)
            return await asyncio.gather(*jobs, return_exceptions=True)

        return self._run(all_of_them())

    def result(self, job: Any) -> Any:
        return self._run(job.result())

    def close(self) -> None:
        self._run(self._client.aclose())
        self._runner.close()
