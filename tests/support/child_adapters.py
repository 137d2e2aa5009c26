"""Adapters for the tests of ``workers.children``: each text is a command that the child carries out."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from cortex_tasks.errors import CortexError, InvalidInput, ModelUnavailable
from cortex_tasks.payloads import AnnotateParams, Params
from workers.adapters.base import Adapter, Item, LoadContext, WireValue

__all__ = ["ObedientAdapter", "StubbornAdapter", "adapter", "spawn_sleeper"]

#: What hangs, hangs longer than any test waits.
FOREVER_S = 600


def adapter(name: str) -> str:
    """How ``adapter_class`` finds one of these."""
    return f"{__name__}:{name}"


def spawn_sleeper() -> int:
    """A process of the child's own, as Prophet's optimiser is one; its pid."""
    return os.spawnlp(os.P_NOWAIT, "sleep", "sleep", str(FOREVER_S))


class ObedientAdapter(Adapter):
    """Option ``load``: what happens at load ("refuse", "exit", "raise", "hang"). Commands: see ``_obey``."""

    version = "obedient-7"
    note = "does as it is told"

    def __init__(self) -> None:
        self._hoard: list[bytearray] = []

    @classmethod
    def load(cls, context: LoadContext) -> Self:
        match context.options.get("load"):
            case "refuse":
                raise ModelUnavailable("the weights are not there; fetch them", {"where": "nowhere"})
            case "exit":
                os._exit(7)
            case "raise":
                raise ValueError("a torn file")
            case "hang":
                time.sleep(FOREVER_S)
        return cls()

    @property
    def size_bytes(self) -> int:
        return 1

    @property
    def library(self) -> str:
        return "obedience 1.0"

    def example(self, task: str) -> tuple[Sequence[Any], Params]:
        return ["say hello"], AnnotateParams()

    def prepare(self, task: str, inputs: Sequence[Any], params: Params) -> list[Item | CortexError]:
        return [InvalidInput("refused") if text == "refuse" else Item(text) for text in inputs]

    def forward(self, task: str, items: Sequence[Item], params: Params) -> Sequence[WireValue | CortexError]:
        return [self._obey(*item.data.partition(" ")[::2]) for item in items]

    def _obey(self, command: str, argument: str) -> WireValue | CortexError:
        match command:
            case "exit":
                os._exit(3)
            case "exit-once":
                if not Path(argument).exists():
                    Path(argument).touch()
                    os._exit(3)
            case "fail":
                raise ValueError("it was told to fail")
            case "error":
                return InvalidInput("it gave an error back", {"argument": argument})
            case "hang":
                time.sleep(FOREVER_S)
            case "hang-once":
                # Says where it runs, then hangs; a second attempt finds the file and answers.
                if not Path(argument).exists():
                    Path(argument).write_text(f"{os.getpid()} {spawn_sleeper()}\n")
                    time.sleep(FOREVER_S)
            case "grow":
                self._hoard.append(bytearray(os.urandom(1) * int(argument)))
            case "unsendable":
                return {"value": object()}
            case "env":
                return {"said": os.environ.get(argument), "pid": os.getpid()}
        return {"said": argument, "pid": os.getpid()}


class StubbornAdapter(ObedientAdapter):
    """Does not end when it should: neither when asked nor at SIGTERM."""

    def close(self) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(FOREVER_S)
