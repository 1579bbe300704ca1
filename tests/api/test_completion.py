"""as_completed and wait in a driver: in the order of completion, however late one asks."""

from __future__ import annotations

import concurrent.futures
from concurrent.futures import FIRST_COMPLETED

import pytest

import grid
from grid.api import completion
from grid.api.futures import GridFuture
from tests.api.fake_peer import FakePeer
from tests.api.test_calls import square


@pytest.fixture
def futures(peer: FakePeer) -> list[GridFuture]:
    """Pending ones."""
    peer.release.clear()
    made = [grid.submit(square, x) for x in range(40)]
    assert all(isinstance(future, GridFuture) for future in made)
    return made  # type: ignore[return-value]


ORDER = [7, 3, 39, 0, 21, 20, 8]


def test_as_completed_begins_with_those_done_first(futures: list[GridFuture], peer: FakePeer) -> None:
    for index in ORDER:
        futures[index].settle(index)
    found = completion.as_completed(futures, 20)
    assert [next(found).result() for _ in ORDER] == ORDER
    futures[30].settle(30)
    assert next(found) is futures[30]
    peer.release.set()
    assert {future.result(20) for future in found} == {x * x for x in range(40)} - {x * x for x in [*ORDER, 30]}


def test_as_completed_leaves_no_waiter_behind(futures: list[GridFuture]) -> None:
    futures[1].settle(1)
    found = completion.as_completed(iter([*futures, futures[1]]))
    next(found)
    found.close()  # type: ignore[attr-defined]
    assert not any(future._waiters for future in futures)
    with pytest.raises(TimeoutError, match=r"39 \(of 40\)"):
        list(completion.as_completed(futures, 0.01))


def test_wait_for_the_first_gives_the_first(futures: list[GridFuture]) -> None:
    for index in ORDER:
        futures[index].settle(index)
    pending, found = set(futures), []
    for _ in ORDER:
        done, pending = completion.wait(pending, 20, FIRST_COMPLETED)
        found += [future.result() for future in done]
    assert found == ORDER
    assert len(pending) == 40 - len(ORDER)
    assert len(completion.wait(futures, 0).done) == len(ORDER)


def test_cancelled_ones_have_their_place(futures: list[GridFuture]) -> None:
    futures[5].settle(5)
    futures[2].cancel()
    futures[2].cancel()
    futures[9].settle(9)
    found = completion.as_completed(futures[:10], 20)
    assert [futures.index(next(found)) for _ in range(3)] == [5, 2, 9]


def test_other_futures_are_left_to_the_standard_library(futures: list[GridFuture]) -> None:
    plain: concurrent.futures.Future[int] = concurrent.futures.Future()
    plain.set_result(1)
    futures[0].settle(0)
    assert {future.result() for future in completion.as_completed([plain])} == {1}
    done, pending = completion.wait([plain, *futures], 20, FIRST_COMPLETED)
    assert done == {plain, futures[0]}
    assert len(pending) == 39


def test_sets_of_futures_have_one_order(futures: list[GridFuture]) -> None:
    assert [hash(future) for future in futures] == [hash((futures[0]._stage.number, index)) for index in range(40)]
