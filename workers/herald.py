"""Tells clients which revisions answer: at once when a model is loaded, then again and again while it is served."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, Protocol

from workers.registry import Registry

__all__ = ["Herald"]

#: A revision that stays is confirmed this often.
_CONFIRM_S: Final = 2.0


class Activate(Protocol):
    def __call__(self, alias: str, revision: str, *, loaded: bool) -> bool: ...


class Herald:
    """Not thread-safe. ``activate`` says whether it could be told. ``clock``: monotonic seconds."""

    def __init__(self, registry: Registry, activate: Activate, clock: Callable[[], float] = time.monotonic) -> None:
        self._registry, self._activate, self._clock = registry, activate, clock
        self._told: dict[str, str] = {}
        self._confirmed_s = -_CONFIRM_S

    def turn(self) -> None:
        """Tell what is to be told now."""
        now_s = self._clock()
        confirm = now_s - self._confirmed_s >= _CONFIRM_S
        told = True
        for alias, model in self._registry.models.items():
            if model.state != "ready":
                continue
            revision = model.revision
            new = self._told.get(alias) != revision
            if new or confirm:
                if self._activate(alias, revision, loaded=new):
                    self._told[alias] = revision
                else:
                    told = False
        if confirm and told:
            self._confirmed_s = now_s
