"""Who reads a driver's channel: its reader's thread, or the script itself while it waits."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest

import grid
from grid.api.session import current
from tests.api.fake_peer import FakePeer

pytestmark = pytest.mark.timeout(120, method="thread")  # the other method's SIGALRM is a handler that may raise


def increment(x: int) -> int:
    return x + 1


class Takers:
    """Which threads took frames in; `during` is called within."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.threads: list[threading.Thread] = []
        self.during: Callable[[], object] = lambda: None
        take = current().reading._take

        def watched(message: Any, body: Any) -> None:
            self.threads.append(threading.current_thread())
            self.during()
            take(message, body)

        monkeypatch.setattr(current().reading, "_take", watched)

    def main(self) -> int:
        return self.threads.count(threading.main_thread())


@pytest.fixture
def takers(peer: FakePeer, monkeypatch: pytest.MonkeyPatch) -> Takers:
    return Takers(monkeypatch)


def go_on(results: int) -> None:
    for i in range(results):
        assert grid.submit(increment, i).result() == i + 1


def test_script_that_goes_from_result_to_result_reads_them_itself(takers: Takers) -> None:
    while not takers.main():  # the reader may step in before the script comes back, on a slow machine
        go_on(20)


def test_reader_steps_in_when_nobody_waits(takers: Takers) -> None:
    while not takers.main():
        go_on(20)
    del takers.threads[:]
    called = threading.Event()
    grid.submit(increment, 1).add_done_callback(lambda future: called.set())
    assert called.wait(20)
    assert not takers.main()


def test_threads_wait_side_by_side(takers: Takers) -> None:
    """More of them than may read: nobody is forgotten."""
    done: list[int] = []

    def work(start: int) -> None:
        for i in range(start, start + 100):
            assert grid.submit(increment, i).result(60) == i + 1
            done.append(i)

    threads = [threading.Thread(target=work, args=(100 * number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    work(1000)
    for thread in threads:
        thread.join()
    assert sorted(done) == [*range(400), *range(1000, 1100)]


def test_wait_in_another_thread_while_the_script_reads(peer: FakePeer, takers: Takers) -> None:
    """The script's own result comes last, that of the thread in between."""
    while not takers.main():
        go_on(20)
    peer.release.clear()
    first, last = grid.submit(increment, 1), grid.submit(increment, 2)
    got: list[int] = []
    thread = threading.Thread(target=lambda: got.append(first.result(60)))
    thread.start()
    threading.Timer(0.05, peer.release.set).start()
    assert last.result(60) == 3
    thread.join(60)
    assert got == [2]


def test_result_that_is_not_there_in_time(peer: FakePeer, takers: Takers) -> None:
    while not takers.main():
        go_on(20)
    peer.release.clear()
    late = grid.submit(increment, 1)
    for timeout_s in (0.02, 0.0, -1.0):
        with pytest.raises(TimeoutError):
            late.result(timeout_s)
    with pytest.raises(TimeoutError):
        late.exception(0.02)
    peer.release.set()
    assert late.result(60) == 2


def test_interrupt_comes_behind_the_frame_that_is_taken_in(takers: Takers) -> None:
    while not takers.main():
        go_on(20)

    def interrupt() -> None:
        if threading.current_thread() is threading.main_thread():
            signal.raise_signal(signal.SIGINT)

    takers.during = interrupt
    seen: list[Any] = []

    def until_interrupted() -> None:
        while True:
            seen.append(grid.submit(increment, 1))
            seen[-1].result(60)

    with pytest.raises(KeyboardInterrupt):
        until_interrupted()
    takers.during = lambda: None
    assert seen[-1].result(60) == 2, "the frame was taken in whole"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    go_on(5)


def test_interrupt_ends_a_wait(peer: FakePeer, takers: Takers) -> None:
    while not takers.main():
        go_on(20)
    peer.release.clear()
    late = grid.submit(increment, 1)
    threading.Timer(0.1, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        late.result(60)
    peer.release.set()
    assert late.result(60) == 2


def test_handlers_that_might_raise_leave_reading_to_the_reader(takers: Takers) -> None:
    before = signal.signal(signal.SIGALRM, lambda number, frame: None)
    try:
        go_on(200)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert not takers.main()


def test_grid_goes_away_while_the_script_reads(peer: FakePeer, takers: Takers) -> None:
    while not takers.main():
        go_on(20)
    peer.release.clear()
    late = grid.submit(increment, 1)
    threading.Timer(0.05, peer.close).start()
    with pytest.raises(grid.GridError, match="went away"):
        late.result(60)
