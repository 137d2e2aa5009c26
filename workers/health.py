"""The worker's card in Redis and its heartbeat in a file, kept fresh, and the watchdog that ends a process whose model
hangs."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Literal

from cortex_tasks.codec import PRIORITY_STEPS, queue_key
from cortex_tasks.presence import PRESENCE_TTL_S, WORKERS_KEY, WorkerCard, worker_key
from workers import heartbeat
from workers.children import START_LIMIT_S
from workers.heartbeat import Beat, Progress
from workers.registry import Registry
from workers.runner import Runner
from workers.shares import Shares

__all__ = ["HUNG_EXIT_CODE", "Health", "RateMeter"]

logger = logging.getLogger(__name__)

#: Exit code of a process that the watchdog ended (EX_SOFTWARE): its supervisor starts it again.
HUNG_EXIT_CODE: Final = 70
_INTERVAL_S: Final = 2.0
_RATE_WINDOW_S: Final = 10.0
#: A Redis that took no card for so long is away.
_ANSWERS_S: Final = 3 * _INTERVAL_S


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
    """Writes the card every ``_INTERVAL_S``. A thread beside it leaves the heartbeat and looks whether each runner
    still makes progress: a Redis that is away, or whose name is not found, may hold up the card for minutes.

    ``settled``: how many jobs have left the worker so far. ``held_up``: whether answers wait for a Redis that is away.
    ``beats_in``: the directory of heartbeats.
    """

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
        settled: Callable[[], int] = lambda: 0,
        held_up: Callable[[], bool] = lambda: False,
        beats_in: Path | None = None,
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
        self._settled = settled
        self._held_up = held_up
        self._beats_in = beats_in or heartbeat.directory()
        self._born_ticks = heartbeat.born_ticks(os.getpid()) or 0
        self._progress = Progress()
        self._answered_at_s = float("-inf")
        self._pulse = threading.Thread(target=self._beat_on, name="heartbeat", daemon=True)
        self._beat_now = threading.Event()
        self._told_unwritable = False
        self._exit_process = exit_process
        self._client: Any = None
        self._rate = RateMeter()
        self._shares = Shares(registry)
        self._started_at_s = time.time()
        self._wake = threading.Event()
        self._ended = False
        #: Inputs and jobs that failed; counted by the pool.
        self.errors = 0

    def start(self) -> None:
        super().start()
        self._pulse.start()

    def run(self) -> None:
        while not self._ended:
            self._registry.memory.let_idle_go()
            try:
                self.publish()
                self._answered_at_s = time.monotonic()
            except Exception as error:
                self._client = None
                logger.debug("the worker's card could not be written: %s", type(error).__name__)
            self._wake.wait(_INTERVAL_S)
            self._wake.clear()

    def _beat_on(self) -> None:
        while not self._ended:
            self.check_progress(time.monotonic())
            self._leave_beat()
            self._beat_now.wait(_INTERVAL_S)
            self._beat_now.clear()

    def announce(self, state: Literal["starting", "ready", "stopping"]) -> None:
        """Change the state and say so at once."""
        self.state = state
        self._wake.set()
        self._beat_now.set()

    def stop(self) -> None:
        """End the thread and take the card and the heartbeat away."""
        self._ended = True
        self._wake.set()
        self._beat_now.set()
        self.join(5.0)
        self._pulse.join(5.0)
        with contextlib.suppress(OSError):
            heartbeat.erase(os.getpid(), self._beats_in)
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

    def beat(self, now_s: float) -> Beat:
        """What a probe on this machine gets to read. ``now_s``: monotonic seconds."""
        models = list(self._registry.models.values())
        mark = (self._settled(), sum(model.batches for model in models))
        # A pass ends by itself or by the watchdog, and so does a load by its time-outs; what cannot be told to Redis
        # cannot be finished.
        excused = (
            now_s - self._answered_at_s > _ANSWERS_S
            or self._held_up()
            or any(runner.running for runner in self._runners())
            or any(model.state == "loading" for model in models)
        )
        return Beat(
            pid=os.getpid(),
            born_ticks=self._born_ticks,
            node=self._node,
            state=self.state,
            beat_at_s=now_s,
            pinned={model.alias: model.state for model in models if model.config.load == "pinned"},
            stalled_s=round(
                self._progress.update(now_s, mark, busy=not excused and any(self._in_flight().values())), 1
            ),
        )

    def _leave_beat(self) -> None:
        try:
            heartbeat.write(self.beat(time.monotonic()), self._beats_in)
        except OSError as error:
            if not self._told_unwritable:
                logger.warning("no heartbeat can be left in %s: %s; `python -m workers.probe` will find none",
                               self._beats_in, error)  # fmt: skip
            self._told_unwritable = True

    def check_progress(self, now_s: float) -> None:
        """End the process when a forward pass, or a step of one in children, takes longer than the model's time limit.

        A pass that hangs in the process cannot be cancelled: with the process gone, its jobs' leases run out, the
        supervisor starts another worker, and the job that did it is counted as a suspect.
        """
        for alias, since_s in (running for runner in self._runners() for running in runner.running):
            model = self._registry.models[alias]
            limit_s = model.config.limits.time_limit_s
            if model.config.children:
                # Children are killed by their host at their limits; the host itself gets twice the time for a step.
                limit_s = 2 * max(limit_s, START_LIMIT_S)
                adapter = model.adapter  # read once: another thread may let the model go
                since_s = max(since_s, adapter.progressed_s if adapter else 0.0)
            if now_s - since_s > limit_s:
                logger.critical("model %s has been in one forward pass for %.0f s (limit %.0f s): ending the process, "
                                "its jobs go to other workers", alias, now_s - since_s, limit_s)  # fmt: skip
                self._exit_process(HUNG_EXIT_CODE)
