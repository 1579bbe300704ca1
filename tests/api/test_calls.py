"""map, submit, options and Executor against the naive peer."""

from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
import operator
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import grid
from grid.api import serialize, wire
from grid.api.session import current
from tests.api.fake_peer import FakePeer


def square(x: int) -> int:
    return x * x


def fail_at_3(x: int) -> int:
    if x == 3:
        raise KeyError("three")
    return x


class OddError(Exception):
    """Can't be made again from its args."""

    def __init__(self, first: str, second: object) -> None:
        super().__init__(first)
        self.second = second


def raise_odd(x: int) -> None:
    raise OddError("a", threading.Lock() if x else "b")


def exit_3(x: int) -> None:
    raise SystemExit(3)


def endless() -> Iterator[int]:
    yield from itertools.count()


# ---- map -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "items",
    [
        range(0),
        [],
        range(50_000),
        list(range(30_000)),
        tuple(range(10)),
        {1, 2, 3},
        (x for x in range(40_000)),
        [1, 2.5, 3, True],
        (x if x % 7 else float(x) for x in range(1000)),
    ],
)
def test_map_gives_what_map_gives(peer: FakePeer, items: Any) -> None:
    items, twin = itertools.tee(items) if hasattr(items, "__next__") else (items, items)
    assert list(grid.map(square, items)) == list(map(square, twin))


def test_map_of_several_iterables_stops_at_the_shortest(peer: FakePeer) -> None:
    assert list(grid.map(operator.add, [1, 2, 3], itertools.count(10))) == [11, 13, 15]
    assert list(grid.map(operator.add, (1, 2, 3), range(2))) == [1, 3]


def test_map_of_large_strings_and_mixed_items(peer: FakePeer) -> None:
    items = ["x" * size for size in (1, 10, 200_000, 3_000_000, 5)] + [b"y" * 70_000, 3, None]
    assert list(grid.map(repr, items)) == [repr(item) for item in items]
    assert any(page.path for page in peer.pages)


def test_map_items_are_frozen_before_the_generator_goes_on(peer: FakePeer) -> None:
    def reusing() -> Iterator[list[int]]:
        box = [0]
        for box[0] in range(500):
            yield box

    assert list(grid.map(sum, reusing())) == list(range(500))


def test_map_needs_an_iterable(peer: FakePeer) -> None:
    with pytest.raises(TypeError, match="at least one iterable"):
        grid.map(square)
    with pytest.raises(TypeError, match="not iterable"):
        grid.map(square, 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="something to call"):
        grid.map(3, [1])  # type: ignore[arg-type]


def test_map_starts_at_the_call_and_takes_inputs_lazily(peer: FakePeer) -> None:
    taken = []

    def source() -> Iterator[int]:
        for x in range(3):
            taken.append(x)
            yield x
        asked.wait(20)
        yield 99

    asked = threading.Event()
    results = grid.map(square, source())
    peer.wait_for(lambda: sum(sum(page.counts) for page in peer.pages) == 3)
    assert taken == [0, 1, 2]
    asked.set()
    assert list(results) == [0, 1, 4, 99 * 99]


def test_map_feeds_a_generator_that_waits_for_its_own_results(peer: FakePeer) -> None:
    seen: list[int] = []
    more = threading.Semaphore(5)

    def source() -> Iterator[int]:
        for x in range(50):
            more.acquire()
            yield x

    for value in grid.map(square, source()):
        seen.append(value)
        more.release()
    assert seen == [x * x for x in range(50)]


def test_map_never_iterated_still_completes(peer: FakePeer) -> None:
    peer.window_bytes = 256 << 10
    grid.map(repr, (x + 10**50 for x in range(20_000)))
    current().finish()
    assert sum(sum(page.counts) for page in peer.pages) == 20_000
    assert current().stages() == []
    assert not peer.of(wire.Cancel)


def test_map_closed_after_iteration_began_cancels_the_rest(peer: FakePeer) -> None:
    results = grid.map(square, endless())
    assert next(results) == 0
    results.close()  # type: ignore[attr-defined]
    peer.wait_for(lambda: peer.of(wire.Cancel))
    assert peer.of(wire.Cancel)[0].hi == -1


def test_map_closed_before_iteration_is_not_cancelled(peer: FakePeer) -> None:
    results = grid.map(square, range(10))
    results.close()  # type: ignore[attr-defined]
    current().finish()
    assert not peer.of(wire.Cancel)


def test_map_endless_input_is_held_back_while_nobody_reads(peer: FakePeer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grid.api.feed.AHEAD_TASKS_MAX", 1000)
    results = grid.map(square, endless())
    assert next(results) == 0
    (stage,) = current().stages()
    early, step = stage.sent, 16_384
    assert list(itertools.islice(results, 5000)) == [x * x for x in range(1, 5001)]
    assert stage.sent <= max(early, 5001 + 1000) + step


def test_map_throttle_holds_the_feeder(peer: FakePeer) -> None:
    peer.release.clear()
    first = threading.Event()

    def gated() -> Iterator[str]:
        yield "first"
        first.wait(20)
        yield from ("x" * 1000 for _ in range(2000))

    results = grid.map(len, gated())
    peer.wait_for(lambda: peer.pages)
    peer.post(wire.Throttle(0, True))
    deadline = time.monotonic() + 10
    while not current().stages()[0].held:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    first.set()
    peer.post(wire.Throttle(0, False))
    peer.release.set()
    assert list(results) == [5] + [1000] * 2000


def test_map_error_is_raised_in_its_place_and_cancels_the_rest(peer: FakePeer) -> None:
    seen = []
    with pytest.raises(KeyError, match="three") as caught:
        seen.extend(grid.map(fail_at_3, endless()))
    assert seen == [0, 1, 2]
    assert isinstance(caught.value.__cause__, grid.RemoteTraceback)
    assert "fail_at_3" in str(caught.value.__cause__)
    assert 'raise KeyError("three")' in str(caught.value.__cause__)
    peer.wait_for(lambda: peer.of(wire.Cancel))


def test_map_return_exceptions_yields_them(peer: FakePeer) -> None:
    values = list(grid.map(fail_at_3, range(6), return_exceptions=True))
    assert [value for value in values if not isinstance(value, KeyError)] == [0, 1, 2, 4, 5]
    assert isinstance(values[3], KeyError)


def test_map_input_error_comes_after_the_results_before_it(peer: FakePeer) -> None:
    def source() -> Iterator[int]:
        yield 1
        yield 2
        raise OSError("the disk")

    seen = []
    with pytest.raises(OSError, match="the disk"):
        seen.extend(grid.map(square, source(), return_exceptions=True))
    assert seen == [1, 4]


def test_map_unpicklable_item_is_raised_in_its_place(peer: FakePeer) -> None:
    results = grid.map(str, [[1], threading.Lock(), 3])
    assert next(results) == "[1]"
    with pytest.raises(TypeError, match="pickle"):
        next(results)


def test_map_unread_failures_are_told_at_the_end(peer: FakePeer, capsys: pytest.CaptureFixture[str]) -> None:
    grid.map(fail_at_3, range(6))
    current().finish()
    assert "1 tasks of fail_at_3 failed and nobody read the results; the first error: KeyError" in capsys.readouterr().err


def test_map_unordered_gives_each_once(peer: FakePeer) -> None:
    assert sorted(grid.map_unordered(square, range(1000))) == [x * x for x in range(1000)]


def test_map_ordered_even_when_reports_are_not(peer: FakePeer) -> None:
    peer.release.clear()
    results = grid.map(square, range(4))
    peer.wait_for(lambda: peer.pages)
    from grid.api.serialize import dump_results

    for lo, hi in ((3, 4), (1, 3), (0, 1)):
        peer.post(wire.Result(0, lo, hi), *dump_results([x * x for x in range(lo, hi)]))
    assert list(results) == [0, 1, 4, 9]


@pytest.mark.parametrize("batch", [True, False])
def test_map_result_segments_of_which_only_a_part_counts(peer: FakePeer, batch: bool) -> None:
    """Ranges that overlap were done twice: of each segment only what is new counts."""
    peer.release.clear()
    results = grid.map(square, range(6))
    peer.wait_for(lambda: peer.pages)
    writer = serialize.ResultWriter()
    for x in range(5):
        writer.add_batch([x * x]) if batch else writer.add(x * x)
    middle = writer.finish()[0]
    peer.post(wire.Result(0, 0, 1), *serialize.dump_results([0]))
    peer.post(wire.Result(0, 1, 3, "", 1), *middle)
    peer.post(wire.Result(0, 3, 6, "", 2), *serialize.dump_results([1, 4, 9, 16, 25]))
    assert list(results) == [0, 1, 4, 9, 16, 25]


def test_submit_result_segments_of_which_only_a_part_counts(peer: FakePeer) -> None:
    """As for map: a future gets its own value, not the first of the segment."""
    peer.release.clear()
    futures = [grid.submit(square, x) for x in range(4)]
    peer.wait_for(lambda: sum(sum(page.counts) for page in peer.pages) >= 4)
    peer.post(wire.Result(0, 0, 2, "", 0), *serialize.dump_results([0, 1, 4, 9]))
    peer.post(wire.Result(0, 2, 4, "", 1), *serialize.dump_results([1, 4, 9]))
    assert [future.result(5) for future in futures] == [0, 1, 4, 9]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(0, 3000), max_size=40),
    failing=st.sets(st.integers(0, 39)),
    lazily=st.booleans(),
    files=st.booleans(),
    each=st.integers(1, 50),
    take=st.integers(0, 60),
)
def test_map_order_errors_and_early_close_match_the_builtin(
    peer: FakePeer, sizes: list[int], failing: set[int], lazily: bool, files: bool, each: int, take: int
) -> None:
    peer.results_as_files, peer.results_each = files, each

    def work(pair: tuple[int, str]) -> int:
        if pair[0] in failing:
            raise ValueError(pair[0])
        return len(pair[1])

    items = [(position, "x" * size) for position, size in enumerate(sizes)]
    expected: list[Any] = [ValueError(p) if p in failing else len(text) for p, text in items][:take]
    results = grid.map(work, iter(items) if lazily else items, return_exceptions=True)
    got = list(itertools.islice(results, take))
    assert [str(value) for value in got] == [str(value) for value in expected]
    assert [type(value) for value in got] == [type(value) for value in expected]
    del results


# ---- submit ----------------------------------------------------------------------------------------------------------


def test_submit_returns_a_future(peer: FakePeer) -> None:
    future = grid.submit(pow, 2, 5, mod=7)
    assert isinstance(future, concurrent.futures.Future)
    assert future.result(20) == 4
    assert future.done()
    assert not future.cancelled()


def test_submit_lambda_and_closure(peer: FakePeer) -> None:
    base = 10

    def add(x: int) -> int:
        return x + base

    assert grid.submit(add, 1).result(20) == 11
    assert grid.submit(lambda: base).result(20) == 10


def test_submit_sees_what_the_function_captures_now(peer: FakePeer) -> None:
    box = [1]
    number = 1

    def look() -> tuple[int, int]:
        return box[0], number

    assert grid.submit(look).result(20) == (1, 1)
    number = 2
    assert grid.submit(look).result(20) == (1, 2)
    box[0] = 3
    assert grid.submit(look).result(20) == (3, 2)


def test_submit_sees_what_the_function_captures_also_while_calls_are_under_way(peer: FakePeer) -> None:
    """What a call computes depends on the script alone, not on which results have come back."""
    state = {"n": 0}

    def look(x: int) -> int:
        return state["n"] + x

    peer.release.clear()
    futures = []
    for n in range(30):
        state["n"] = n * 100
        futures += [grid.submit(look, 1), grid.submit(look, 2)]
    peer.release.set()
    assert [future.result(20) for future in futures] == [n * 100 + x for n in range(30) for x in (1, 2)]
    assert len(peer.of(wire.Stage)) < 8, "then the function travels as an argument"


def test_submit_same_function_is_one_stage(peer: FakePeer) -> None:
    assert [grid.submit(square, x).result(20) for x in range(20)] == [x * x for x in range(20)]
    assert len(peer.of(wire.Stage)) == 1
    assert len(peer.of(wire.Define)) == 1


def test_submit_fresh_callables_share_a_stage(peer: FakePeer) -> None:
    futures = [grid.submit(lambda x=x: x * 2) for x in range(100)]  # type: ignore[misc]
    assert [future.result(20) for future in futures] == [x * 2 for x in range(100)]
    assert len(peer.of(wire.Stage)) < 8


def test_submit_freezes_arguments_at_the_call(peer: FakePeer) -> None:
    peer.release.clear()
    box = [1]
    data = bytearray(b"a" * 100_000)
    future, other = grid.submit(sum, box), grid.submit(bytes.count, bytes(data), b"a")
    third = grid.submit(len, data)
    box.append(2)
    data.clear()
    peer.release.set()
    assert (future.result(20), other.result(20), third.result(20)) == (1, 100_000, 100_000)


def test_submit_error_is_the_users_own(peer: FakePeer) -> None:
    future = grid.submit(fail_at_3, 3)
    assert isinstance(future.exception(20), KeyError)
    with pytest.raises(KeyError) as caught:
        future.result()
    assert isinstance(caught.value.__cause__, grid.RemoteTraceback)


def test_submit_error_with_arguments_of_its_own_is_itself(peer: FakePeer) -> None:
    with pytest.raises(OddError, match=r"^a$") as caught:
        grid.submit(raise_odd, 0).result(20)
    assert caught.value.second == "b"


def test_submit_error_that_cannot_travel_is_a_task_error(peer: FakePeer) -> None:
    with pytest.raises(grid.TaskError, match="OddError: a") as caught:
        grid.submit(raise_odd, 1).result(20)
    assert "raise_odd" in str(caught.value.__cause__)


def test_submit_system_exit_in_a_task_does_not_end_the_script(peer: FakePeer) -> None:
    with pytest.raises(grid.TaskError, match="SystemExit: 3"):
        grid.submit(exit_3, 1).result(20)


def test_submit_generator_result_is_a_type_error(peer: FakePeer) -> None:
    with pytest.raises(TypeError, match=r"returned a generator.*list"):
        grid.submit(endless).result(20)


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("died", grid.WorkerDied),
        ("timeout", grid.TaskTimeout),
        ("memory", grid.MemoryExceeded),
        ("unpicklable", grid.UnpicklableResult),
        ("failed", grid.TaskError),
    ],
)
def test_submit_failure_kinds(peer: FakePeer, kind: str, error: type[Exception]) -> None:
    peer.release.clear()
    future = grid.submit(square, 1)
    peer.wait_for(lambda: peer.pages)
    peer.post(wire.Failure(0, 0, kind, "", "what happened", ""))
    with pytest.raises(error, match="what happened"):
        future.result(20)


def test_submit_200_mb_goes_through_a_file_once(peer: FakePeer) -> None:
    data = bytes(200 << 20)
    assert grid.submit(len, data).result(60) == len(data)
    assert [bool(page.path) for page in peer.pages] == [True]


def test_submit_cancel_tells_the_grid(peer: FakePeer) -> None:
    peer.release.clear()
    futures = [grid.submit(square, x) for x in range(5)]
    assert futures[3].cancel()
    assert futures[3].cancel()
    assert futures[3].cancelled()
    with pytest.raises(concurrent.futures.CancelledError):
        futures[3].result(20)
    peer.wait_for(lambda: peer.of(wire.Cancel))
    peer.release.set()
    done, pending = concurrent.futures.wait(futures, 20)
    assert not pending
    assert len(done) == 5
    assert [futures[x].result() for x in (0, 1, 2, 4)] == [0, 1, 4, 16]
    assert not futures[0].cancel()


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(count=st.integers(1, 60), cancelled=st.sets(st.integers(0, 59)))
def test_submit_any_mix_of_cancels_settles_every_future(peer: FakePeer, count: int, cancelled: set[int]) -> None:
    futures = [grid.submit(square, x) for x in range(count)]
    took = {x for x in cancelled if x < count and futures[x].cancel()}
    concurrent.futures.wait(futures, 20)
    for x, future in enumerate(futures):
        assert future.cancelled() if x in took else future.result() == x * x


def test_submit_works_with_wait_and_as_completed(peer: FakePeer) -> None:
    futures = {grid.submit(square, x): x for x in range(100)}
    assert {futures[f]: f.result() for f in concurrent.futures.as_completed(futures, 20)} == {x: x * x for x in range(100)}


def test_submit_in_asyncio(peer: FakePeer) -> None:
    async def main() -> list[int]:
        return list(await asyncio.gather(*(asyncio.wrap_future(grid.submit(square, x)) for x in range(50))))

    assert asyncio.run(main()) == [x * x for x in range(50)]


def test_submit_from_many_threads(peer: FakePeer) -> None:
    def work(base: int) -> list[int]:
        return [grid.submit(square, base + x).result(30) for x in range(50)]

    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        assert list(threads.map(work, range(0, 800, 100))) == [
            [(base + x) ** 2 for x in range(50)] for base in range(0, 800, 100)
        ]


def test_submit_100_000_one_by_one(peer: FakePeer) -> None:
    start = time.perf_counter()
    futures = [grid.submit(square, x) for x in range(100_000)]
    submitted = time.perf_counter() - start
    assert sum(future.result() for future in futures) == sum(x * x for x in range(100_000))
    total = time.perf_counter() - start
    print(f"\nsubmit: {100_000 / submitted:,.0f}/s submitted, {100_000 / total:,.0f}/s with results")
    start = time.perf_counter()
    for x in range(500):
        grid.submit(square, x).result()
    print(f"round trip through the naive peer: {(time.perf_counter() - start) / 500 * 1e6:.0f} µs")


def test_map_1_000_000_over_a_generator(peer: FakePeer) -> None:
    for name, items in (("generator", (x for x in range(1_000_000))), ("range", range(1_000_000))):
        start = time.perf_counter()
        assert sum(grid.map(square, items)) == 333332833333500000
        print(f"\nmap over a {name}: {1_000_000 / (time.perf_counter() - start):,.0f}/s")


# ---- the peer's end --------------------------------------------------------------------------------------------------


def test_peer_gone_fails_everything_once_with_one_line(peer: FakePeer) -> None:
    peer.release.clear()
    future = grid.submit(square, 1)
    results = grid.map(square, endless())
    peer.wait_for(lambda: len(peer.pages) > 1)
    peer._closed = True
    peer._channel.close()
    with pytest.raises(grid.GridError, match="went away"):
        future.result(20)
    with pytest.raises(grid.GridError, match="went away"):
        list(results)
    with pytest.raises(grid.GridError, match="went away"):
        grid.submit(square, 2)


def test_job_cancelled_from_outside(peer: FakePeer) -> None:
    peer.release.clear()
    future = grid.submit(square, 1)
    results = grid.map(square, range(5))
    peer.wait_for(lambda: len(peer.pages) == 2)
    peer.post(wire.Cancelled(0, 0, 1))
    peer.post(wire.Cancelled(1, 0, 5))
    with pytest.raises(concurrent.futures.CancelledError):
        future.result(20)
    with pytest.raises(concurrent.futures.CancelledError):
        list(results)


# ---- options, Executor -----------------------------------------------------------------------------------------------


def test_options_travel_with_the_stage(peer: FakePeer) -> None:
    calls = grid.options(retries=2, task_timeout=1.5, cpus=2, memory="2GiB", tags=["gpu"], pure=False)
    assert calls.submit(square, 3).result(20) == 9
    assert list(calls.map(square, [1, 2])) == [1, 4]
    for stage in peer.of(wire.Stage):
        assert stage.options == wire.Options(2, 1.5, 2, 2 << 30, ("gpu",), False)
    grid.submit(square, 1).result(20)
    assert peer.of(wire.Stage)[-1].options == wire.Options()


@pytest.mark.parametrize("wrong", [{"retries": -1}, {"task_timeout": 0}, {"cpus": 0}, {"memory": "much"}, {"memory": 0}])
def test_options_wrong(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong)) + "|size"):
        grid.options(**wrong)


def test_executor_standard_meanings(peer: FakePeer) -> None:
    with grid.Executor() as executor:
        assert isinstance(executor, concurrent.futures.Executor)
        assert executor.submit(square, 4).result(20) == 16
        mapped = executor.map(square, range(1000), chunksize=7)
        added = executor.map(operator.add, [1, 2], itertools.count())
        late = executor.submit(square, 9)
    assert late.done()
    assert list(mapped) == [x * x for x in range(1000)]
    assert list(added) == [1, 3]
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(square, 1)
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.map(square, [1])


def test_executor_map_timeout(peer: FakePeer) -> None:
    peer.release.clear()
    executor = grid.Executor()
    results = executor.map(square, [1], timeout=0.02)
    with pytest.raises(TimeoutError):
        next(results)
    executor.shutdown(wait=False)


def test_executor_shutdown_cancel_futures(peer: FakePeer) -> None:
    peer.release.clear()
    executor = grid.Executor(grid.options(retries=1))
    futures = [executor.submit(square, x) for x in range(10)]
    executor.shutdown(wait=True, cancel_futures=True)
    assert all(future.cancelled() for future in futures)


def test_executor_in_asyncio(peer: FakePeer) -> None:
    async def main() -> int:
        return await asyncio.get_running_loop().run_in_executor(grid.Executor(), square, 12)

    assert asyncio.run(main()) == 144


def test_finish_waits_for_futures(peer: FakePeer) -> None:
    future = grid.submit(time.sleep, 0.05)
    current().finish()
    assert future.done()
    assert current().stages() == []
    peer.wait_for(lambda: peer.of(wire.Close))
