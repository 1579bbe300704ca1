"""Calls from within a task: the session of a worker, whose main thread reads the channel while it waits."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import grid
from grid.api import wire
from grid.api.session import current
from tests.api.fake_peer import FakePeer, driving
from tests.api.test_calls import fail_at_3, square


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[FakePeer]:
    with driving(tmp_path / "peer", role="worker") as fake:
        current().task = (4, 17, 1)
        yield fake


def test_nested_map_and_submit(worker: FakePeer) -> None:
    assert list(grid.map(square, range(3000))) == [x * x for x in range(3000)]
    assert grid.submit(square, 5).result() == 25
    stages = worker.of(wire.Stage)
    assert [(s.parent_stage, s.parent_index, s.occurrence) for s in stages] == [(4, 17, 0), (4, 17, 1)]
    assert current().reading.thread is None, "no thread was needed"
    assert current().nested


def test_nested_occurrence_starts_anew_with_the_next_task(worker: FakePeer) -> None:
    list(grid.map(square, [1]))
    current().finish_task(False)
    assert not current().nested
    current().task = (4, 18, 0)
    list(grid.map(square, [1]))
    assert [s.occurrence for s in worker.of(wire.Stage)] == [0, 0]


def test_waiting_gives_the_slot_up_and_takes_it_back(worker: FakePeer) -> None:
    worker.release.clear()
    future = grid.submit(square, 2)
    threading.Thread(target=lambda: (worker.wait_for(lambda: worker.of(wire.Waiting)), worker.release.set())).start()
    assert future.result(20) == 4
    worker.wait_for(lambda: len(worker.of(wire.Waiting)) == 2)
    assert [message.blocked for message in worker.of(wire.Waiting)] == [True, False]


def test_waiting_for_the_peer_keeps_the_slot(worker: FakePeer) -> None:
    """Others started in its place would ask for the same blob and wait, too: hundreds of processes for one fetch."""
    ref = grid.put(os.urandom(wire.INLINE_BYTES_MAX + 1))  # nobody has loaded it in this process
    assert len(ref.get()) == wire.INLINE_BYTES_MAX + 1
    worker.wait_for(lambda: worker.of(wire.Put) and worker.of(wire.Fetch))
    assert not worker.of(wire.Waiting)


def test_wait_and_as_completed_read_the_channel(worker: FakePeer) -> None:
    futures = [grid.submit(square, x) for x in range(20)]
    done, pending = concurrent.futures.wait(futures, 20)
    assert len(done) == 20
    assert not pending
    more = [grid.submit(square, x) for x in range(20)]
    assert sorted(f.result() for f in concurrent.futures.as_completed(more, 20)) == [x * x for x in range(20)]
    assert current().reading.thread is None
    assert worker.of(wire.Waiting)


def test_result_with_timeout(worker: FakePeer) -> None:
    worker.release.clear()
    future = grid.submit(square, 2)
    with pytest.raises(concurrent.futures.TimeoutError):
        future.result(0.02)
    worker.release.set()
    assert future.result(20) == 4


def test_threads_of_a_task_may_call_too(worker: FakePeer) -> None:
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        made = list(threads.map(lambda x: sum(grid.map(square, range(x))), [10, 20, 30, 40]))
    assert made == [sum(y * y for y in range(x)) for x in (10, 20, 30, 40)]
    assert list(grid.map(square, range(5))) == [0, 1, 4, 9, 16]


def test_asyncio_in_a_task(worker: FakePeer) -> None:
    async def main() -> list[int]:
        return list(await asyncio.gather(*(asyncio.wrap_future(grid.submit(square, x)) for x in range(10))))

    assert asyncio.run(main()) == [x * x for x in range(10)]


def test_frames_of_the_workers_own_are_kept_for_it(worker: FakePeer) -> None:
    worker.post(wire.Function(3), b"f")
    worker.post(wire.Run(1, 2, 3, 0, 0, 1), b"segment")
    assert list(grid.map(square, range(3))) == [0, 1, 4]
    worker.post(wire.Stop())
    assert current().next_frame() == (wire.Function(3), b"f")
    assert current().next_frame() == (wire.Run(1, 2, 3, 0, 0, 1), b"segment")
    assert current().next_frame()[0] == wire.Stop()
    current().start_reader()
    worker.post(wire.Stop())
    assert current().next_frame()[0] == wire.Stop()


def test_task_that_returns_waits_for_what_it_left(worker: FakePeer) -> None:
    worker.release.clear()
    future = grid.submit(square, 3)
    grid.map(square, range(10))
    threading.Thread(target=lambda: (worker.wait_for(lambda: worker.of(wire.Waiting)), worker.release.set())).start()
    current().finish_task(False)
    assert future.done()
    assert current().stages() == []


def test_task_that_fails_cancels_what_it_left(worker: FakePeer) -> None:
    worker.release.clear()
    future = grid.submit(square, 3)
    grid.map(square, range(10))
    current().finish_task(True)
    assert future.cancelled()
    worker.wait_for(lambda: len(worker.of(wire.Cancel)) == 2)


def test_error_in_a_nested_task(worker: FakePeer) -> None:
    with pytest.raises(KeyError, match="three"):
        list(grid.map(fail_at_3, range(10)))


def test_peer_gone_while_a_task_waits(worker: FakePeer) -> None:
    worker.release.clear()
    future = grid.submit(square, 3)
    worker.wait_for(lambda: worker.pages)
    worker._closed = True
    worker._channel.close()
    with pytest.raises(grid.GridError, match="went away"):
        future.result(20)


def test_seed_of_a_task_is_the_one_its_generators_get(worker: FakePeer) -> None:
    from grid.worker.seeding import stage_seed, task_seed

    here = grid.context()
    assert (here.stage, here.task, here.attempt) == (4, 17, 1)
    assert here.seed == task_seed(stage_seed(7, 4), 17)
