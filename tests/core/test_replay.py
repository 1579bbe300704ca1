"""What a driver that is started anew takes from the record: stages by function and first segment, results by place or content."""

from __future__ import annotations

from typing import Any

import pytest

from grid.api.serialize import CALL, ONE, SegmentWriter, pickle_call
from grid.core.bundle import StageOptions
from grid.core.chronicle import Chronicle
from grid.core.facts import AnyFact, RangeCancelled, RangeDone, Redo, SegmentsCut, StageOpened, Stored, TaskFailed, Where
from grid.core.items import digest
from grid.core.replay import Replay, Reuse, Verdict

F, G = b"f" * 32, b"g" * 32
P = b"p" * 20
OPTIONS = StageOptions()


def segment(*arguments: Any, kind: int = CALL) -> bytes:
    writer = SegmentWriter(kind)
    for argument in arguments:
        if kind == CALL:
            writer.add_pickled(pickle_call((argument,), None, writer._table))
        else:
            writer.add(argument)
    return b"".join(bytes(part) for part in writer.finish()[0])


def opened(stage: int, function: bytes = F, *, ordered: bool = False, parent: tuple[int, int] | None = None) -> StageOpened:
    return StageOpened(stage, function, 1, "count", ordered, OPTIONS, parent)


def cut(stage: int, first: int, count: int, data: bytes, arguments: Where = None) -> SegmentsCut:
    return SegmentsCut(stage, first, ((count, len(data), digest(data)),), arguments if arguments is not None else data)


def done(stage: int, lo: int, hi: int, result: Where = b"r", first: int | None = None) -> RangeDone:
    return RangeDone(stage, lo, hi, lo if first is None else first, result, P, 7)


def failed(stage: int, index: int) -> TaskFailed:
    return TaskFailed(stage, index, "raised", "ValueError", "no", "trace", b"x")


def fold(*facts: AnyFact) -> Chronicle:
    chronicle = Chronicle()
    for fact in facts:
        chronicle.apply(fact)
    return chronicle


def open_(replay: Replay, data: bytes | None, count: int = 1, function: bytes = F, **kind: Any) -> int | None:
    kind = {"ordered": False, "parent": None, **kind}
    return replay.open(function, "count", options=OPTIONS, first=None if data is None else (count, digest(data)), **kind)


def declare(replay: Replay, stage: int, first: int, count: int, data: bytes) -> Verdict:
    return replay.segment(stage, first, count, digest(data), data)


def taken(reuse: list[Reuse]) -> list[tuple[int, int, int, int]]:
    """(present range, stage and first task it was recorded as)"""
    return [(one.lo, one.hi, one.result.stage, one.source_first) for one in reuse]


# ---- stages ----------------------------------------------------------------------------------------------------------


def test_stage_goes_on_with_the_recorded_one_of_its_first_segment() -> None:
    a, b, c = segment(1), segment(2), segment(3)
    replay = Replay(fold(opened(0), opened(1), opened(2), cut(0, 0, 1, a), cut(1, 0, 1, b), cut(2, 0, 1, b)))
    assert open_(replay, b) == 1
    assert open_(replay, b) == 2
    assert open_(replay, c) == 0, "the lowest that is left"
    assert open_(replay, a) is None


@pytest.mark.parametrize("other", [{"function": G}, {"ordered": True}, {"parent": (0, 1)}])
def test_stage_of_another_function_kind_or_parent_is_another(other: dict[str, Any]) -> None:
    replay = Replay(fold(opened(0), cut(0, 0, 1, segment(1))))
    assert open_(replay, segment(1), **other) is None
    assert open_(replay, segment(1)) == 0


def test_empty_stage_takes_no_stage_with_tasks() -> None:
    replay = Replay(fold(opened(0), cut(0, 0, 1, segment(1)), opened(1)))
    assert open_(replay, None) == 1
    assert open_(replay, None) is None
    assert open_(replay, segment(1)) == 0


def test_stage_that_was_opened_and_no_more_is_gone_on_with() -> None:
    assert open_(Replay(fold(opened(0))), segment(1)) == 0


# ---- maps ------------------------------------------------------------------------------------------------------------


def test_map_segment_declared_alike_has_its_results() -> None:
    data = segment(*range(10), kind=ONE)
    chronicle = fold(opened(0, ordered=True), cut(0, 0, 10, data), done(0, 2, 5), failed(0, 7), RangeCancelled(0, 8, 9))
    verdict = Replay(chronicle).segment(0, 0, 10, digest(data), None)
    assert verdict.same
    assert taken(verdict.reuse) == [(2, 5, 0, 2), (7, 8, 0, 7)]
    assert [one.result for one in verdict.reuse] == [one.fact for one in verdict.reuse]
    assert verdict.cancelled == [(8, 9)]


def test_replay_is_a_copy() -> None:
    data = segment(*range(10), kind=ONE)
    chronicle = fold(opened(0), cut(0, 0, 10, data), done(0, 2, 5))
    replay = Replay(chronicle)
    chronicle.apply(done(0, 5, 10))
    chronicle.apply(Redo(0, 2, 5))
    assert taken(declare(replay, 0, 0, 10, data).reuse) == [(2, 5, 0, 2)]


def test_map_segment_that_differs_is_compared_by_the_driver() -> None:
    old, new = segment(*range(10), kind=ONE), segment(*range(1, 11), kind=ONE)
    chronicle = fold(opened(0), cut(0, 0, 10, old), done(0, 0, 4), failed(0, 6), cut(0, 10, 10, old), done(0, 10, 20))
    replay = Replay(chronicle)
    verdict = declare(replay, 0, 0, 10, new)
    assert not verdict.same
    assert verdict.reuse == []
    (differing,) = verdict.compare
    assert (differing.lo, differing.hi, differing.first, differing.count, differing.arguments) == (0, 10, 0, 10, old)
    assert [getattr(result, "lo", 6) for result in differing.results] == [0, 6]
    assert replay.order.next_turn == 0
    reuse = replay.compared(0, 0, 10, [(2, 3), (5, 40)])
    assert taken(reuse) == [(2, 3, 0, 2), (6, 7, 0, 6)]
    assert declare(replay, 0, 10, 10, old).same
    delivered = [offer.item for lo in (2, 6, 10) for offer in replay.order.offer(0, lo, lo + 1 if lo < 10 else 20, lo)]
    assert delivered == [2, 6, 10]
    assert replay.order.over, "of the others no turn is waited for"


def test_map_segment_without_bytes_to_compare_with_runs_again() -> None:
    old, new = segment(1, kind=ONE), segment(2, kind=ONE)
    chronicle = fold(opened(0), SegmentsCut(0, 0, ((1, len(old), digest(old)),)), done(0, 0, 1))
    replay = Replay(chronicle)
    assert declare(replay, 0, 0, 1, new) == Verdict(False)
    assert replay.order.over


def test_map_cut_elsewhere_is_compared_with_all_it_overlaps() -> None:
    datas = [segment(*range(first, first + 4), kind=ONE) for first in (0, 4)]
    chronicle = fold(opened(0), cut(0, 0, 4, datas[0]), cut(0, 4, 4, datas[1]), done(0, 0, 8))
    verdict = declare(Replay(chronicle), 0, 2, 4, segment(*range(2, 6), kind=ONE))
    assert [(one.lo, one.hi, one.first, one.arguments) for one in verdict.compare] == [(2, 4, 0, datas[0]), (4, 6, 4, datas[1])]


def test_items_of_a_map_do_not_match_elsewhere() -> None:
    data = segment(1, 2, kind=ONE)
    replay = Replay(fold(opened(0), cut(0, 0, 2, data), done(0, 0, 2)))
    assert declare(replay, 0, 5, 2, data) == Verdict(False)


# ---- calls -----------------------------------------------------------------------------------------------------------


def test_calls_cut_elsewhere_match_item_by_item() -> None:
    chronicle = fold(opened(0), cut(0, 0, 1, segment(0)), cut(0, 1, 4, segment(1, 2, 3, 4)), done(0, 0, 1), done(0, 1, 4, b"abc"))
    replay = Replay(chronicle)
    verdict = declare(replay, 0, 0, 3, segment(0, 1, 2))
    assert taken(verdict.reuse) == [(0, 1, 0, 0), (1, 3, 0, 1)]
    verdict = declare(replay, 0, 3, 2, segment(3, 4))
    assert taken(verdict.reuse) == [(3, 4, 0, 3)]
    (fact,) = (one.fact for one in verdict.reuse)
    assert fact == RangeDone(0, 3, 4, 1, b"abc", P, 7, 3)


def test_call_that_moved_names_the_value_it_had() -> None:
    chronicle = fold(opened(0), cut(0, 0, 4, segment(0, 1, 2, 3)), done(0, 0, 4, b"abcd"))
    replay = Replay(chronicle)
    replay.opened(5, F, False, None)
    ((lo, hi, result, source, fact),) = declare(replay, 5, 0, 2, segment(2, 3)).reuse
    assert (lo, hi, source) == (0, 2, 2)
    assert result == RangeDone(0, 2, 4, 0, b"abcd", P, 7, 2)
    assert fact == RangeDone(5, 0, 2, -2, b"abcd", P, 7, 2)


def test_equal_calls_have_one_result_each() -> None:
    chronicle = fold(opened(0), cut(0, 0, 3, segment(5, 5, 5)), done(0, 0, 1, b"a"), done(0, 1, 2, b"b"))
    replay = Replay(chronicle)
    replay.opened(1, F, False, None)
    results = [one.result.result for at in range(4) for one in declare(replay, 1, at, 1, segment(5)).reuse]  # type: ignore[union-attr]
    assert results == [b"a", b"b"]
    assert declare(replay, 0, 0, 3, segment(5, 5, 5)).reuse == []


def test_large_call_matches_by_its_digest_alone() -> None:
    data = segment(bytearray(200_000))
    chronicle = fold(opened(0), SegmentsCut(0, 0, ((1, len(data), digest(data)),)), done(0, 0, 1))
    replay = Replay(chronicle)
    replay.opened(1, F, False, None)
    assert taken(replay.segment(1, 7, 1, digest(data), None).reuse) == [(7, 8, 0, 0)]


def test_call_matches_in_company_what_was_sent_alone_and_the_other_way_round() -> None:
    chronicle = fold(opened(0), cut(0, 0, 1, segment("x")), cut(0, 1, 2, segment("y", "z")), done(0, 0, 3))
    replay = Replay(chronicle)
    replay.opened(1, F, False, None)
    assert taken(declare(replay, 1, 0, 1, segment("z")).reuse) == [(0, 1, 0, 2)]
    assert taken(declare(replay, 1, 1, 3, segment("w", "y", "x")).reuse) == [(2, 3, 0, 1), (3, 4, 0, 0)]


@pytest.mark.parametrize("other", [(G, None), (F, (0, 4))])
def test_call_of_another_function_or_parent_is_another(other: tuple[bytes, tuple[int, int] | None]) -> None:
    replay = Replay(fold(opened(0), cut(0, 0, 1, segment(1)), done(0, 0, 1)))
    replay.opened(1, other[0], False, other[1])
    assert declare(replay, 1, 0, 1, segment(1)) == Verdict(False)


def test_failure_of_a_call_moves_with_it() -> None:
    replay = Replay(fold(opened(0), cut(0, 0, 2, segment(1, 2)), failed(0, 1)))
    (one,) = declare(replay, 0, 0, 1, segment(2)).reuse
    assert isinstance(one.fact, TaskFailed)
    assert (one.lo, one.hi, one.source_first) == (0, 1, 1)
    assert one.fact == TaskFailed(0, 0, "raised", "ValueError", "no", "trace", b"x", turn=0)


def test_arguments_in_blobs_are_asked_for() -> None:
    first, second = segment(1, 2), segment(3, 4)
    page = first + second
    pieces = ((2, len(first), digest(first)), (2, len(second), digest(second)))
    stored = Stored(b"b" * 32, 10_000, 100, len(page), (P,))
    chronicle = fold(opened(0), opened(1, G), SegmentsCut(0, 0, pieces, stored), done(0, 0, 4))
    replay = Replay(chronicle)
    assert replay.needed() == [stored], "neighbours as one"
    assert replay.needed_for(0, 0, 2, digest(first), first) == [], "recorded alike"
    other = segment(2, 3)
    assert replay.needed_for(1, 0, 2, digest(other), other) == [], "of another function"
    assert replay.needed_for(0, 0, 2, digest(other), other) == [stored]
    assert declare(replay, 0, 0, 2, other).reuse == []
    replay.supply(stored, page)
    assert replay.needed() == []
    assert taken(declare(replay, 0, 0, 2, other).reuse) == [(0, 2, 0, 1)]


@pytest.mark.parametrize("data", [None, b"short", bytes(128)])
def test_arguments_that_can_not_be_had_match_nothing(data: bytes | None) -> None:
    old = segment(1, 2)
    stored = Stored(b"b" * 32, 10_000, 100, len(old), (P,))
    replay = Replay(fold(opened(0), cut(0, 0, 2, old, stored), done(0, 0, 2)))
    replay.supply(stored, data)
    assert replay.needed() == []
    assert declare(replay, 0, 0, 2, segment(2, 1)).reuse == []


# ---- order -----------------------------------------------------------------------------------------------------------


def test_results_come_in_recorded_order_wherever_they_are_now() -> None:
    chronicle = fold(opened(0), opened(1, G), cut(0, 0, 3, segment(0, 1, 2)), cut(1, 0, 1, segment(9)))
    for fact in (done(0, 1, 2), done(1, 0, 1), done(0, 0, 1), done(0, 2, 3)):
        chronicle.apply(fact)
    replay = Replay(chronicle)
    delivered: list[str] = []

    def offer(stage: int, lo: int, item: str) -> None:
        delivered.extend(one.item for one in replay.order.offer(stage, lo, lo + 1, item))

    replay.opened(7, F, False, None)
    assert taken(declare(replay, 7, 0, 2, segment(1, 0)).reuse) == [(0, 1, 0, 1), (1, 2, 0, 0)]
    offer(7, 1, "third")
    offer(7, 0, "first")
    assert declare(replay, 1, 0, 1, segment(9)).same
    offer(1, 0, "second")
    assert delivered == ["first", "second", "third"]
    assert taken(declare(replay, 7, 2, 2, segment(5, 2)).reuse) == [(3, 4, 0, 2)]
    offer(7, 2, "new")
    offer(7, 3, "fourth")
    assert delivered == ["first", "second", "third", "fourth", "new"]


def test_call_whose_result_is_lost_keeps_its_turn() -> None:
    chronicle = fold(opened(0), cut(0, 0, 2, segment(0, 1)), done(0, 0, 1), done(0, 1, 2), Redo(0, 0, 1))
    for data, count in ((segment(0, 1), 2), (segment(0), 1)):
        replay = Replay(chronicle)
        reuse = declare(replay, 0, 0, count, data).reuse
        assert taken(reuse) == [(1, 2, 0, 1)][: count - 1]
        assert replay.order.cuts(0, 0, 1) == [(0, 1, 0)]
        if count == 1:
            declare(replay, 0, 1, 1, segment(1))
        assert replay.order.offer(0, 1, 2, "second") == []
        assert [offer.item for offer in replay.order.offer(0, 0, 1, "again")] == ["again", "second"]


def test_ordered_stages_wait_for_nobody() -> None:
    data = segment(1, kind=ONE)
    assert Replay(fold(opened(0, ordered=True), cut(0, 0, 1, data), done(0, 0, 1))).order.over


def test_stage_that_the_driver_cancels_again_is_not_waited_for() -> None:
    """Its generator may have been consumed further the first time than it is now."""
    data = [segment(*range(first, first + 3), kind=ONE) for first in (0, 3)]
    chronicle = fold(opened(0), opened(1, G), cut(0, 0, 3, data[0]), cut(0, 3, 3, data[1]), cut(1, 0, 1, segment(9)))
    for fact in (done(0, 0, 2), done(0, 3, 6), done(1, 0, 1)):
        chronicle.apply(fact)
    replay = Replay(chronicle)
    assert declare(replay, 0, 0, 3, data[0]).same
    assert declare(replay, 1, 0, 1, segment(9)).same
    assert replay.order.offer(1, 0, 1, "last") == []
    assert [offer.item for offer in replay.order.offer(0, 0, 2, "first")] == ["first"]
    assert [offer.item for offer in replay.cancel(0, 0, -1)] == ["last"]
    assert replay.order.over


def test_call_that_is_cancelled_again_is_not_waited_for() -> None:
    replay = Replay(fold(opened(0), cut(0, 0, 2, segment(1, 2)), done(0, 0, 1), done(0, 1, 2)))
    declare(replay, 0, 0, 2, segment(1, 2))
    assert replay.order.offer(0, 1, 2, "second") == []
    assert [offer.item for offer in replay.cancel(0, 0, 1)] == ["second"]


def test_map_that_ends_earlier_now_is_not_waited_for() -> None:
    data = [segment(*range(first, first + 3), kind=ONE) for first in (0, 3)]
    calls = segment(1, 2)
    chronicle = fold(opened(0), cut(0, 0, 3, data[0]), cut(0, 3, 3, data[1]), opened(1), cut(1, 0, 2, calls))
    for fact in (done(0, 3, 6), done(1, 0, 2), done(0, 0, 3)):
        chronicle.apply(fact)
    replay = Replay(chronicle)
    declare(replay, 0, 0, 3, data[0])
    assert declare(replay, 1, 0, 1, segment(1)).reuse
    assert replay.order.offer(0, 0, 3, "map") == []
    assert replay.order.offer(1, 0, 1, "one") == []
    assert [offer.item for offer in replay.close(0, 3)] == ["one"]
    assert replay.close(1, 1) == [], "a call may still come in another stage"
    replay.opened(2, F, False, None)
    assert taken(declare(replay, 2, 0, 1, segment(2)).reuse) == [(0, 1, 1, 1)]
    assert [offer.item for offer in replay.order.offer(2, 0, 1, "two")] == ["two", "map"]
