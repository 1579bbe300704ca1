"""What is in one entry of a job's log."""

from __future__ import annotations

from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dht.core.codec import CodecError
from grid.core.bundle import StageOptions
from grid.core.facts import (
    AnyFact,
    Ended,
    Output,
    RangeCancelled,
    RangeDone,
    Redo,
    SegmentsCut,
    StageClosed,
    StageOpened,
    Stored,
    TaskFailed,
    Told,
    decode,
    encode,
)

BLOB = Stored(b"b" * 32, 1 << 20, 64, 128, (b"p" * 20, b"q" * 20))
EXAMPLES: list[AnyFact] = [
    StageOpened(3, b"f" * 32, 100, "count", True, StageOptions(retries=2, tags=("gpu",)), (1, 7)),
    SegmentsCut(3, 0, ((10, 64, b"d" * 16), (1, 9, b"e" * 16)), b"bytes"),
    SegmentsCut(3, 11, ((10, 64, b"d" * 16),), BLOB),
    StageClosed(3, 21),
    RangeDone(3, 0, 5, 0, b"inline", b"p" * 20, 1234),
    RangeDone(3, 2, 4, -9, BLOB, b"p" * 20, 0, 77),
    RangeDone(3, 4, 5, 4, None, b""),
    TaskFailed(3, 9, "raised", "ValueError", "no", "trace", b"pickle", b"p" * 20, 4),
    RangeCancelled(3, 10, -1),
    Redo(3, 0, 5),
    Output(1, 4096, b"line\n"),
    Ended(b"outcome"),
    Told("differs"),
]


def test_every_fact_survives_the_log() -> None:
    assert decode(encode(EXAMPLES)) == tuple(EXAMPLES)
    for fact in EXAMPLES:
        assert decode(encode([fact])) == (fact,)
    assert decode(encode([])) == ()


def test_no_kind_is_without_an_example() -> None:
    assert {type(fact) for fact in EXAMPLES} == set(get_args(AnyFact))


def test_tags_are_unique() -> None:
    tags = [kind.__struct_config__.tag for kind in get_args(AnyFact)]
    assert len(tags) == len(set(tags))


@pytest.mark.parametrize(
    ("fact", "known"),
    [(RangeDone(3, 0, 5, 0, b"x", b"p"), 6), (TaskFailed(3, 9, "raised", "", "", "", b""), 7), (SegmentsCut(3, 0, ()), 3)],
)
def test_fields_added_later_have_defaults(fact: AnyFact, known: int) -> None:
    raw = msgspec.msgpack.decode(encode([fact]))[0]
    assert decode(msgspec.msgpack.encode([raw[: 1 + known]])) == (fact,)
    assert decode(msgspec.msgpack.encode([[*raw, "of a later version"]])) == (fact,)


@pytest.mark.parametrize("raw", [None, 5, [5], [[99, 1]], [[8, 1, 0]], [[8, 1, "x", b""]], [[4, 0, 0, 1, 0, 5, b""]], {"a": []}])
def test_what_is_no_batch_of_facts(raw: Any) -> None:
    with pytest.raises(CodecError):
        decode(msgspec.msgpack.encode(raw))


@given(st.data())
def test_damaged_entry_raises_nothing_but_codec_error(data: st.DataObject) -> None:
    raw = bytearray(encode(EXAMPLES))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        again = decode(bytes(raw))
    except CodecError:
        return
    assert isinstance(again, tuple)
