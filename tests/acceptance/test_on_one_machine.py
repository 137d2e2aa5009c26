"""What the README's first commands do, with the real Procfile, the real models and the real Redis."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from tests.support.redis_server import free_port

pytestmark = [pytest.mark.fleet, pytest.mark.models, pytest.mark.timeout(600)]
CORTEX = str(Path(sys.executable).with_name("cortex"))
START_S = 180.0


class Family:
    """The environment for a process tree, and who of the tree is alive: its members carry a mark."""

    def __init__(self) -> None:
        self.mark = f"CORTEX_TEST_FAMILY={uuid4().hex}"
        name, _, value = self.mark.partition("=")
        self.env = {**os.environ, name: value, "CORTEX_BROKER_URL": f"redis://127.0.0.1:{free_port()}/0",
                    "CORTEX_FLOWER_PORT": str(free_port())}  # fmt: skip

    def members(self) -> dict[int, str]:
        """pid -> command line; zombies have neither environment nor command."""
        found = {}
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and self.mark.encode() in (entry / "environ").read_bytes():
                    found[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue
        return found


@pytest.fixture
def family() -> Iterator[Family]:
    one = Family()
    yield one
    for pid in one.members():
        os.kill(pid, signal.SIGKILL)


def cortex(family: Family, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([CORTEX, *arguments], env=family.env, capture_output=True, text=True, timeout=120)


def test_the_demo_shows_every_model_and_leaves_nothing(family: Family) -> None:
    done = subprocess.run([CORTEX, "demo"], env=family.env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    for shown in (
        "The cheetah is the fastest runner on land",
        "[9 November 1989 DATE]",
        "Fill the mask: distilbert",
        "What came was",
        "weekly    Mo",
        "3 anomalies in 1,095 points",
        "Flower: http://127.0.0.1:",
        "Every answer as expected; no process left behind.",
    ):
        assert shown in done.stdout
    assert done.stdout.count("forward") >= 8
    assert "\033" not in done.stdout
    assert family.members() == {}


def test_a_demo_that_is_told_to_stop_leaves_nothing(family: Family) -> None:
    demo = subprocess.Popen(
        [CORTEX, "demo"], env=family.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert demo.stdout is not None
    # Redis runs and the others start: the worst moment to stop.
    for line in demo.stdout:
        if "nlp" in line and "flower" in line:
            break
    assert len(family.members()) >= 5
    demo.send_signal(signal.SIGTERM)
    demo.communicate(timeout=60)
    assert demo.returncode == 128 + signal.SIGTERM
    assert family.members() == {}


def test_up_serves_jobs_until_ctrl_c(family: Family) -> None:
    up = subprocess.Popen(
        [CORTEX, "up"], env=family.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    until = time.monotonic() + START_S
    while True:
        status = cortex(family, "status", "--json")
        images = (
            [w["image"] for w in json.loads(status.stdout)["workers"] if w["state"] == "ready"] if status.stdout else []
        )
        if sorted(images) == ["ml", "nlp"]:
            break
        assert up.poll() is None
        assert time.monotonic() < until, status.stderr
        time.sleep(0.5)
    assert cortex(family, "status", "--check").returncode == 0
    embedded = cortex(family, "run", "embed", "A sentence.", "--json")
    assert embedded.returncode == 0, embedded.stderr
    assert len(json.loads(embedded.stdout)["value"]["vector"]) == 384
    models = {row["alias"]: row for row in json.loads(cortex(family, "models", "--json").stdout)}
    assert models["minilm"]["state"] == models["prophet"]["state"] == "ready"
    assert models["minilm"]["revision"]
    # As a terminal does it: to everyone in its foreground group.
    os.killpg(up.pid, signal.SIGINT)
    assert up.wait(60) == 130
    assert family.members() == {}
