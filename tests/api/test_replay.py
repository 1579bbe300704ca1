"""Cutting a map where it was cut before."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import grid
from grid.api import map_stage, replay, serialize, wire
from tests.api.fake_peer import FakePeer, driving
from tests.api.test_calls import square


def recorded(folder: Path, *stages: replay.StageCuts) -> str:
    path = folder / "cuts"
    replay.write(path, stages)
    return str(path)


def segment(items: list[Any]) -> bytes:
    """What a segment of these items is, however they came."""
    return b"".join(bytes(part) for part in serialize.dump_segment(items)[0])


def pausing(items: list[Any], pauses: dict[int, threading.Event]) -> Iterator[Any]:
    """The items; before those at `pauses` it waits."""
    for index, item in enumerate(items):
        if index in pauses:
            assert pauses[index].wait(20)
        yield item


@given(st.lists(st.integers(1, 50), max_size=30), st.data())
def test_cuts_give_back_what_was_recorded_also_after_a_cut_too_early(counts: list[int], data: st.DataObject) -> None:
    cuts = replay.Cuts(replay.stage_cuts("f", True, counts).runs)
    for count in counts:
        assert cuts.left == count
        if count > 1 and data.draw(st.booleans()):
            early = data.draw(st.integers(1, count - 1))
            cuts.cut(early)
            assert cuts.left == count - early
        cuts.cut(cuts.left)
    assert cuts.left == 0


def test_record_is_taken_in_the_order_of_opening_by_name_and_kind(tmp_path: Path) -> None:
    stages = [replay.stage_cuts("f", True, [1, 2, 2]), replay.stage_cuts("f", False, [5]), replay.stage_cuts("f", True, [7])]
    stages.append(replay.stage_cuts("f", True, [9], parent=(3, 4)))
    record = replay.Record(recorded(tmp_path, *stages))
    taken = [record.take("f", True, -1, -1), record.take("f", True, -1, -1), record.take("f", False, -1, -1)]
    assert [cuts and cuts.left for cuts in taken] == [1, 7, 5]
    assert record.take("f", True, -1, -1) is None
    assert record.take("g", True, -1, -1) is None
    assert stages[0].runs == ((1, 1), (2, 2))


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x93\x01\x02\x03", None])
def test_damaged_record_is_none(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "cuts").write_bytes(content)
    assert replay.Record(str(tmp_path / "cuts")).take("f", True, -1, -1) is None


CUTS = [1, 30, 2, 7, 60]
INPUTS: dict[str, list[Any]] = {
    "numbers": list(range(150)),
    "texts": [f"text{n}" for n in range(150)],
    "tuples": [(n, str(n)) for n in range(150)],
    "numbers_then_texts": [*range(20), *(f"text{n}" for n in range(130))],
    "mixed": [n if n % 3 else (None if n % 2 else (n, "x")) for n in range(150)],
}


@pytest.mark.parametrize("kind", ["list", "tuple", "generator", "paused"])
@pytest.mark.parametrize("name", INPUTS)
def test_map_is_cut_where_it_was_and_then_as_usual(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str) -> None:
    monkeypatch.setattr(map_stage, "STALL_S", 60.0)  # however busy the machine, these pauses are short
    items = INPUTS[name]
    pauses = {index: threading.Event() for index in (0, 5, 31, 33, 99)} if kind == "paused" else {}
    feed: Any = {"list": items, "tuple": tuple(items)}.get(kind, pausing(items, pauses))
    path = recorded(tmp_path, replay.stage_cuts("repr", True, CUTS))
    with driving(tmp_path / "peer", replay=path) as peer:
        results = grid.map(repr, feed)
        for index, event in pauses.items():
            full = sum(CUTS[: next(n for n in range(len(CUTS)) if sum(CUTS[: n + 1]) > index)])
            peer.wait_for(lambda full=full: sum(count for _, count, _ in peer.segments) >= full)
            event.set()
        assert list(results) == list(map(repr, items))
        first = 0
        for count, (_, tasks, data) in zip(CUTS, peer.segments, strict=False):
            assert (tasks, data) == (count, segment(items[first : first + count]))
            first += count
        assert sum(tasks for _, tasks, _ in peer.segments) == len(items)


def test_map_whose_input_pauses_within_a_recorded_segment_goes_on(tmp_path: Path) -> None:
    """The generator waits for a result of the segment that it feeds: no deadlock, and the next segments are as recorded."""
    arrived = threading.Event()
    items = [(n,) for n in range(40)]
    path = recorded(tmp_path, replay.stage_cuts("repr", True, [10, 20, 10]))
    with driving(tmp_path / "peer", replay=path) as peer:
        results = grid.map(repr, pausing(items, {14: arrived}))
        for n in range(14):
            assert next(results) == repr((n,))
        arrived.set()
        assert list(results) == [repr(item) for item in items[14:]]
        assert [tasks for _, tasks, _ in peer.segments] == [10, 4, 16, 10]


def test_input_shorter_than_the_record_ends(tmp_path: Path) -> None:
    path = recorded(tmp_path, replay.stage_cuts("square", True, [10, 20]))
    with driving(tmp_path / "peer", replay=path) as peer:
        assert list(grid.map(square, iter(range(15)))) == [x * x for x in range(15)]
        assert [tasks for _, tasks, _ in peer.segments] == [10, 5]


def test_large_item_in_the_middle_of_a_recorded_segment_is_sent_at_once(tmp_path: Path) -> None:
    """It may still be the caller's memory."""
    large = bytearray(b"x" * 200_000)
    path = recorded(tmp_path, replay.stage_cuts("len", True, [5]))
    with driving(tmp_path / "peer", replay=path) as peer:
        assert list(grid.map(len, iter([b"a", large, b"b"]))) == [1, 200_000, 1]
        assert [tasks for _, tasks, _ in peer.segments] == [2, 1]


def test_calls_are_not_cut_by_a_record(tmp_path: Path) -> None:
    path = recorded(tmp_path, replay.stage_cuts("square", False, [50]))
    with driving(tmp_path / "peer", replay=path) as peer:
        assert grid.submit(square, 3).result(20) == 9
        assert [tasks for _, tasks, _ in peer.segments] == [1]


def test_stage_says_of_what_kind_it_is(peer: FakePeer) -> None:
    list(grid.map(square, [1]))
    list(grid.map(pow, [1], [2]))
    grid.submit(square, 1).result(20)
    assert [stage.kind for stage in peer.of(wire.Stage)] == [serialize.ONE, serialize.MANY, serialize.CALL]


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_numbers_of_a_generator_give_the_same_bytes_however_they_were_taken(batch: int) -> None:
    writer = serialize.SegmentWriter()
    values: list[Any] = [*range(40), 1.5, None, 2**90, True]
    for at in range(0, len(values), batch):
        writer.add_scalars(values[at : at + batch])
    for value in ("text", 7, (1,), 8):
        writer.add(value)
    assert writer.count == len(values) + 4
    assert b"".join(bytes(part) for part in writer.finish()[0]) == segment([*values, "text", 7, (1,), 8])
