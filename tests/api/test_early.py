"""Results that come from a worker before the peer's frame: taken only where no other order is possible."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

import grid
from grid.api import serialize, wire
from grid.api.session import current
from tests.api.fake_peer import FakePeer

pytestmark = pytest.mark.timeout(120, method="thread")  # the other method's SIGALRM is a handler that may raise


def increment(x: int) -> int:
    return x + 1


@pytest.fixture
def worker(peer: FakePeer) -> Iterator[socket.socket]:
    """Its end of the socket."""
    theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    current().early = ours
    with theirs, ours:
        yield theirs
        current().early = None


def early(stage: int, index: int, value: object = None, data: bytes | None = None) -> bytes:
    writer = serialize.ResultWriter()
    writer.add(value)
    parts, _ = writer.finish()
    return wire.EARLY.pack(stage, index) + (b"".join(parts) if data is None else data)


def lent() -> None:
    """Until the script reads for itself."""
    for i in range(1000):
        assert grid.submit(increment, i).result(20) == i + 1
        if current().reading._lent:
            return
    raise AssertionError("the reader never stood back")


def test_early_result_is_taken_and_the_peers_is_nothing_new(peer: FakePeer, worker: socket.socket) -> None:
    lent()
    peer.release.clear()
    future = grid.submit(increment, 1)
    worker.send(early(future._stage.number, future._index, "early"))
    assert future.result(20) == "early"
    peer.release.set()
    assert grid.submit(increment, 5).result(20) == 6
    assert future.result() == "early"


def test_early_result_waits_while_others_are_under_way(peer: FakePeer, worker: socket.socket) -> None:
    """Which of them comes first, the peer decides: another run of the script must see the same."""
    lent()
    peer.release.clear()
    first, second = grid.submit(increment, 1), grid.submit(increment, 2)
    worker.send(early(first._stage.number, first._index, "early"))
    with pytest.raises(TimeoutError):
        first.result(0.05)
    peer.release.set()
    assert [first.result(20), second.result(20)] == [2, 3]


def test_early_result_waits_while_another_stage_is_open(peer: FakePeer, worker: socket.socket) -> None:
    lent()
    peer.release.clear()
    other = grid.map_unordered(increment, [7])
    future = grid.submit(increment, 1)
    worker.send(early(future._stage.number, future._index, "early"))
    with pytest.raises(TimeoutError):
        future.result(0.05)
    threading.Timer(0.05, peer.release.set).start()
    assert future.result(20) == 2
    assert list(other) == [8]


@pytest.mark.parametrize("what", ["empty", "cut", "unknown stage", "unknown task", "not to be loaded"])
def test_early_result_that_is_none_is_ignored(peer: FakePeer, worker: socket.socket, what: str) -> None:
    lent()
    peer.release.clear()
    future = grid.submit(increment, 1)
    stage, index = future._stage.number, future._index
    worker.send(
        {
            "empty": b"",
            "cut": early(stage, index, 1)[:10],
            "unknown stage": early(99, index, 1),
            "unknown task": early(stage, index + 1, 1),
            "not to be loaded": early(stage, index, data=b"garbage"),
        }[what]
    )
    with pytest.raises(TimeoutError):
        future.result(0.05)
    peer.release.set()
    assert future.result(20) == 2
