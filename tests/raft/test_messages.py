"""What is received is checked in every field and between fields, before the core sees it."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dht.core.codec import CodecError
from grid.core import raft_limits as limits
from grid.core.raft_messages import (
    Appended,
    AppendEntries,
    AppendReply,
    Config,
    Entry,
    HardState,
    InstallSnapshot,
    Kind,
    NodeId,
    RaftMessage,
    Record,
    RequestVote,
    Snapshot,
    SnapshotReply,
    TimeoutNow,
    VoteReply,
    config_of,
    decode,
    decode_record,
    encode,
)
from tests.raft.world import node

THREE = config_of(node(n) for n in (1, 2, 3))
CHANGE = Entry(2, 1, Kind.CONFIG, encode(THREE))
GOOD: list[RaftMessage] = [
    RequestVote(2, 1, 1),
    RequestVote(2, 0, 0, pre=True),
    VoteReply(0, False),
    AppendEntries(1, 0, 0, 0),
    AppendEntries(3, 1, 1, 1, (CHANGE, Entry(3, 3, Kind.NOOP), Entry(4, 3, Kind.DATA, b"x")), 5),
    AppendEntries(1, 1, 1, 1, (Entry(2, 1, Kind.DATA, b"x" * limits.ENTRY_BYTES_MAX),)),
    AppendReply(0, False, 5, 4, 1),
    InstallSnapshot(2, 1, 1, THREE, 0, 0, b""),
    SnapshotReply(1, 1, 3),
    TimeoutNow(1),
]
BAD: list[RaftMessage] = [
    RequestVote(0, 0, 0),
    RequestVote(1, 1, 1),
    RequestVote(2, 0, 1),
    RequestVote(2, 1, 1, True, True),
    RequestVote(2, limits.INDEX_MAX + 1, 1),
    RequestVote(-1, 1, 1),
    AppendEntries(0, 0, 0, 0),
    AppendEntries(1, 1, 2, 0),
    AppendEntries(1, 1, 0, 0),
    AppendEntries(1, 0, 1, 0),
    AppendEntries(1, 1, 1, -1),
    AppendEntries(3, 1, 1, 1, (Entry(3, 1),)),
    AppendEntries(3, 1, 1, 1, (Entry(2, 1), Entry(2, 1))),
    AppendEntries(3, 1, 1, 1, (Entry(2, 2), Entry(3, 1))),
    AppendEntries(3, 1, 1, 1, (Entry(2, 4),)),
    AppendEntries(3, 1, 1, 1, (Entry(2, 2, Kind.CONFIG, b"x"),)),
    AppendEntries(3, 1, 1, 1, (Entry(2, 2, Kind.CONFIG, encode(Config())),)),
    AppendEntries(3, 1, 1, 1, (Entry(2, 2, Kind.CONFIG, encode(Config((node(1), node(1, 1))))),)),
    AppendEntries(3, 1, 1, 1, (Entry(2, 2, Kind.NOOP, b"x"),)),
    AppendEntries(1, 1, 1, 1, (Entry(2, 1, Kind.DATA, b"x" * (limits.ENTRY_BYTES_MAX + 1)),)),
    AppendEntries(1, 1, 1, 1, tuple(Entry(i, 1, Kind.DATA, b"x" * 200_000) for i in (2, 3))),
    AppendEntries(1, 1, 1, 1, tuple(Entry(i, 1) for i in range(2, limits.APPEND_ENTRIES_MAX + 3))),
    AppendReply(1, False, 5, 6, 1),
    InstallSnapshot(1, 1, 2, THREE, 0, 0, b""),
    InstallSnapshot(2, 1, 1, Config(), 0, 0, b""),
    InstallSnapshot(2, 1, 1, THREE, 2, 3, b"xy"),
    InstallSnapshot(2, 1, 1, THREE, 0, 3, b""),
    InstallSnapshot(2, 0, 1, THREE, 0, 0, b""),
    InstallSnapshot(2, 1, 1, THREE, 0, limits.SNAPSHOT_BYTES_MAX + 1, b"x"),
    InstallSnapshot(2, 1, 1, THREE, 0, 1 << 20, b"x" * (limits.SNAPSHOT_CHUNK_BYTES + 1)),
    InstallSnapshot(2, 1, 1, Config(tuple(node(n) for n in range(limits.MEMBERS_MAX + 1))), 0, 0, b""),
    InstallSnapshot(2, 1, 1, Config((NodeId(b""),)), 0, 0, b""),
    InstallSnapshot(2, 1, 1, Config((NodeId(b"x" * 33),)), 0, 0, b""),
    TimeoutNow(0),
]
RECORDS: list[Record] = [HardState(3, node(1)), HardState(), Appended((CHANGE, Entry(3, 1))), Snapshot(4, 2, THREE, b"x")]
BAD_RECORDS: list[Record] = [Appended(()), Appended((Entry(2, 1), Entry(4, 1))), Snapshot(4, 2, Config(), b"x"), HardState(-1)]


def repr_of(value: object) -> str:
    return type(value).__name__


@pytest.mark.parametrize("message", GOOD, ids=repr_of)
def test_good_message_arrives_as_it_was_sent(message: RaftMessage) -> None:
    assert decode(encode(message)) == message


@pytest.mark.parametrize("message", BAD, ids=repr_of)
def test_bad_message_is_refused(message: RaftMessage) -> None:
    with pytest.raises(CodecError):
        decode(encode(message))


@pytest.mark.parametrize("record", RECORDS, ids=repr_of)
def test_record_is_read_as_it_was_written(record: Record) -> None:
    assert decode_record(encode(record)) == record


@pytest.mark.parametrize("record", BAD_RECORDS, ids=repr_of)
def test_bad_record_is_refused(record: Record) -> None:
    with pytest.raises(CodecError):
        decode_record(encode(record))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=64))
def test_noise_raises_codec_errors_only(data: bytes) -> None:
    for read in (decode, decode_record):
        try:
            read(data)
        except CodecError:
            continue


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(GOOD), st.integers(0, 10), st.one_of(st.integers(), st.none(), st.binary(), st.lists(st.integers())))
def test_message_with_one_field_replaced(message: RaftMessage, place: int, value: object) -> None:
    """Either it is refused, or it is a message that keeps the rules (and so encodes and decodes again)."""
    fields = list(msgspec.msgpack.decode(encode(message)))
    fields[place % len(fields)] = value
    try:
        read = decode(msgspec.msgpack.encode(fields))
    except (CodecError, OverflowError):
        return
    assert decode(encode(read)) == read


def test_fits_one_message_of_the_transport() -> None:
    """The largest of each kind stays below 1 MiB."""
    entries = tuple(Entry(i, 1, Kind.DATA, b"") for i in range(2, limits.APPEND_ENTRIES_MAX + 2))
    assert len(encode(AppendEntries(1, 1, 1, 1, entries))) < 1 << 20
    assert len(encode(GOOD[5])) < 1 << 20
    members = Config(tuple(NodeId(b"%032d" % n, 1 << 60) for n in range(limits.MEMBERS_MAX)))
    big = InstallSnapshot(2, 1, 1, members, 0, limits.SNAPSHOT_CHUNK_BYTES, b"x" * limits.SNAPSHOT_CHUNK_BYTES)
    assert len(encode(big)) < 1 << 20


def test_configuration_helper_sorts_and_refuses() -> None:
    assert config_of([node(3), node(1)]).voters == (node(1), node(3))
    with pytest.raises(ValueError, match="twice"):
        config_of([node(1)], [node(1, 2)])
    with pytest.raises(ValueError, match="no voters"):
        config_of([])
