"""The source of an ``AsyncCortex.map``, read ahead."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from cortex_tasks.client.map import Window

__all__ = ["Inlet"]

#: A source that does not end when it is cancelled is cancelled anew after this.
_CANCEL_AGAIN_S: Final = 0.05


class Inlet:
    """A source, read ahead by a task of its own, so that a slow one delays no answer."""

    def __init__(self, inputs: Iterable[Any] | AsyncIterable[Any], ahead: int) -> None:
        source = inputs if isinstance(inputs, AsyncIterable) else _aiter(inputs)
        self._ahead = ahead
        self._buffer: deque[Any] = deque()
        self._ended = False
        self._error: BaseException | None = None
        self._room = asyncio.Event()
        self._closing = False
        #: Set while there is something to take, the source's end included.
        self.ready = asyncio.Event()
        self._task = asyncio.create_task(self._read(source), name="cortex-map-source")

    async def _read(self, source: AsyncIterable[Any]) -> None:
        try:
            async for value in source:
                self._buffer.append(value)
                self.ready.set()
                if self._closing:
                    return
                if len(self._buffer) >= self._ahead:
                    self._room.clear()
                    await self._room.wait()
        except (Exception, asyncio.CancelledError) as error:
            # The source's own error (it may have been cancelled itself): whoever reads the stream gets it.
            self._error = error
        finally:
            self._ended = True
            self.ready.set()

    def fill(self, flow: Window[Any]) -> None:
        """Give the window what is there, as far as it wants it; the source's own error last."""
        while flow.wants() and (self._buffer or self._ended):
            if not self._buffer:
                flow.source_error = self._error
            flow.add(flow.take(self._taken()))
        if len(self._buffer) < self._ahead:
            self._room.set()
        if not self._buffer and not self._ended:
            self.ready.clear()

    def _taken(self) -> Iterator[Any]:
        while self._buffer:
            yield self._buffer.popleft()

    async def close(self) -> None:
        self._closing = True
        while not self._task.done():
            # Again and again: ``asyncio.wait_for`` of Python 3.11, which many a source uses, may swallow one.
            self._task.cancel()
            await asyncio.wait({self._task}, timeout=_CANCEL_AGAIN_S)


async def _aiter(inputs: Iterable[Any]) -> AsyncIterator[Any]:
    for count, value in enumerate(inputs, 1):
        yield value
        if count % 64 == 0:
            await asyncio.sleep(0)
