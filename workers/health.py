"""The worker's card in Redis, kept fresh, and the watchdog that ends a process whose model hangs."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal

from cortex_tasks.codec import PRIORITY_STEPS, queue_key
from cortex_tasks.presence import PRESENCE_TTL_S, WORKERS_KEY, WorkerCard, worker_key
from workers.registry import Registry
from workers.runner import Runner
from workers.shares import Shares

__all__ = ["HUNG_EXIT_CODE", "Health", "RateMeter"]

logger = logging.getLogger(__name__)

#: Exit code of a process that the watchdog ended (EX_SOFTWARE): its supervisor starts it again.
HUNG_EXIT_CODE: Final = 70
_INTERVAL_S: Final = 2.0
_RATE_WINDOW_S: Final = 10.0


class RateMeter:
    """Events a second over the last few seconds, from a growing total."""

    def __init__(self, window_s: float = _RATE_WINDOW_S) -> None:
        self._window_s = window_s
        self._seen: deque[tuple[float, int]] = deque()

    def update(self, now_s: float, total: int) -> float:
        """Note the total at a time (seconds, any clock); returns the rate over the window."""
        self._seen.append((now_s, total))
        while len(self._seen) > 2 and self._seen[0][0] < now_s - self._window_s:
            self._seen.popleft()
        first_s, first = self._seen[0]
        return (total - first) / (now_s - first_s) if now_s > first_s else 0.0


class Health(threading.Thread):
    """Writes the card every ``_INTERVAL_S`` and looks whether each runner still makes progress."""

    def __init__(
        self,
        *,
        node: str,
        image: str,
        host: str,
        queues: Callable[[], Sequence[str]],
        registry: Registry,
        runners: Callable[[], Sequence[Runner]],
        in_flight: Callable[[], dict[str, int]],
        connect: Callable[[], Any],
        exit_process: Callable[[int], Any] = os._exit,
    ) -> None:
        super().__init__(name="health", daemon=True)
        self.state: Literal["starting", "ready", "stopping"] = "starting"
        self._node = node
        self._image = image
        self._host = host
        self._queues = queues
        self._registry = registry
        self._runners = runners
        self._in_flight = in_flight
        self._connect = connect
        self._exit_process = exit_process
        self._client: Any = None
        self._rate = RateMeter()
        self._shares = Shares(registry)
        self._started_at_s = time.time()
        self._wake = threading.Event()
        self._ended = False
        #: Inputs and jobs that failed; counted by the pool.
        self.errors = 0

    def run(self) -> None:
        while not self._ended:
            self.check_progress(time.monotonic())
            self._registry.memory.let_idle_go()
            try:
                self.publish()
            except Exception as error:
                self._client = None
                logger.debug("the worker's card could not be written: %s", type(error).__name__)
            self._wake.wait(_INTERVAL_S)
            self._wake.clear()

    def announce(self, state: Literal["starting", "ready", "stopping"]) -> None:
        """Change the state and say so at once."""
        self.state = state
        self._wake.set()

    def stop(self) -> None:
        """End the thread and take the card away."""
        self._ended = True
        self._wake.set()
        self.join(5.0)
        try:
            client = self._client or self._connect()
            client.delete(worker_key(self._node))
            client.zrem(WORKERS_KEY, self._node)
        except Exception as error:
            logger.debug("the worker's card could not be removed: %s", type(error).__name__)

    def card(self) -> WorkerCard:
        models = tuple(model.card() for model in self._registry.models.values())
        items = sum(model.items for model in models)
        return WorkerCard(
            node=self._node,
            image=self._image,
            host=self._host,
            pid=os.getpid(),
            queues=tuple(self._queues()),
            state=self.state,
            models=models,
            started_at=self._started_at_s,
            seen_at=time.time(),
            jobs=sum(model.jobs for model in models),
            items=items,
            errors=self.errors,
            items_per_s=round(self._rate.update(time.monotonic(), items), 2),
            in_flight=self._in_flight(),
            store=self._registry.store.counters.card(
                memory_bytes=self._registry.memory.used_bytes,
                memory_limit_bytes=self._registry.memory.budget_bytes,
                fits_bytes=self._registry.fits.used_bytes,
                budgets=self._shares.cards(time.monotonic()),
            ),
        )

    def publish(self) -> None:
        """Write the card now. Raises what redis-py raises."""
        self._client = self._client or self._connect()
        card = self.card()
        with self._client.pipeline(transaction=False) as pipe:
            pipe.set(worker_key(card.node), card.model_dump_json(), ex=PRESENCE_TTL_S)
            pipe.zadd(WORKERS_KEY, {card.node: card.seen_at})
            pipe.zremrangebyscore(WORKERS_KEY, 0, card.seen_at - 10 * PRESENCE_TTL_S)
            for queue in card.queues:
                for step in PRIORITY_STEPS:
                    pipe.llen(queue_key(queue, step))
            _, _, _, *lengths = pipe.execute()
        steps = len(PRIORITY_STEPS)
        self._registry.note_depths(
            {queue: sum(lengths[at * steps : (at + 1) * steps]) for at, queue in enumerate(card.queues)}
        )

    def check_progress(self, now_s: float) -> None:
        """End the process when a forward pass takes longer than the model's time limit.

        A pass that hangs in the process cannot be cancelled: with the process gone, its jobs' leases run out, the
        supervisor starts another worker, and the job that did it is counted as a suspect.
        """
        for runner in self._runners():
            if (running := runner.running) is None:
                continue
            alias, since_s = running
            config = self._registry.models[alias].config
            # Children are killed by their host at the limit; the host itself gets twice the time.
            limit_s = config.limits.time_limit_s * (2 if config.children else 1)
            if now_s - since_s > limit_s:
                logger.critical("model %s has been in one forward pass for %.0f s (limit %.0f s): ending the process, "
                                "its jobs go to other workers", alias, now_s - since_s, limit_s)  # fmt: skip
                self._exit_process(HUNG_EXIT_CODE)
