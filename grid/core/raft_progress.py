"""What a leader knows of one follower's log, and what it has on its way to it.

Three modes: PROBE (where do the logs agree? one message at a time), REPLICATE (they agree up to match; appends are pipelined
ahead of the answers), SNAPSHOT (what it lacks is not in the log any more).
"""

from __future__ import annotations

import enum
from collections import deque

from grid.core.raft_limits import INFLIGHT_APPENDS_MAX, INFLIGHT_BYTES_MAX
from grid.core.raft_messages import Entry, Snapshot


class Mode(enum.Enum):
    """How a follower is served."""

    PROBE = "probe"
    REPLICATE = "replicate"
    SNAPSHOT = "snapshot"


class Progress:
    """Invariants: match < next; in REPLICATE the entries [match + 1, next) are on their way; match never falls."""

    __slots__ = ("_inflight", "_inflight_bytes", "contact_s", "match", "mode", "next", "offset", "paused", "snapshot")

    def __init__(self, next_index: int, now_s: float) -> None:
        self.match = 0
        self.next = next_index
        self.mode = Mode.PROBE
        self.paused = False  # PROBE: an append is on its way
        self.snapshot: Snapshot | None = None
        self.offset = 0  # SNAPSHOT: bytes the follower has
        self.contact_s = now_s  # when the newest message it answered was sent: it followed this leader then
        self._inflight: deque[tuple[int, int]] = deque()  # (last index, bytes) of appends, ascending
        self._inflight_bytes = 0

    def __repr__(self) -> str:
        return f"{self.mode.value} match={self.match} next={self.next} inflight={len(self._inflight)}"

    def blocked(self) -> bool:
        """Whether no entries may be sent before it answers."""
        if self.mode is Mode.REPLICATE:
            return len(self._inflight) >= INFLIGHT_APPENDS_MAX or self._inflight_bytes >= INFLIGHT_BYTES_MAX
        return self.mode is Mode.SNAPSHOT or self.paused

    def sent(self, entries: tuple[Entry, ...]) -> None:
        """Entries from `next` on were sent."""
        if self.mode is Mode.REPLICATE:
            size = sum(entry.size_bytes for entry in entries)
            self.next = entries[-1].index + 1
            self._inflight.append((self.next - 1, size))
            self._inflight_bytes += size
        else:
            self.paused = True

    def matched(self, index: int) -> None:
        """The follower's log is the leader's up to `index`, on its disk."""
        self.match = max(self.match, index)
        while self._inflight and self._inflight[0][0] <= index:
            self._inflight_bytes -= self._inflight.popleft()[1]
        if self.mode is not Mode.REPLICATE:
            self._enter(Mode.REPLICATE)
            self.next = self.match + 1
        self.next = max(self.next, self.match + 1)

    def probe(self, next_index: int) -> None:
        """The logs may disagree before `next`: look from next_index on."""
        self._enter(Mode.PROBE)
        self.next = max(self.match + 1, next_index)

    def give_snapshot(self, snapshot: Snapshot) -> None:
        """It needs the snapshot."""
        self._enter(Mode.SNAPSHOT)
        self.snapshot = snapshot
        self.next = snapshot.index + 1

    def _enter(self, mode: Mode) -> None:
        self.mode, self.paused, self.snapshot, self.offset = mode, False, None, 0
        self._inflight.clear()
        self._inflight_bytes = 0
