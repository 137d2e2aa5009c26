"""Enrich events as they come, from asyncio: lines on stdin, one JSON object with entities a line on stdout."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator

from cortex_tasks import AsyncCortex, CortexError


async def lines(seen: list[str]) -> AsyncIterator[str]:
    """Stdin without blocking the loop; what was handed out is remembered for its answer."""
    while line := await asyncio.to_thread(sys.stdin.readline):
        if text := line.strip():
            seen.append(text)
            yield text


async def main() -> None:
    waiting: list[str] = []
    async with AsyncCortex() as cortex:
        async for answer in cortex.map("annotate", lines(waiting), lane="interactive", include=["entities"]):
            text = waiting.pop(0)
            if isinstance(answer, CortexError):
                print(json.dumps({"text": text, "error": str(answer)}), flush=True)
            else:
                entities = [[entity.text, entity.label] for entity in answer.entities]
                print(json.dumps({"text": text, "entities": entities}), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
