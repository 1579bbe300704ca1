"""What a consensus group writes and says: node ids, configurations, entries, snapshots, and the messages between members.

Rules: all are immutable arrays on the wire (dht.core.codec); each field is bounded where it is decoded; `decode` also checks
what holds between fields, so that the core may trust a message's shape, and never more than its shape. A message names
no group and no sender: the envelope that carries it does (group, sender's and receiver's node id), tied to a session.
"""

from __future__ import annotations

import enum
from typing import Annotated, Final, TypeAlias

import msgspec

from dht.core import codec
from grid.core.raft_limits import (
    APPEND_BYTES_MAX,
    APPEND_ENTRIES_MAX,
    ENTRY_BYTES_MAX,
    ENTRY_OVERHEAD_BYTES,
    INDEX_MAX,
    MEMBERS_MAX,
    NODE_BYTES_MAX,
    SNAPSHOT_BYTES_MAX,
    SNAPSHOT_CHUNK_BYTES,
)

Index: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=INDEX_MAX)]
Term: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=INDEX_MAX)]
Microseconds: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]


class NodeId(codec.Struct, array_like=True, frozen=True, order=True, gc=False):
    """A member: a peer and the incarnation of its journal.

    A replica that lost part of its journal "cannot safely rejoin the cluster with its prior identity" (section 3.8): it
    comes back under another incarnation, so that its old promises bind nobody and its new ones are not taken for the old
    one's. Draw the number at random when a journal is made (62 random bits): a peer that lost everything can't reuse it.
    """

    peer: Annotated[bytes, msgspec.Meta(min_length=1, max_length=NODE_BYTES_MAX)]
    incarnation: Annotated[int, msgspec.Meta(ge=0, le=1 << 62)] = 0


Members: TypeAlias = Annotated[tuple[NodeId, ...], msgspec.Meta(max_length=MEMBERS_MAX)]


class Config(codec.Struct, array_like=True, frozen=True, gc=False):
    """Who belongs to the group. Invariants of one that passes `check`: sorted, nobody twice, one incarnation of a peer."""

    voters: Members = ()
    learners: Members = ()

    @property
    def members(self) -> tuple[NodeId, ...]:
        """Everybody the leader replicates to, voters first."""
        return self.voters + self.learners

    @property
    def quorum(self) -> int:
        """How many voters make a majority."""
        return len(self.voters) // 2 + 1

    def fault(self) -> str:
        """What is wrong with it, or ""."""
        peers = [node.peer for node in self.members]
        if len(peers) > MEMBERS_MAX:
            return f"at most {MEMBERS_MAX} members are allowed"
        if len(set(peers)) != len(peers):
            return "a peer stands in it twice"
        if list(self.voters) != sorted(self.voters) or list(self.learners) != sorted(self.learners):
            return "its members are not sorted"
        return "" if self.voters else "it has no voters"


def config_of(voters: object, learners: object = ()) -> Config:
    """A Config of any iterables of NodeIds, sorted. Raises ValueError when it is none."""
    config = Config(tuple(sorted(voters)), tuple(sorted(learners)))  # type: ignore[call-overload]
    if config.fault():
        raise ValueError(f"no configuration: {config.fault()}")
    return config


class Kind(enum.IntEnum):
    """What an entry is for."""

    NOOP = 0  # a leader's first entry of its term
    DATA = 1
    CONFIG = 2


class Entry(codec.Struct, array_like=True, frozen=True, gc=False):
    """One entry of the log. `term`: of the leader that created it, never changed. `data` of a CONFIG: an encoded Config."""

    index: Annotated[int, msgspec.Meta(ge=1, le=INDEX_MAX)]
    term: Annotated[int, msgspec.Meta(ge=1, le=INDEX_MAX)]
    kind: Kind = Kind.DATA
    data: Annotated[bytes, msgspec.Meta(max_length=ENTRY_BYTES_MAX)] = b""

    @property
    def size_bytes(self) -> int:
        """What it counts for in all bounds."""
        return len(self.data) + ENTRY_OVERHEAD_BYTES

    @property
    def config(self) -> Config:
        """The configuration of a CONFIG entry. Raises CodecError."""
        return codec.decode(self.data, Config)


# ---- what a journal holds --------------------------------------------------------------------------------------------


class HardState(codec.Struct, array_like=True, frozen=True, gc=False, tag=1):
    """The term this member has reached, and whom it voted for in it."""

    term: Term = 0
    vote: NodeId | None = None


class Appended(codec.Struct, array_like=True, frozen=True, gc=False, tag=2):
    """Entries, contiguous. They replace everything from the first one's index on."""

    entries: tuple[Entry, ...]


class Snapshot(codec.Struct, array_like=True, frozen=True, gc=False, tag=3):
    """The state after entry `index`, and the configuration then. It replaces the log up to there."""

    index: Index = 0
    term: Term = 0
    config: Config = Config()
    data: Annotated[bytes, msgspec.Meta(max_length=SNAPSHOT_BYTES_MAX)] = b""


Record: TypeAlias = HardState | Appended | Snapshot
"""What `Persist` carries: a journal writes each as one checksummed record and folds them with `raft_log.Durable`."""


# ---- messages --------------------------------------------------------------------------------------------------------


class RequestVote(codec.Struct, array_like=True, frozen=True, gc=False, tag=1):
    """A candidate asks for a vote in `term`; pre: would you? (section 9.6). force: the leader told it to (section 4.2.3)."""

    term: Term
    last_index: Index
    last_term: Term
    pre: bool = False
    force: bool = False


class VoteReply(codec.Struct, array_like=True, frozen=True, gc=False, tag=2):
    """`term`: the voter's; of a granted pre-vote: the term that was asked for."""

    term: Term
    granted: bool
    pre: bool = False


class AppendEntries(codec.Struct, array_like=True, frozen=True, gc=False, tag=3):
    """A leader's entries after (prev_index, prev_term); without entries a heartbeat. sent_us: the leader's clock, echoed."""

    term: Term
    prev_index: Index
    prev_term: Term
    commit: Index
    entries: Annotated[tuple[Entry, ...], msgspec.Meta(max_length=APPEND_ENTRIES_MAX)] = ()
    sent_us: Microseconds = 0


class AppendReply(codec.Struct, array_like=True, frozen=True, gc=False, tag=4):
    """ok: the logs are equal up to `index`, on disk. Else `index` is the prev_index refused, and the hint says where the
    follower's log may still agree: at hint_index, whose term there is hint_term."""

    term: Term
    ok: bool
    index: Index
    hint_index: Index = 0
    hint_term: Term = 0
    sent_us: Microseconds = 0


class InstallSnapshot(codec.Struct, array_like=True, frozen=True, gc=False, tag=5):
    """A chunk of the leader's snapshot, in order; the last one ends at total_bytes."""

    term: Term
    index: Annotated[int, msgspec.Meta(ge=1, le=INDEX_MAX)]
    last_term: Annotated[int, msgspec.Meta(ge=1, le=INDEX_MAX)]
    config: Config
    offset: Annotated[int, msgspec.Meta(ge=0, le=SNAPSHOT_BYTES_MAX)]
    total_bytes: Annotated[int, msgspec.Meta(ge=0, le=SNAPSHOT_BYTES_MAX)]
    data: Annotated[bytes, msgspec.Meta(max_length=SNAPSHOT_CHUNK_BYTES)]
    sent_us: Microseconds = 0


class SnapshotReply(codec.Struct, array_like=True, frozen=True, gc=False, tag=6):
    """The follower has the first `offset` bytes of snapshot `index` and waits for more (once it has all: AppendReply)."""

    term: Term
    index: Index
    offset: Annotated[int, msgspec.Meta(ge=0, le=SNAPSHOT_BYTES_MAX)]
    sent_us: Microseconds = 0


class TimeoutNow(codec.Struct, array_like=True, frozen=True, gc=False, tag=7):
    """The leader hands over: start an election at once (section 3.10)."""

    term: Term


RaftMessage: TypeAlias = (
    RequestVote | VoteReply | AppendEntries | AppendReply | InstallSnapshot | SnapshotReply | TimeoutNow
)

_message_decoder: Final[msgspec.msgpack.Decoder[RaftMessage]] = msgspec.msgpack.Decoder(RaftMessage)
_record_decoder: Final[msgspec.msgpack.Decoder[Record]] = msgspec.msgpack.Decoder(Record)
_FAULTS: Final = (msgspec.MsgspecError, ValueError, RecursionError, OverflowError, MemoryError)


def encode(value: RaftMessage | Record | Config) -> bytes:
    """Canonical bytes of a message, a record or a configuration."""
    return codec.encode(value)


def decode(data: bytes | memoryview) -> RaftMessage:
    """The message that `data` holds, its fields consistent with each other. Raises CodecError on anything else."""
    try:
        message = _message_decoder.decode(data)
    except _FAULTS as error:
        raise codec.CodecError(f"not a consensus message: {error}") from None
    if why := _message_fault(message):
        raise codec.CodecError(f"not a consensus message: {why}")
    return message


def decode_record(data: bytes | memoryview) -> Record:
    """The journal record that `data` holds. Raises CodecError on anything else."""
    try:
        record = _record_decoder.decode(data)
    except _FAULTS as error:
        raise codec.CodecError(f"not a consensus record: {error}") from None
    why = ""
    if isinstance(record, Appended):
        first = record.entries[0].index if record.entries else 0
        why = entries_fault(first - 1, 0, INDEX_MAX, record.entries) if first else "it has no entries"
    elif isinstance(record, Snapshot) and record.index:
        why = record.config.fault()
    if why:
        raise codec.CodecError(f"not a consensus record: {why}")
    return record


def entries_fault(prev_index: int, prev_term: int, term: int, entries: tuple[Entry, ...]) -> str:
    """What is wrong with entries that claim to follow (prev_index, prev_term) in the log of a leader of `term`, or ""."""
    for number, entry in enumerate(entries, prev_index + 1):
        if entry.index != number:
            return "its entries are not numbered in sequence"
        if not prev_term <= entry.term <= term:
            return "the terms of its entries decrease or exceed its own"
        prev_term = entry.term
        if entry.kind is Kind.CONFIG:
            try:
                why = entry.config.fault()
            except codec.CodecError as error:
                why = str(error)
            if why:
                return f"an entry holds no configuration: {why}"
        elif entry.kind is Kind.NOOP and entry.data:
            return "a no-op carries data"
    return ""


def _message_fault(message: RaftMessage) -> str:
    """What is wrong between the fields, or ""."""
    if message.term == 0 and not isinstance(message, VoteReply | AppendReply):
        return "nobody leads or stands in term 0"
    if isinstance(message, AppendEntries):
        if message.prev_term > message.term or (message.prev_index == 0) != (message.prev_term == 0):
            return "the entry before its entries can't exist"
        size = sum(entry.size_bytes for entry in message.entries)
        if len(message.entries) > 1 and size > APPEND_BYTES_MAX:
            return f"{size} bytes of entries: at most {APPEND_BYTES_MAX} are allowed"
        return entries_fault(message.prev_index, message.prev_term, message.term, message.entries)
    if isinstance(message, InstallSnapshot):
        if message.last_term > message.term:
            return "its snapshot is of a later term"
        if message.offset + len(message.data) > message.total_bytes:
            return "its chunk reaches over the snapshot's end"
        if not message.data and message.total_bytes:
            return "its chunk is empty"
        return message.config.fault()
    if isinstance(message, RequestVote):
        if message.last_term >= message.term or (message.last_index == 0) != (message.last_term == 0):
            return "its log can't exist"
        return "a pre-vote can't be forced" if message.pre and message.force else ""
    if isinstance(message, AppendReply) and not message.ok and message.hint_index > message.index:
        return "its hint lies after what it refused"
    return ""
