"""A program that uses the fleet, for tests with many of them at once.

``python -m tests.support.echo_client REDIS_URL QUEUES_FILE NAME SINGLES`` says ``ready``, waits for a line, asks for
the embeddings of texts of its own in every way there is, and prints what it found as JSON. Exit code 1: an answer
was wrong.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cortex_tasks import Cortex, CortexError, Embedding, load_fleet
from cortex_tasks.echo import echo_vector

THREADS = 4
#: Others may want the same cores.
TIMEOUT_S = 150.0
LISTS = 5
LIST_INPUTS = 20
MAP_INPUTS = 256
MAP_CHUNK = 16


def wrong(texts: Iterable[str], answers: Iterable[Embedding | CortexError]) -> list[str]:
    """The texts whose answer is not their own."""
    return [
        text
        for text, answer in zip(texts, answers, strict=True)
        if not isinstance(answer, Embedding) or max(map(abs, answer.vector - echo_vector(text))) > 1e-6
    ]


def ask(cortex: Cortex, name: str, singles: int) -> tuple[int, list[str]]:
    """How many answers came, and the texts that got a wrong one. Single texts, lists and a map run side by side."""
    alone = [f"{name}: single text {n}" for n in range(singles)]
    lists = [[f"{name}: text {n} of list {which}" for n in range(LIST_INPUTS)] for which in range(LISTS)]
    mapped = [f"{name}: mapped text {n}" for n in range(MAP_INPUTS)]
    with ThreadPoolExecutor(THREADS + 2) as threads:
        listing = threads.submit(lambda: [list(cortex.embed(texts, model="echo")) for texts in lists])
        mapping = threads.submit(
            lambda: list(cortex.map("embed", iter(mapped), "echo", chunk=MAP_CHUNK, progress=False))
        )
        found = wrong(alone, threads.map(lambda text: cortex.embed(text, model="echo"), alone))
        for texts, answers in zip([*lists, mapped], [*listing.result(), mapping.result()], strict=True):
            found += wrong(texts, answers)
    return singles + LISTS * LIST_INPUTS + MAP_INPUTS, found


def main() -> int:
    url, queues_file, name, singles = sys.argv[1:]
    with Cortex(url, fleet=load_fleet(Path(queues_file)), timeout_s=TIMEOUT_S) as cortex:
        cortex.embed(f"{name}: the first", model="echo")
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        sys.stdin.readline()
        answers, crossed = ask(cortex, name, int(singles))
    sys.stdout.write(json.dumps({"answers": answers, "crossed": crossed}))
    return 1 if crossed else 0


if __name__ == "__main__":
    sys.exit(main())
