"""The client is light: it loads nothing heavy, and costs no more than the libraries it stands on."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = (
    "torch", "transformers", "sentence_transformers", "spacy", "prophet", "numpy", "pandas", "tokenizers",
    "safetensors", "workers", "flower", "cmdstanpy", "sklearn", "scipy",
)  # fmt: skip
IMPORTS = (
    "import cortex_tasks",
    "from cortex_tasks import Cortex, AsyncCortex",
    "import cortex_tasks; [getattr(cortex_tasks, name) for name in cortex_tasks.__all__]",
    "from cortex_tasks.tasks import embed",
    "import cortex_tasks.testing",
    "from cortex_tasks import Cortex; Cortex()",
)


def fresh(code: str) -> str:
    """What code prints in an interpreter of its own."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("statement", IMPORTS)
def test_nothing_heavy_is_loaded(statement: str) -> None:
    code = f"{statement}\nimport sys, json; print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    assert json.loads(fresh(code)) == []


def test_a_bare_import_loads_none_of_its_own_libraries_either() -> None:
    code = "import cortex_tasks, sys; print([m for m in ('celery', 'kombu', 'redis', 'pydantic') if m in sys.modules])"
    assert fresh(code).strip() == "[]"


def test_text_calls_never_load_numpy() -> None:
    code = (
        "import sys\nfrom cortex_tasks import testing\n"
        "with testing.fleet() as fleet:\n"
        "    fleet.client().embed(['a', 'b']); fleet.client().annotate('A b')\n"
        "print('numpy' in sys.modules)"
    )
    assert fresh(code).strip() == "False"


def cost_s(statement: str) -> float:
    """CPU seconds of one import in a fresh interpreter."""
    return float(fresh(f"import time; t = time.process_time()\n{statement}\nprint(time.process_time() - t)"))


def test_the_clients_cost_little_more_to_import_than_what_they_stand_on() -> None:
    """CPU time, the best of interleaved runs, as a ratio: the machine's speed and load cancel out."""
    base, bare, clients = [], [], []
    for _ in range(5):
        base.append(cost_s("import celery, redis, pydantic; celery.Celery"))
        bare.append(cost_s("import cortex_tasks"))
        clients.append(cost_s("from cortex_tasks import Cortex, AsyncCortex"))
    assert min(bare) <= 0.25 * min(base)
    assert min(clients) <= 2.0 * min(base)
