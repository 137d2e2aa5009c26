"""Models in memory as threads see them: held while they are used, let go when room is needed or nobody comes.

``store.residency`` decides; this keeps the decisions apart from the uses. Between a load and its first use a model is
held already, so that nobody can throw it out in between.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Final

from cortex_tasks.errors import ModelUnavailable
from workers.store.residency import Residency, Resident

__all__ = ["Memory"]

#: A newcomer waits so long for models with jobs of their own; then one of them has to go when its batch ends, and no
#: later newcomer takes its room.
PATIENCE_S: Final = 5.0
#: A load whose turn it is, and that found no room for so long, fails; its jobs may be tried again.
LIMIT_S: Final = 120.0


class Memory:
    """Any thread may ask. ``let_go`` closes a model; it is called without a lock, once nobody holds the model."""

    def __init__(
        self,
        budget_bytes: int,
        idle_ttl_s: float,
        let_go: Callable[[str], None],
        clock: Callable[[], float],
        *,
        patience_s: float = PATIENCE_S,
        limit_s: float = LIMIT_S,
    ) -> None:
        self._residency = Residency(budget_bytes, idle_ttl_s)
        self._let_go = let_go
        self._clock = clock
        self._patience_s = patience_s
        self._limit_s = limit_s
        self._waiting: dict[str, float] = {}
        #: Newcomers without a place, in the order they came, with the time they did.
        self._newcomers: dict[str, float] = {}
        #: Since when the first of them is the first.
        self._turn_s = 0.0
        self._closing: set[str] = set()
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)

    @property
    def budget_bytes(self) -> int:
        return self._residency.budget_bytes

    @property
    def used_bytes(self) -> int:
        with self._changed:
            return self._residency.used_bytes

    # --------------------------------------------------------------------------------------------- use

    def hold(self, alias: str, count: int = 1) -> bool:
        """Use a model that is in memory; False when it is not, or is about to leave."""
        with self._lock:
            resident = self._residency.residents.get(alias)
            if resident is None or resident.leaving:
                return False
            resident.holds += count
            return True

    def stays(self, alias: str) -> bool:
        """Whether a model is in memory and not about to leave."""
        with self._changed:
            return alias in self._residency.residents and not self._leaving(alias)

    def hold_more(self, alias: str, count: int) -> None:
        """The same by one who holds it already, even while it is about to leave."""
        with self._lock:
            if (resident := self._residency.residents.get(alias)) is not None:
                resident.holds += count

    def release(self, alias: str, count: int = 1) -> None:
        """As many uses have ended."""
        with self._lock:
            resident = self._residency.residents.get(alias)
            if resident is None:
                return
            resident.holds = max(0, resident.holds - count)
            # The jobs that it was loaded for are in line by now, each with a hold of its own.
            resident.arriving = False
            resident.used_at_s = self._clock()
            leaves = resident.leaving and resident.holds == 0
            if leaves:
                self._take_out([resident])
            elif resident.holds == 0:
                self._changed.notify_all()
        if leaves:
            self._close([alias])

    def note_waiting(self, jobs: Mapping[str, float]) -> None:
        """How many jobs wait for each model, in the queues as in here."""
        with self._changed:
            self._waiting = dict(jobs)
            for alias, resident in self._residency.residents.items():
                resident.waiting = self._waiting.get(alias, 0.0)

    # ------------------------------------------------------------------------------------ come and go

    def enter(self, alias: str, size_bytes: int, *, pinned: bool, reload_s: float) -> None:
        """Take a place for a model that is about to be loaded; it is held. Blocks while there is none.

        Raises ModelUnavailable when it cannot fit, or found no room in time.
        """
        newcomer = Resident(alias, size_bytes, reload_s, pinned, 1, self._clock(), arriving=True)
        with self._changed:
            self._newcomers[alias] = time.monotonic()
        try:
            self._enter(newcomer)
        finally:
            with self._changed:
                if alias == next(iter(self._newcomers)):
                    self._turn_s = time.monotonic()
                del self._newcomers[alias]
                self._changed.notify_all()

    def _enter(self, newcomer: Resident) -> None:
        alias = newcomer.alias
        began_s = self._newcomers[alias]
        while True:
            with self._changed:
                newcomer.waiting = max(1.0, self._waiting.get(alias, 0.0))
                now_s = time.monotonic()
                waited_s = now_s - began_s
                going = self._residency.room_for(newcomer, patient=waited_s < self._patience_s)
                if newcomer.size_bytes and self._is_behind(alias, now_s):
                    going = None
                ready = going is not None and all(one.holds == 0 for one in going)
                for one in going or ():
                    # The others may be used until all have gone: another's going may turn out to be room enough.
                    one.leaving = one.holds > 0
                if ready and going is not None:
                    self._take_out(going)
                    self._residency.residents[alias] = newcomer
                elif now_s - max(began_s, self._turn_s) >= self._limit_s:
                    raise self._no_room(newcomer)
                else:
                    self._changed.wait(min(1.0, max(0.01, self._patience_s - waited_s)))
            if ready and going is not None:
                self._close([one.alias for one in going])
                return

    def _is_behind(self, alias: str, now_s: float) -> bool:
        """Whether somebody came earlier and has lost patience: what becomes free is the first one's then, or one that
        needs much would wait for ever beside those that need little."""
        first, since_s = next(iter(self._newcomers.items()))
        return alias != first and now_s - since_s >= self._patience_s

    def _no_room(self, newcomer: Resident) -> ModelUnavailable:
        used = ", ".join(f"{one.alias} {one.size_bytes / 1e6:,.0f} MB" for one in self._residency.residents.values())
        return ModelUnavailable(
            f"model {newcomer.alias!r} needs {newcomer.size_bytes / 1e6:,.1f} MB of memory; all "
            f"{self.budget_bytes / 1e6:,.0f} MB stayed in use for {self._limit_s:g} s ({used})",
            {"model": newcomer.alias, "transient": True, "needed_bytes": newcomer.size_bytes},
        )

    def settle(self, alias: str, size_bytes: int, reload_s: float) -> bool:
        """A model is loaded: its true size and what loading took. Others go for what it is larger than promised.

        False when they may not: then it has to leave, and come again with its true size. Raises ModelUnavailable when
        it can never fit.
        """
        with self._changed:
            resident = self._residency.residents[alias]
            grown = size_bytes > resident.size_bytes
            resident.size_bytes, resident.reload_s = size_bytes, reload_s
            resident.waiting = max(1.0, self._waiting.get(alias, 0.0))
            going = self._residency.room_for(resident) if grown else []
            resident.waiting = self._waiting.get(alias, 0.0)
            if going is None or any(one.holds for one in going):
                return False
            self._take_out(going)
        self._close([one.alias for one in going])
        return True

    def forget(self, alias: str) -> None:
        """A load failed: its place is free."""
        with self._changed:
            self._residency.residents.pop(alias, None)
            self._changed.notify_all()

    def wait_gone(self, alias: str) -> None:
        """Wait until a model that is about to leave has left."""
        with self._changed:
            self._changed.wait_for(lambda: alias not in self._closing and not self._leaving(alias))

    def _leaving(self, alias: str) -> bool:
        resident = self._residency.residents.get(alias)
        return resident is not None and resident.leaving

    def let_idle_go(self) -> list[str]:
        """Let go whom nobody used for the time to live; returns their names."""
        with self._changed:
            going = self._residency.idle(self._clock())
            self._take_out(going)
        self._close([one.alias for one in going])
        return [one.alias for one in going]

    def _take_out(self, going: list[Resident]) -> None:
        for one in going:
            self._residency.residents.pop(one.alias, None)
            self._closing.add(one.alias)

    def _close(self, aliases: list[str]) -> None:
        for alias in aliases:
            try:
                self._let_go(alias)
            finally:
                with self._changed:
                    self._closing.discard(alias)
                    self._changed.notify_all()
