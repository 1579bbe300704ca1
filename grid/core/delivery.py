"""The results of one stage on their way to who reads them: in index order or as they come, never more than the credit.

Rules: an ordered stage delivers index by index, without gaps; what was delivered and not consumed stays under CREDIT_BYTES
(one item may exceed it alone); each task is delivered once. No I/O; items are opaque.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

from grid.core import limits

T = TypeVar("T")


class Delivery(Generic[T]):
    """A stage's outgoing results. `add` ranges as they are settled, iterate `ready` for what may go now."""

    def __init__(self, ordered: bool, credit_bytes: int = limits.CREDIT_BYTES) -> None:
        self._ordered = ordered
        self._credit_bytes = credit_bytes
        self._waiting: dict[int, tuple[int, int, T]] = {}  # lo -> (hi, size, item), ordered stages
        self._queue: deque[tuple[int, int, int, T]] = deque()  # (lo, hi, size, item), the others
        self.next = 0
        self.underway_bytes = 0

    def add(self, lo: int, hi: int, size: int, item: T) -> None:
        """Tasks [lo, hi) are settled; `size` bytes count against the credit."""
        assert lo < hi
        if self._ordered:
            assert lo >= self.next
            assert lo not in self._waiting
            self._waiting[lo] = (hi, size, item)
        else:
            self._queue.append((lo, hi, size, item))

    def ready(self) -> Iterator[tuple[int, int, T]]:
        """Take out what may be sent now."""
        while self.underway_bytes < self._credit_bytes:
            if self._ordered:
                entry = self._waiting.pop(self.next, None)
                if entry is None:
                    return
                lo, (hi, size, item) = self.next, entry
                self.next = hi
            elif self._queue:
                lo, hi, size, item = self._queue.popleft()
            else:
                return
            self.underway_bytes += size
            yield lo, hi, item

    def consumed(self, size: int) -> None:
        """The reader took `size` bytes."""
        self.underway_bytes = max(0, self.underway_bytes - size)

    def waiting(self) -> Iterator[T]:
        """Items that were not taken out yet, those needed last first: what to spill."""
        if self._ordered:
            for lo in sorted(self._waiting, reverse=True):
                yield self._waiting[lo][2]
        else:
            for entry in reversed(self._queue):
                yield entry[3]

    @property
    def empty(self) -> bool:
        """Nothing waits."""
        return not self._waiting and not self._queue
