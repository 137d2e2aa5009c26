"""A worker with room for some of its models, in simulated time: how often does it load?

One job takes one tick, a load twenty; while a model is loading, jobs of the models in memory are served. ``visible``
jobs can be seen at once, the trace moves up behind them.
"""

from __future__ import annotations

import random
from collections import Counter, OrderedDict
from collections.abc import Sequence

from workers.store.residency import Residency, Resident

__all__ = ["cyclic", "loads_by_lru", "loads_by_worth", "zipf"]

LOAD_TICKS = 20
#: As ``workers.memory.PATIENCE_S``, in ticks.
PATIENCE_TICKS = 100


def cyclic(models: int, jobs: int) -> list[int]:
    return [number % models for number in range(jobs)]


def zipf(models: int, jobs: int, seed: int = 7) -> list[int]:
    weights = [1 / rank for rank in range(1, models + 1)]
    return random.Random(seed).choices(range(models), weights, k=jobs)


def loads_by_lru(trace: Sequence[int], room: int) -> int:
    """Jobs in their order; a miss throws out the longest unused."""
    held: OrderedDict[int, None] = OrderedDict()
    loads = 0
    for model in trace:
        if model not in held:
            loads += 1
            if len(held) == room:
                held.popitem(last=False)
        held[model] = None
        held.move_to_end(model)
    return loads


class _Worker:
    def __init__(self, trace: Sequence[int], room: int, visible: int) -> None:
        self.trace = list(trace)
        self.visible = visible
        self.residency = Residency(budget_bytes=room, idle_ttl_s=1e9)
        self.queue: list[tuple[int, int]] = []
        self.loading: tuple[int, int] | None = None
        self.now = self.loads = 0
        #: The longest that a job waited, in ticks.
        self.longest_wait = 0

    def run(self) -> None:
        self.trace.reverse()
        while self.trace or self.queue:
            while self.trace and len(self.queue) < self.visible:
                self.queue.append((self.trace.pop(), self.now))
            waiting = Counter(model for model, _ in self.queue)
            for resident in self.residency.residents.values():
                resident.waiting = waiting[int(resident.alias)]
            self._load(waiting)
            self._serve()
            self.now += 1

    def _load(self, waiting: Counter[int]) -> None:
        if self.loading is not None:
            model, until = self.loading
            if self.now < until:
                return
            self.residency.residents[str(model)].holds = 0
            self.loading = None
        missing = [(model, since) for model, since in self.queue if str(model) not in self.residency.residents]
        if not missing:
            return
        model, since = missing[0]
        newcomer = Resident(str(model), 1, reload_s=1.0, holds=1, used_at_s=self.now, waiting=waiting[model])
        going = self.residency.room_for(newcomer, patient=self.now - since < PATIENCE_TICKS)
        if going is not None:
            for one in going:
                del self.residency.residents[one.alias]
            self.residency.residents[newcomer.alias] = newcomer
            self.loading = (model, self.now + LOAD_TICKS)
            self.loads += 1

    def _serve(self) -> None:
        for place, (model, since) in enumerate(self.queue):
            resident = self.residency.residents.get(str(model))
            if resident is not None and resident.holds == 0:
                resident.used_at_s = self.now
                self.longest_wait = max(self.longest_wait, self.now - since)
                del self.queue[place]
                return


def loads_by_worth(trace: Sequence[int], room: int, visible: int) -> tuple[int, int]:
    """Loads, and the longest wait of a job in ticks, of a worker that decides as ``Residency`` does."""
    worker = _Worker(trace, room, visible)
    worker.run()
    return worker.loads, worker.longest_wait
