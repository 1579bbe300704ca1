"""The deque of work a peer holds for one job: ranges of tasks, own workers at the head, thieves at the tail.

Rules this file keeps:

- a task is held at most once: pushing what is held already adds nothing (pushes say what they added);
- the order of tasks is exactly that of the pushes; neighbours that continue each other are kept as one range;
- pushes are refused once RANGES_MAX ranges are held. A removal may split a range and go over the bound by that one:
  forgetting finished work must never fail;
- no I/O, no time: how long a task takes and where segments are cut is asked of the caller.

Ranges are nodes of a linked list (for the order), found through a sorted list for each stage (for removals).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from typing import NamedTuple

RANGES_MAX = 1 << 16
"""Ranges, not tasks: about 20 MB at worst. A producer that reaches it fragments its work and must wait."""
STEAL_RANGES_MAX = 64
"""Ranges in one answer to a thief: a signed message of about a kilobyte."""
SECONDS_MIN = 1e-9
"""A task is never counted as free: with no estimate at all, half of the time becomes half of the count."""


class Work(NamedTuple):
    """Tasks [lo, hi) of a stage."""

    stage: int
    lo: int
    hi: int

    @property
    def size(self) -> int:
        """How many tasks."""
        return self.hi - self.lo


class DequeFull(Exception):
    """The deque holds RANGES_MAX ranges; nothing was added. Back off until some are done."""


class _Node:
    __slots__ = ("after", "before", "hi", "lo", "stage")

    before: _Node
    after: _Node

    def __init__(self, stage: int, lo: int, hi: int) -> None:
        self.stage = stage
        self.lo = lo
        self.hi = hi


class _Stage:
    """One stage's nodes sorted by lo, and the number of tasks in them."""

    __slots__ = ("count", "lows", "nodes")

    def __init__(self) -> None:
        self.lows: list[int] = []
        self.nodes: list[_Node] = []
        self.count = 0

    def overlapping(self, lo: int, hi: int) -> list[_Node]:
        first = bisect_right(self.lows, lo)
        if first and self.nodes[first - 1].hi > lo:
            first -= 1
        return self.nodes[first : bisect_left(self.lows, hi)]

    def insert(self, node: _Node) -> None:
        at = bisect_left(self.lows, node.lo)
        self.lows.insert(at, node.lo)
        self.nodes.insert(at, node)

    def delete(self, node: _Node) -> None:
        at = bisect_left(self.lows, node.lo)
        del self.lows[at], self.nodes[at]

    def move_low(self, node: _Node, lo: int) -> None:
        """Change node.lo; it stays between its neighbours, so the order holds."""
        self.lows[bisect_left(self.lows, node.lo)] = lo
        node.lo = lo


class RangeDeque:
    """Deque of `Work`. Not for use by several tasks at once across awaits (it never awaits, so that is easily kept)."""

    def __init__(self, ranges_max: int = RANGES_MAX) -> None:
        self._ranges_max = ranges_max
        self._stages: dict[int, _Stage] = {}
        self._end = end = _Node(-1, 0, 0)  # sentinel: end.after is the head, end.before the tail
        end.before = end.after = end
        self._nodes = 0
        self._total = 0

    # ---- in ----

    def push_tail(self, work: Work) -> list[Work]:
        """Add work that is to run after all else; return the parts that were not held yet. Raises DequeFull."""
        added = self._missing(work)
        for part in added:
            last = self._end.before
            if last is not self._end and last.stage == part.stage and last.hi == part.lo:
                last.hi = part.hi
                self._account(part.stage, part.size)
            else:
                self._link(part, self._end)
        return added

    def push_head(self, work: Work) -> list[Work]:
        """Add work that is to run before all else (a child stage, what a lost worker gave back). Raises DequeFull."""
        added = self._missing(work)
        for part in reversed(added):
            head = self._end.after
            if head is not self._end and head.stage == part.stage and part.hi == head.lo:
                self._stages[part.stage].move_low(head, part.lo)
                self._account(part.stage, part.size)
            else:
                self._link(part, head)
        return added

    # ---- out ----

    def take_head(self, count_of: Callable[[int], int]) -> Work | None:
        """Take up to count_of(stage) tasks from the first range whose stage may run now; None if there is none.

        count_of is asked once a stage; 0 or less means: not now (its function has not arrived, say), look further on.
        """
        counts: dict[int, int] = {}
        node = self._end.after
        while node is not self._end:
            count = counts.get(node.stage)
            if count is None:
                count = counts[node.stage] = count_of(node.stage)
            if count > 0:
                return self._cut_front(node, min(node.hi, node.lo + count))
            if len(counts) == len(self._stages) and max(counts.values()) <= 0:
                return None
            node = node.after
        return None

    def steal_tail(
        self,
        seconds_per_item: Callable[[int], float],
        fraction: float = 0.5,
        boundaries: Callable[[int, int], int] | None = None,
        limit_ranges: int = STEAL_RANGES_MAX,
        wanted: Callable[[int], bool] | None = None,
    ) -> list[Work]:
        """Take about `fraction` of the remaining time from the tail, in deque order; at least one task if any is held.

        boundaries(stage, index) rounds a split point to a segment's edge nearby; an answer that does not lie inside the
        range is ignored and the range split at the index itself. wanted(stage) False: the thief can't run that stage,
        its work neither counts nor moves.
        """
        seconds = {}
        for stage in self._stages:
            if wanted is None or wanted(stage):
                each_s = seconds_per_item(stage)
                seconds[stage] = each_s if each_s > SECONDS_MIN else SECONDS_MIN  # NaN too
        share_s = fraction * sum(self._stages[stage].count * each_s for stage, each_s in seconds.items())
        taken: list[Work] = []  # tail first
        node = self._end.before
        while node is not self._end and share_s > 0 and len(taken) < limit_ranges:
            before = node.before
            if node.stage in seconds:
                each_s = seconds[node.stage]
                count = node.hi - node.lo
                if count * each_s <= share_s:
                    taken.append(self._cut_front(node, node.hi))
                    share_s -= count * each_s
                else:
                    part = min(count, max(round(share_s / each_s), 0 if taken else 1))
                    if part:
                        taken.append(self._cut_back(node, self._split_point(node, node.hi - part, boundaries)))
                    break
            node = before
        taken.reverse()
        return _joined(taken)

    def remove(self, stage: int, lo: int, hi: int) -> list[Work]:
        """Forget tasks (done elsewhere, cancelled); return those that were held, by index."""
        held = self._stages.get(stage)
        if held is None:
            return []
        removed = []
        for node in held.overlapping(lo, hi):
            start, end = max(lo, node.lo), min(hi, node.hi)
            if end < node.hi and start > node.lo:
                self._link(Work(stage, end, node.hi), node.after, counted=False)
                node.hi = start
                self._account(stage, start - end)
            elif end < node.hi:
                self._cut_front(node, end)
            else:
                self._cut_back(node, start)
            removed.append(Work(stage, start, end))
        return removed

    # ---- look ----

    @property
    def total(self) -> int:
        """Tasks held."""
        return self._total

    def __len__(self) -> int:
        """Ranges held."""
        return self._nodes

    def __bool__(self) -> bool:
        return self._total > 0

    def count(self, stage: int) -> int:
        """Tasks held of a stage."""
        held = self._stages.get(stage)
        return held.count if held else 0

    def stages(self) -> Iterator[int]:
        """Stages with tasks here, oldest first."""
        return iter(self._stages)

    def holds(self, stage: int, lo: int, hi: int) -> list[Work]:
        """The parts of [lo, hi) that are held, by index."""
        held = self._stages.get(stage)
        nodes = held.overlapping(lo, hi) if held else []
        return _joined([Work(stage, max(lo, n.lo), min(hi, n.hi)) for n in nodes])

    def ranges(self) -> list[Work]:
        """What heartbeats claim: by stage and index, adjacent ranges joined."""
        return _joined([Work(n.stage, n.lo, n.hi) for stage in sorted(self._stages) for n in self._stages[stage].nodes])

    def __iter__(self) -> Iterator[Work]:
        """The ranges from head to tail. The deque must not change meanwhile."""
        node = self._end.after
        while node is not self._end:
            yield Work(node.stage, node.lo, node.hi)
            node = node.after

    # ---- inside ----

    def _missing(self, work: Work) -> list[Work]:
        if work.lo > work.hi:
            raise ValueError(f"reversed range {work}")
        held = self._stages.get(work.stage)
        nodes = held.overlapping(work.lo, work.hi) if held else []
        parts = []
        start = work.lo
        for node in nodes:
            if start < node.lo:
                parts.append(Work(work.stage, start, node.lo))
            start = node.hi
        if start < work.hi:
            parts.append(Work(work.stage, start, work.hi))
        if self._nodes + len(parts) > self._ranges_max:
            raise DequeFull(f"{self._nodes} ranges of work are waiting already")
        return parts

    def _link(self, work: Work, after: _Node, *, counted: bool = True) -> None:
        node = _Node(*work)
        node.before, node.after = after.before, after
        node.before.after = after.before = node
        self._nodes += 1
        self._stages.setdefault(work.stage, _Stage()).insert(node)
        if counted:
            self._account(work.stage, work.size)

    def _unlink(self, node: _Node) -> None:
        node.before.after, node.after.before = node.after, node.before
        self._nodes -= 1
        self._stages[node.stage].delete(node)

    def _account(self, stage: int, change: int) -> None:
        self._total += change
        held = self._stages[stage]
        held.count += change
        if not held.count:
            del self._stages[stage]

    def _cut_front(self, node: _Node, at: int) -> Work:
        """Take [node.lo, at)."""
        work = Work(node.stage, node.lo, at)
        if at == node.hi:
            self._unlink(node)
        else:
            self._stages[node.stage].move_low(node, at)
        self._account(work.stage, -work.size)
        return work

    def _cut_back(self, node: _Node, at: int) -> Work:
        """Take [at, node.hi)."""
        if at == node.lo:
            return self._cut_front(node, node.hi)
        work = Work(node.stage, at, node.hi)
        node.hi = at
        self._account(work.stage, -work.size)
        return work

    @staticmethod
    def _split_point(node: _Node, at: int, boundaries: Callable[[int, int], int] | None) -> int:
        if boundaries is not None:
            rounded = boundaries(node.stage, at)
            if node.lo < rounded < node.hi:
                return rounded
        return at


def _joined(works: list[Work]) -> list[Work]:
    """Join each range with the next where that continues it."""
    out: list[Work] = []
    for work in works:
        if out and out[-1].stage == work.stage and out[-1].hi == work.lo:
            out[-1] = Work(work.stage, out[-1].lo, work.hi)
        else:
            out.append(work)
    return out
