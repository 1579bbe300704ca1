"""Every bound and time of the consensus core, with its reason. Units stand last in the names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

HEARTBEAT_S: Final = 0.2
"""Between a leader's heartbeats: several may be lost within one election timeout before anybody doubts the leader."""
ELECTION_S: Final = 1.2
"""The shortest election timeout; the timeouts drawn lie in [ELECTION_S, 2 x ELECTION_S). A dead leader is replaced in about
1.6 s, yet a peer whose disk or interpreter stalls for a second keeps its leadership."""
DOUBT_S: Final = 0.15
"""A follower whose connection to the leader broke stands within this time, by chance: so that one stands before the others, and
after they lost their connections, too."""

ENTRY_BYTES_MAX: Final = 768 << 10
"""Data of one entry: with its envelope it must fit one message of the transport (1 MiB)."""
ENTRY_OVERHEAD_BYTES: Final = 64
"""What an entry costs beside its data, in memory and on disk, so that many tiny entries count too."""
APPEND_ENTRIES_MAX: Final = 1_024
"""Entries in one AppendEntries: bounds what a receiver decodes and writes at once."""
APPEND_BYTES_MAX: Final = 256 << 10
"""Entry bytes in one AppendEntries (one longer entry goes alone): a longer one would delay heartbeats behind it."""
INFLIGHT_APPENDS_MAX: Final = 8
"""AppendEntries with entries a follower has not answered: enough to hide a disk's and a network's latency."""
INFLIGHT_BYTES_MAX: Final = 1 << 20
"""Entry bytes a follower has not answered: a quarter of the transport's outbox for one peer."""
PROPOSAL_ENTRIES_MAX: Final = 4_096
"""Entries proposed at once: what one write to disk should hold."""
UNCOMMITTED_BYTES_MAX: Final = 16 << 20
"""Entry bytes a leader takes before they are committed; then proposals are refused as BUSY: a leader that a majority
follows slowly pushes back instead of growing."""
LOG_BYTES_SNAPSHOT: Final = 4 << 20
"""Entry bytes after the last snapshot at which a new one is asked for: about what a ledger's snapshot holds itself, so that
disk use and restart time stay within a small factor of the state."""
LOG_TRAIL_BYTES_MAX: Final = 1 << 20
"""Entry bytes before a snapshot that stay in memory, so that a follower a moment behind needs no snapshot."""
SNAPSHOT_CHUNK_BYTES: Final = 256 << 10
"""One chunk of a snapshot: a sign of life with each, and no heartbeat waits long behind one."""
SNAPSHOT_BYTES_MAX: Final = 64 << 20
"""A snapshot that is accepted: far above a ledger's (a few MB), far below what would hurt a replica's memory."""
MEMBERS_MAX: Final = 32
"""Voters and learners of one group: a leader sends to each, and a hostile configuration can't grow tables."""
CATCH_UP_ENTRIES_MAX: Final = 1_024
"""Entries a learner may lack when it is made a voter: one AppendEntries, far less than an election timeout (section 4.2.1)."""
NODE_BYTES_MAX: Final = 32
"""A peer's id in a node id (PeerIds have 20 bytes)."""
INDEX_MAX: Final = 1 << 48
"""Indexes and terms that are accepted: far over what a job can reach, exact in every number format."""


@dataclass(frozen=True, slots=True)
class Timing:
    """The two times a group runs on; all its members should agree roughly. heartbeat_s must be well below election_s."""

    heartbeat_s: float = HEARTBEAT_S
    election_s: float = ELECTION_S

    def __post_init__(self) -> None:
        if not 0 < self.heartbeat_s * 2 <= self.election_s:
            raise ValueError("an election timeout must span at least two heartbeats")
