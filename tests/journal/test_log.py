"""Records, blocks, and the rules of a Raft log."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grid.core.journal_frames import Frame, FrameWriter
from grid.core.journal_log import Log, LogReader, Outline
from grid.core.journal_records import (
    BLOCK_BYTES,
    FORMAT,
    Cut,
    Entry,
    Header,
    Mark,
    Slot,
    Snapshot,
    from_block,
    from_frame,
    to_block,
    to_frame,
)

HEADER = Header(FORMAT, b"j" * 32, 1, 1, 0)
U64 = st.integers(0, 2**64 - 1)


@given(st.one_of(st.builds(Entry, U64, U64, st.binary()), st.builds(Cut, U64), st.builds(Snapshot, U64, U64, st.binary())))
def test_records_survive_their_frames(record: Entry | Cut | Snapshot) -> None:
    assert from_frame(to_frame(record)) == record


@pytest.mark.parametrize("frame", [Frame(ord("E"), b"short"), Frame(ord("T"), b"123456789"), Frame(ord("H"), b""), Frame(0, b"")])
def test_frames_that_no_journal_writes_are_refused(frame: Frame) -> None:
    with pytest.raises(ValueError, match=r"record|not a"):
        from_frame(frame)


def test_a_block_is_read_back_and_no_flip_passes() -> None:
    slot = Slot(b"j" * 64, 2**63, 2**63, 2**63, b"v" * 64)
    block = to_block(slot)
    assert len(block) == BLOCK_BYTES
    assert from_block(block, Slot) == slot
    assert from_block(block, Mark) is None
    assert from_block(block[:-1], Slot) is None
    assert from_block(bytes(BLOCK_BYTES), Slot) is None
    for bit in range(BLOCK_BYTES * 8):
        flipped = bytearray(block)
        flipped[bit // 8] ^= 1 << bit % 8
        assert from_block(bytes(flipped), Slot) is None


def outline(*terms: int) -> Outline:
    made = Outline()
    for index, term in enumerate(terms, 1):
        made.apply(Entry(index, term, b""))
    return made


@pytest.mark.parametrize("record", [Entry(3, 2, b""), Entry(5, 2, b""), Entry(4, 1, b""), Cut(0), Cut(4)])
def test_what_does_not_follow_is_refused_and_changes_nothing(record: Entry | Cut) -> None:
    log = outline(1, 2, 2)
    with pytest.raises(ValueError, match=r"entry"):
        log.apply(record)
    assert log == outline(1, 2, 2)


def test_a_first_entry_has_a_term() -> None:
    with pytest.raises(ValueError, match="term 0"):
        Outline().apply(Entry(1, 0, b""))


@given(st.lists(st.integers(1, 4), max_size=12).map(sorted), st.data())
def test_outline_knows_what_a_plain_list_knows(terms: list[int], data: st.DataObject) -> None:
    log = Log()
    for index, term in enumerate(terms, 1):
        log.apply(Entry(index, term, b"%d" % index))
    known = {0: 0} | dict(enumerate(terms, 1))
    cuts, snaps = data.draw(st.tuples(st.booleans(), st.booleans()))
    if terms and cuts:
        first: int = data.draw(st.integers(1, len(terms)))
        log.apply(Cut(first))
        known = {index: term for index, term in known.items() if index < first}
    if snaps:
        index, term = data.draw(st.integers(1, len(terms) + 2)), data.draw(st.integers(1, 5))
        keeps = known.get(index) == term
        log.apply(Snapshot(index, term, b"s"))
        known = {index: term} | {i: t for i, t in known.items() if keeps and i > index}
    assert {index: log.outline.term_at(index) for index in range(20) if log.outline.term_at(index) is not None} == known
    assert [(entry.index, entry.term) for entry in log.entries] == [(i, t) for i, t in known.items() if i > min(known)]
    assert log.outline.last_index == max(known)
    assert log.outline.last_term == known[max(known)]


def test_an_older_snapshot_is_refused() -> None:
    log = Log()
    log.apply(Snapshot(5, 2, b""))
    for index, term in ((5, 2), (4, 2), (6, 1)):
        with pytest.raises(ValueError, match="older"):
            log.apply(Snapshot(index, term, b""))


@pytest.mark.parametrize(
    "records",
    [
        [Entry(1, 1, b"")],
        [HEADER, HEADER],
        [HEADER, Entry(2, 1, b"")],
        [HEADER, Entry(1, 2, b""), Entry(2, 1, b"")],
        [HEADER, Cut(1)],
    ],
)
def test_well_framed_nonsense_is_damage(records: list[Entry | Cut | Header]) -> None:
    reader = LogReader()
    reader.feed(FrameWriter().encode([to_frame(record) for record in records]))
    assert reader.finish().verdict == "damaged"


def test_a_mark_speaks_of_one_file_only() -> None:
    data = FrameWriter().encode([to_frame(Header(FORMAT, b"j", 1, 5, 0))])
    verdicts = []
    for mark in (None, Mark(4, 999), Mark(5, len(data)), Mark(5, len(data) + 1), Mark(6, 0)):
        reader = LogReader()
        reader.feed(data)
        verdicts.append(reader.finish(mark).verdict)
    assert verdicts == ["clean", "clean", "clean", "damaged", "damaged"]
