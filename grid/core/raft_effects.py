"""What goes into the consensus core and what comes out.

Events go in one at a time with the time; effects come out as a list and are carried out in its order:
- `Persist` is on disk (fsync) before the next effect is begun. Effects of several calls may be carried out together: all
  their Persists first, in order, with one fsync, then all others in order. (An earlier Persist promises nothing.)
- a Send may be lost, delayed, repeated; a process may die between any two effects, and within a Persist (records are
  written in order, each whole or not at all; of an Appended any first part of its entries may survive).
Each Persist and Send names the point in the protocol where it stands: a stable name for tests that kill there.
"""

from __future__ import annotations

import enum
from typing import TypeAlias

import msgspec

from grid.core.raft_messages import Config, Entry, NodeId, RaftMessage, Record, Snapshot


class Point(enum.StrEnum):
    """Where in the protocol something is written or sent. Names are stable: simulations enumerate them."""

    PERSIST_FOUNDING = "persist.founding"
    PERSIST_TERM = "persist.term"
    PERSIST_VOTE = "persist.vote"
    PERSIST_CANDIDACY = "persist.candidacy"
    PERSIST_LEADER_ENTRIES = "persist.leader-entries"
    PERSIST_FOLLOWER_ENTRIES = "persist.follower-entries"
    PERSIST_INSTALLED_SNAPSHOT = "persist.installed-snapshot"
    PERSIST_OWN_SNAPSHOT = "persist.own-snapshot"
    SEND_PRE_VOTE = "send.pre-vote"
    SEND_PRE_VOTE_REPLY = "send.pre-vote-reply"
    SEND_VOTE_REQUEST = "send.vote-request"
    SEND_VOTE = "send.vote"
    SEND_APPEND = "send.append"
    SEND_HEARTBEAT = "send.heartbeat"
    SEND_APPEND_REPLY = "send.append-reply"
    SEND_SNAPSHOT_CHUNK = "send.snapshot-chunk"
    SEND_SNAPSHOT_REPLY = "send.snapshot-reply"
    SEND_TIMEOUT_NOW = "send.timeout-now"


class Why(enum.StrEnum):
    """Why a request to the core was refused, or a leader stepped down."""

    NOT_LEADER = "not the leader"
    TRANSFERRING = "leadership is being handed over"
    TOO_LARGE = "an entry is too large, or there are too many"
    BUSY = "too much is not committed yet"
    NO_OWN_COMMIT = "no entry of the leader's own term is committed yet"
    CHANGE_PENDING = "the last change of members is not committed yet"
    ONE_AT_A_TIME = "voters can be added or removed only one at a time"
    NOT_CAUGHT_UP = "only a learner that has caught up can become a voter"
    NO_CHANGE = "it changes nothing"
    BAD_CONFIG = "it is no valid configuration"
    NO_TARGET = "no other voter can take over"
    BAD_SNAPSHOT = "the snapshot is too large, or not of a committed entry after the last one"
    HIGHER_TERM = "a higher term began"
    LOST_QUORUM = "a majority was not heard for an election timeout"
    REMOVED = "it is no voter any more"


class _Value(msgspec.Struct, frozen=True, gc=False):
    """Base: an immutable value."""


# ---- events ----------------------------------------------------------------------------------------------------------


class Tick(_Value, frozen=True):
    """Time has passed. Only needed when a WakeAt is due; more do no harm."""


class Receive(_Value, frozen=True):
    """A message that raft_messages.decode returned, with the two ends its envelope names."""

    sender: NodeId
    to: NodeId
    message: RaftMessage


class Propose(_Value, frozen=True):
    """Append these payloads, all or none. Answered by Proposed or Refused."""

    payloads: tuple[bytes, ...]


class Change(_Value, frozen=True):
    """Make this the group's configuration. Answered by Proposed or Refused."""

    config: Config


class Transfer(_Value, frozen=True):
    """Hand leadership to `target`, or to the voter that has most of the log. Refused, TransferAborted, or SteppedDown."""

    target: NodeId | None = None


class Compacted(_Value, frozen=True):
    """The state machine's state after committed entry `index`, serialised: the log before it may go."""

    index: int
    data: bytes


class Disconnected(_Value, frozen=True):
    """The connection to this member broke: if it leads, it may be dead."""

    node: NodeId


Event: TypeAlias = Tick | Receive | Propose | Change | Transfer | Compacted | Disconnected


# ---- effects ---------------------------------------------------------------------------------------------------------


class Persist(_Value, frozen=True):
    """Write the records to the journal, in order, and fsync, before anything after it is done."""

    point: Point
    records: tuple[Record, ...]


class Send(_Value, frozen=True):
    """Send to another member; it may get lost."""

    point: Point
    to: NodeId
    message: RaftMessage


class Commit(_Value, frozen=True):
    """These entries are final: apply them, in order, each once in this process's life (after ApplySnapshot)."""

    entries: tuple[Entry, ...]


class ApplySnapshot(_Value, frozen=True):
    """The state machine's state becomes this one; commits go on after it."""

    snapshot: Snapshot


class SnapshotWanted(_Value, frozen=True):
    """The log has grown: hand in Compacted with the state after some committed entry, soon. Asked once for each snapshot."""

    index: int


class Proposed(_Value, frozen=True):
    """The proposal's entries are [first, last] of term. They are final when a Commit shows them with this term."""

    term: int
    first: int
    last: int


class Refused(_Value, frozen=True):
    """The Propose, Change, Transfer or Compacted just handed in had no effect."""

    why: Why


class BecameLeader(_Value, frozen=True):
    """This member leads `term`. Earlier facts are all known once the NOOP of this term is committed."""

    term: int


class SteppedDown(_Value, frozen=True):
    """This member leads `term` no more. What it proposed may be committed or not."""

    term: int
    why: Why


class LeaderKnown(_Value, frozen=True):
    """Another member leads `term`."""

    term: int
    leader: NodeId


class TransferAborted(_Value, frozen=True):
    """The target did not take over in time: this member goes on leading."""

    target: NodeId


class WakeAt(_Value, frozen=True):
    """Hand in a Tick at this time (the clock of `handle`); replaces the time asked for before. inf: no need."""

    time_s: float


Effect: TypeAlias = (
    Persist
    | Send
    | Commit
    | ApplySnapshot
    | SnapshotWanted
    | Proposed
    | Refused
    | BecameLeader
    | SteppedDown
    | LeaderKnown
    | TransferAborted
    | WakeAt
)
