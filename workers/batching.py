"""Who runs next, and together with whom. Pure: no threads, no clocks of its own, no models.

Items wait in two lanes. The head is the item with the earliest deadline, then the earliest arrival, of the lane
whose turn it is: interactive first, with one bulk batch after ``INTERACTIVE_STREAK`` interactive ones while bulk
waits, so that neither lane starves. Nor does an item within its lane: after ``OVERTAKING_STREAK`` batches around later
arrivals the head is the one that came first. The batch is filled with the head's neighbours *by length* of the same
group and lane, so that little is padded, up to the group's budget. Length-sorted filling with a padded-token budget is
text-embeddings-inference's and infinity's; taking the window around the most urgent item is ours. While interactive
items come, bulk batches are brief, since whoever comes next waits for the one that runs. Where less waits than the
passes that may begin now would hold, each gets its share: as in guided self-scheduling (Polychronopoulos and Kuck,
1987), they end at about the same time.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Final, Generic, NamedTuple, TypeVar

from cortex_tasks.payloads import Lane

__all__ = [
    "BRIEF_AFTER",
    "INTERACTIVE_STREAK",
    "OVERTAKING_STREAK",
    "Ahead",
    "Batch",
    "Batcher",
    "Budget",
    "Group",
    "Waiting",
]

T = TypeVar("T")

#: A bulk batch is brief when one of so many batches before it was interactive.
BRIEF_AFTER: Final = 16
#: Interactive batches in a row after which a waiting bulk batch gets its turn.
INTERACTIVE_STREAK: Final = 8
#: Batches of a lane in a row around later arrivals with earlier deadlines after which whoever came first gets its turn.
#: Counted in batches, not in seconds: those without deadlines keep a ninth of the lane, be its models fast or slow, and
#: no more of it once many of them have waited for long, when deadlines matter most.
OVERTAKING_STREAK: Final = 8
#: A share is no smaller: what a pass costs by itself would be more than sharing gains.
_SMALLEST_SHARE_TOKENS: Final = 128


class Budget(NamedTuple):
    """What one forward pass of a model may hold."""

    max_items: int
    #: Items x longest item.
    max_padded_tokens: int

    def part(self, parts: int) -> Budget:
        """Of so many passes that run at the same time."""
        if parts == 1:
            return self
        return self._replace(max_padded_tokens=max(1, self.max_padded_tokens // parts))


class Group(NamedTuple):
    """Items of one group may share a forward pass."""

    model: str
    task: str
    #: Canonical parameters.
    params: str


@dataclass(slots=True, eq=False)
class Waiting(Generic[T]):
    """One item that waits. ``deadline_s`` and arrival are on the caller's clock (seconds)."""

    payload: T
    group: Group
    cost_tokens: int = 1
    lane: Lane = "interactive"
    deadline_s: float = math.inf
    #: Must not share its batch with other jobs' items (it may have killed a worker).
    alone: bool = False
    _seq: int = field(default=0, repr=False)
    _taken: bool = field(default=False, repr=False)


@dataclass(frozen=True, slots=True)
class Batch(Generic[T]):
    """Items for one forward pass, shortest first."""

    group: Group
    items: list[Waiting[T]]
    budget: Budget
    #: Only the budget kept it from growing: others of its group and lane still wait.
    full: bool = False

    @property
    def padded_tokens(self) -> int:
        return len(self.items) * max(item.cost_tokens for item in self.items)


class Ahead(NamedTuple):
    """What the next batch will be."""

    model: str
    #: Nothing should run beside it: it may kill its worker, or interactive items come, and wait for it to end.
    by_itself: bool
    #: More of its kind wait than one batch holds.
    more: bool
    #: Of the item it is built around.
    cost_tokens: int = 1


class _Order(Generic[T]):
    """Who is next in one lane. Items that left as somebody's neighbours stay until they surface."""

    def __init__(self) -> None:
        self._arrived: deque[Waiting[T]] = deque()
        #: Heap of (deadline, seq, item): of those that have a deadline.
        self._due: list[tuple[float, int, Waiting[T]]] = []
        #: Batches since the first in line was the head.
        self._overtaken = 0

    def add(self, item: Waiting[T]) -> None:
        self._arrived.append(item)
        if item.deadline_s < math.inf:
            heapq.heappush(self._due, (item.deadline_s, item._seq, item))

    def head(self) -> Waiting[T] | None:
        """The next batch's; None when nothing waits."""
        arrived, due = self._arrived, self._due
        while arrived and arrived[0]._taken:
            arrived.popleft()
        if not arrived:
            due.clear()
            return None
        while due and due[0][2]._taken:
            heapq.heappop(due)
        return due[0][2] if due and self._overtaken < OVERTAKING_STREAK else arrived[0]

    def take(self) -> Waiting[T] | None:
        """The head, whose batch leaves now."""
        head = self.head()
        if head is not None:
            self._overtaken = 0 if head is self._arrived[0] else self._overtaken + 1
        return head


class Batcher(Generic[T]):
    """Holds waiting items and hands out batches."""

    def __init__(self) -> None:
        self._seq = count()
        self._size = 0
        self._streak = 0
        #: Batches since the last interactive one.
        self._since_interactive = BRIEF_AFTER
        self._orders: dict[Lane, _Order[T]] = {"interactive": _Order(), "bulk": _Order()}
        #: (group, lane) -> (cost, seq, item), sorted.
        self._by_length: dict[tuple[Group, Lane], list[tuple[int, int, Waiting[T]]]] = defaultdict(list)

    def __len__(self) -> int:
        return self._size

    def add(self, item: Waiting[T]) -> None:
        """Put an item in line. O(log n) comparisons."""
        item._seq = next(self._seq)
        self._orders[item.lane].add(item)
        if not item.alone:
            insort(self._by_length[item.group, item.lane], (item.cost_tokens, item._seq, item))
        self._size += 1

    def ahead(self, budget: Callable[[Group], Budget]) -> Ahead | None:
        """What ``take`` would take, or None when nothing waits."""
        lane = self._lane()
        head = self._orders[lane].head()
        if head is None:
            return None
        if head.alone or self._is_hurried(lane):
            return Ahead(head.group.model, by_itself=True, more=False, cost_tokens=head.cost_tokens)
        line, limit = self._by_length[head.group, lane], budget(head.group)
        more = len(line) > limit.max_items or len(line) * line[-1][0] > limit.max_padded_tokens
        return Ahead(head.group.model, by_itself=False, more=more, cost_tokens=head.cost_tokens)

    def take(
        self,
        budget: Callable[[Group], Budget],
        brief: Callable[[Group], Budget] | None = None,
        parts: int = 1,
        sharers: int = 1,
    ) -> Batch[T] | None:
        """The next batch, or None when nothing waits. ``budget`` gives a group's limits, ``brief`` those of a bulk
        batch between interactive ones (default: the same). With ``parts`` it holds a part of the tokens only, since as
        many batches run at the same time; with ``sharers`` as much is left to each of the others that may begin now.
        """
        lane = self._lane()
        head = self._orders[lane].take()
        if head is None:
            return None
        limit = (brief if brief and self._is_hurried(lane) else budget)(head.group)
        self._streak = self._streak + 1 if lane == "interactive" and self._waits("bulk") else 0
        self._since_interactive = 0 if lane == "interactive" else self._since_interactive + 1
        chosen, full = ([head], False) if head.alone else self._fill(head, limit.part(parts), sharers)
        for item in chosen:
            item._taken = True
        self._size -= len(chosen)
        return Batch(head.group, chosen, limit, full)

    def _lane(self) -> Lane:
        """Whose turn it is."""
        if self._waits("interactive") and not (self._streak >= INTERACTIVE_STREAK and self._waits("bulk")):
            return "interactive"
        return "bulk"

    def _waits(self, lane: Lane) -> bool:
        return self._orders[lane].head() is not None

    def _is_hurried(self, lane: Lane) -> bool:
        return lane == "bulk" and self._since_interactive < BRIEF_AFTER

    def _fill(self, head: Waiting[T], limit: Budget, sharers: int) -> tuple[list[Waiting[T]], bool]:
        """The head and its nearest neighbours by length, within the limits; the head always goes. And whether only the
        budget kept more from joining them."""
        key = (head.group, head.lane)
        line = self._by_length[key]
        share_tokens = _share_tokens(line, limit, sharers)
        start = bisect_left(line, (head.cost_tokens, head._seq))
        low, high, tokens = start, start + 1, head.cost_tokens
        while high - low < limit.max_items and tokens < share_tokens:
            longer = line[high][0] if high < len(line) else None
            shorter = line[low - 1][0] if low else None
            longest = line[high - 1][0]
            size = high - low + 1
            fits_longer = longer is not None and longer * size <= limit.max_padded_tokens
            fits_shorter = shorter is not None and longest * size <= limit.max_padded_tokens
            if fits_longer and (not fits_shorter or _nearer(head.cost_tokens, longer, shorter)):
                tokens += line[high][0]
                high += 1
            elif fits_shorter:
                low -= 1
                tokens += line[low][0]
            else:
                break
        chosen = [entry[2] for entry in line[low:high]]
        del line[low:high]
        full = bool(line) and tokens < share_tokens
        if not line:
            del self._by_length[key]
        return chosen, full


def _share_tokens(line: Sequence[tuple[int, int, Waiting[T]]], limit: Budget, sharers: int) -> float:
    """What one of so many batches should hold of a line, in tokens."""
    if sharers == 1 or len(line) > sharers * limit.max_items:
        return math.inf
    return max(_SMALLEST_SHARE_TOKENS, sum([cost for cost, _, _ in line]) / sharers)


def _nearer(cost: int, longer: int | None, shorter: int | None) -> bool:
    """Whether the longer neighbour is at least as near to ``cost`` as the shorter one."""
    return shorter is None or (longer is not None and longer - cost <= cost - shorter)
