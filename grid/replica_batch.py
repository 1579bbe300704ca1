"""Facts on their way into a replicated log: numbered, batched into entries, followed until they are committed. No I/O.

Rules: order is kept; what is said while nothing is on its way leaves at once, else after BATCH_DELAY_S or with BATCH_BYTES;
facts for which nobody waits (`patient`) leave with others or after PATIENCE_S; a leadership that ends loses what was not
committed: whoever waits for it is told that nobody knows.
"""

from __future__ import annotations

import math
import struct
from collections import deque
from collections.abc import Sequence
from typing import Final

from dht.core import codec
from grid.core.facts import AnyFact
from grid.core.raft_limits import ENTRY_BYTES_MAX

BATCH_DELAY_S: Final = 0.02
"""Facts wait so long for company while others are on their way: an fsync and a round trip take about as much."""
PATIENCE_S: Final = 0.1
"""How long results may wait for company while nothing that stands behind them is to be shown: what a leader's death can cost
of its own workers' time. Each batch costs every replica a message, an fsync and an answer, at the expense of its tasks."""
BATCH_BYTES: Final = 256 << 10
"""Of one entry (one larger fact goes alone)."""
BATCH_FACTS: Final = 64
"""In one entry: a replica takes them in at once, and whoever waits for its process waits as long, tenths of a millisecond."""
BATCH_ENTRIES: Final = 1_024
"""Of BATCH_FACTS; more facts than these hold make longer entries: the core takes no more than 4,096 at once."""
PENDING_BYTES_MAX: Final = 8 << 20
"""Not committed: more than this, and who asks for room waits."""
BUSY_RETRY_S: Final = 0.1
"""After the core refused entries because too much is not committed; a commit retries at once."""


class Batch:
    """One member's. Sequence numbers grow through all its leaderships, from 1."""

    def __init__(self) -> None:
        self.issued = 0
        self.committed = 0
        self.pending_bytes = 0
        self._lost: list[tuple[int, int]] = []  # (after, up to): never to be known, one for each leadership that ended early
        self._waiting: deque[tuple[int, bytes]] = deque()  # (sequence, encoded fact)
        self._waiting_bytes = 0
        self._flying: deque[tuple[int, int, int]] = deque()  # (entry's index, last sequence, bytes)
        self._due_s = math.inf
        self._urgent = False  # somebody waits for what waits here
        self._held_s = -math.inf  # while the core refuses entries

    def add(self, facts: Sequence[AnyFact], now_s: float, patient: bool = False) -> int:
        """The last one's number. Raises ValueError for one that is too large: none is taken then."""
        encoded = [codec.encode(fact) for fact in facts]
        if any(len(data) + 5 > ENTRY_BYTES_MAX for data in encoded):
            raise ValueError(f"a fact of more than {ENTRY_BYTES_MAX} bytes")
        for data in encoded:
            self.issued += 1
            self._waiting.append((self.issued, data))
            self._waiting_bytes += len(data)
            self.pending_bytes += len(data)
        if self._waiting and patient:
            self._due_s = min(self._due_s, now_s + PATIENCE_S)
        else:
            self.hurry(now_s)
        return self.issued

    def hurry(self, now_s: float) -> None:
        """What waits here is waited for."""
        if self._waiting:
            self._urgent = True
            self._due_s = min(self._due_s, now_s + BATCH_DELAY_S)

    def waits(self, sequence: int) -> bool:
        """Whether that fact has not been asked for by `entries`."""
        return bool(self._waiting) and sequence >= self._waiting[0][0]

    def due_s(self) -> float:
        """When to ask `entries` next."""
        if not self._waiting or self._held_s > -math.inf:
            return self._held_s if self._waiting else math.inf
        return -math.inf if (self._urgent and not self._flying) or self._waiting_bytes >= BATCH_BYTES else self._due_s

    def entries(self) -> list[tuple[bytes, int]]:
        """(payload, last sequence) of all that waits, cut into entries: to be proposed now; then `proposed` or `refused`."""
        entries: list[tuple[bytes, int]] = []
        part: list[bytes] = []
        size = 0
        facts_max = max(BATCH_FACTS, -(-len(self._waiting) // BATCH_ENTRIES))
        for number, data in self._waiting:
            if part and (size + len(data) > BATCH_BYTES or len(part) >= facts_max):
                entries.append((_join(part), number - 1))
                part, size = [], 0
            part.append(data)
            size += len(data)
        if part:
            entries.append((_join(part), self._waiting[-1][0]))
        return entries

    def proposed(self, first_index: int, entries: Sequence[tuple[bytes, int]]) -> None:
        """What `entries` gave is in the log from this index on."""
        for index, (payload, last) in enumerate(entries, first_index):
            self._flying.append((index, last, len(payload)))
        self._forget_waiting()
        self.pending_bytes = sum(size for _, _, size in self._flying)

    def refused(self, now_s: float) -> None:
        """The core takes nothing now."""
        self._held_s = now_s + BUSY_RETRY_S

    def applied(self, index: int) -> None:
        """Entry `index` is committed and applied."""
        self._held_s = -math.inf
        while self._flying and self._flying[0][0] <= index:
            _, self.committed, size = self._flying.popleft()
            self.pending_bytes -= size

    def lose(self) -> None:
        """The leadership ended."""
        if self.issued > self.committed:
            self._lost.append((self.committed, self.issued))
        self.committed = self.issued
        self._flying.clear()
        self._forget_waiting()
        self.pending_bytes = 0

    def _forget_waiting(self) -> None:
        self._waiting.clear()
        self._waiting_bytes = 0
        self._due_s, self._held_s = math.inf, -math.inf
        self._urgent = False

    def is_lost(self, sequence: int) -> bool:
        """Whether nobody will know of it."""
        return any(after < sequence <= last for after, last in self._lost)


def _join(encoded: list[bytes]) -> bytes:
    """One array of these values: the bytes of `facts.encode` (msgpack: fixarray, array 16)."""
    count = len(encoded)
    assert 0 < count < 1 << 16
    head = bytes([0x90 | count]) if count < 16 else b"\xdc" + struct.pack(">H", count)
    return head + b"".join(encoded)
