"""Follows docs/adding-a-model.md to the letter: its files, its commands, in its order."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cortex_tasks.procfile import child_environment
from tests.support.markdown import ROOT, blocks
from tests.support.redis_server import free_port

pytestmark = pytest.mark.fleet

PAGE = ROOT / "docs" / "adding-a-model.md"
#: Commands of the page that stay: what the reader gives a terminal of their own.
STAYING = ("cortex redis", "celery ")
READY_S = 90.0


class Reader:
    """Someone with an empty directory and as many terminals as the page asks for."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.env = child_environment(os.environ) | {"CORTEX_BROKER_URL": f"redis://127.0.0.1:{free_port()}/0"}
        self.exports = ""
        self.staying: list[subprocess.Popen[bytes]] = []
        #: What each finished command showed.
        self.shown: dict[str, str] = {}

    def follow(self, text: str) -> None:
        if text.startswith("export "):
            self.exports += text
        elif text.startswith(STAYING):
            with (self.directory / "terminal.log").open("ab") as log:
                command = ["bash", "-c", f"{self.exports}exec {text}"]
                self.staying.append(
                    subprocess.Popen(
                        command, cwd=self.directory, env=self.env, stdout=log, stderr=log, start_new_session=True
                    )
                )
            self.wait_for("cortex status --check" if text.startswith("celery") else "cortex status")
        else:
            done = self.run(text)
            assert done.returncode == 0, f"{text}\n{done.stdout}{done.stderr}{self.log()}"
            self.shown[text.strip()] = done.stdout

    def run(self, text: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", self.exports + text], cwd=self.directory, env=self.env,
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip

    def wait_for(self, command: str) -> None:
        until = time.monotonic() + READY_S
        while self.run(command).returncode != 0:
            assert time.monotonic() < until, self.log()
            assert all(process.poll() is None for process in self.staying), self.log()
            time.sleep(0.1)

    def log(self) -> str:
        return (self.directory / "terminal.log").read_text(encoding="utf-8", errors="replace")

    def close(self) -> None:
        """Ctrl-C in each terminal, the last one first."""
        for process in reversed(self.staying):
            os.killpg(process.pid, signal.SIGINT)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    reader = Reader(tmp_path)
    yield reader
    reader.close()


def test_the_page_works_as_it_stands(reader: Reader) -> None:
    for block in blocks(PAGE):
        if block.language == "bash":
            reader.follow(block.text)
        else:
            assert block.file is not None, f"a block without a file's name: {block.text[:60]}"
            (reader.directory / block.file).write_text(block.text, encoding="utf-8")
    assert "1 models, 1 queues, 1 images: ok" in reader.shown["cortex config check"]
    called = next(shown for command, shown in reader.shown.items() if command.startswith("cortex run classify"))
    assert called.index("de") < called.index("en") if "en" in called else "de" in called
    answers = reader.shown["python ask.py"].splitlines()
    assert answers == ["en", "a text has no words", "fr"]
    assert "1 passed" in reader.shown["python -m pytest -q test_language.py"]
