"""Search a file by meaning: python examples/semantic_search.py FILE "a question" (one text a line)."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from cortex_tasks import Cortex, CortexError


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    texts = [line for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines() if line.strip()]
    with Cortex() as cortex:
        found = [
            (text, item.vector)
            for text, item in zip(texts, cortex.map("embed", texts), strict=True)
            if not isinstance(item, CortexError)
        ]
        question = cortex.embed(sys.argv[2]).vector
    scores = np.stack([vector for _, vector in found]) @ question
    for index in np.argsort(-scores)[:3]:
        print(f"{scores[index]:.3f}  {found[index][0]}")


if __name__ == "__main__":
    main()
