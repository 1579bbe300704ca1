"""The items of a segment, told apart without unpickling, against segments that the driver's own writer makes of each alone."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grid.api.serialize import CALL, MANY, ONE, ClassTable, SegmentWriter, note_ref, pickle_call
from grid.core.items import Keys, NotItemsError, digest, kind_of, split


class Ref:
    """Names a blob when it is pickled, as grid.Ref does."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __reduce__(self) -> tuple[Any, ...]:
        note_ref(self.name)
        return Ref, (self.name,)


def calls(*arguments: Any, table: ClassTable | None = None) -> bytes:
    """A segment of one call for each argument."""
    table = table or ClassTable()
    writer = SegmentWriter(CALL, table)
    for argument in arguments:
        writer.add_pickled(pickle_call((argument,), {"key": argument} if argument == 3 else None, table))
    return b"".join(bytes(part) for part in writer.finish()[0])


def of(kind: int, values: list[Any]) -> bytes:
    writer = SegmentWriter(kind)
    for value in values:
        writer.add(value)
    return b"".join(bytes(part) for part in writer.finish()[0])


def match(one: Keys, other: Keys) -> bool:
    return not set(one).isdisjoint(other)


values = st.one_of(
    st.integers(), st.text(max_size=30), st.binary(max_size=30), st.lists(st.integers(), max_size=5), st.just(bytes(70_000))
)


@given(st.lists(values, min_size=1, max_size=6))
def test_key_is_the_digest_of_a_segment_with_the_item_alone(arguments: list[Any]) -> None:
    assert split(calls(*arguments)) == [(digest(calls(argument)),) for argument in arguments]


def test_large_buffers_lie_elsewhere_in_company() -> None:
    large = [bytearray(random.Random(seed).randbytes(100_000)) for seed in range(3)]
    together = split(calls(1, large[0], "x", large[1], large[2]))
    assert together == [(digest(calls(argument)),) for argument in (1, large[0], "x", large[1], large[2])]
    assert len(set(together)) == 5


def test_items_of_a_segment_that_reads_blobs_match_with_and_without() -> None:
    """Which of them do is not said."""
    keys = split(calls(1, Ref("ab"), 2))
    alone = [digest(calls(1)), digest(calls(Ref("ab"))), digest(calls(2))]
    assert all(match(own, (key,)) for own, key in zip(keys, alone, strict=True))
    assert not match(keys[0], keys[1])
    assert not match(keys[0], keys[2])
    assert all(match(own, other) for own, other in zip(keys, split(calls(1, Ref("ab"), 2, Ref("cd"))), strict=False))
    assert [match(keys[at], other) for at, other in ((0, split(calls(1, 5))[0]), (2, split(calls(2, 5))[0]))] == [True, True]


def test_classes_count_for_the_items_that_name_one() -> None:
    class Point:
        def __init__(self, x: int) -> None:
            self.x = x

    Point.__module__ = "__main__"  # so that it travels by value
    keys = split(calls(1, Point(2), 3))
    assert keys[0] == (digest(calls(1)),)
    assert keys[1] == (digest(calls(Point(2))),)
    assert keys[2] == (digest(calls(3)),)


def test_same_index_into_other_classes_is_another_item() -> None:
    def a_class(value: int) -> type:
        made = type("Point", (), {"value": value})
        made.__module__ = "__main__"
        return made

    one, other = split(calls(1, a_class(1)()))[1], split(calls(1, a_class(2)()))[1]
    assert not match(one, other)


@pytest.mark.parametrize("data", [of(ONE, [1, 2, 3]), of(MANY, [(1, 2), (3, 4)]), b"", b"g1", b"other bytes", bytes(100)])
def test_what_holds_no_calls(data: bytes) -> None:
    with pytest.raises(NotItemsError):
        split(data)


def test_kind_is_in_the_header() -> None:
    assert [kind_of(of(ONE, [1])), kind_of(of(MANY, [(1, 2)])), kind_of(calls(1))] == [ONE, MANY, CALL]
    assert [kind_of(b""), kind_of(b"g1\x02"), kind_of(b"x" * 64)] == [-1, -1, -1]


@given(st.data())
def test_damaged_segment_raises_nothing_else(data: st.DataObject) -> None:
    raw = bytearray(calls(1, bytearray(70_000), "x"))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(3, 140))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)))]
    try:
        keys = split(bytes(raw))
    except NotItemsError:
        return
    assert all(keys)
