"""Memory that a driver shares: what is in it, when it is written anew, how much of it there is."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

import grid
from grid.api import serialize, shared, wire
from grid.api.shared import PARALLEL_BYTES_MIN, SharedMemory
from tests.api.fake_peer import driving
from tests.api.test_embedded import run

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs Linux")
MIB = 1 << 20


@pytest.fixture
def memory() -> Iterator[SharedMemory]:
    memory = SharedMemory(64 * MIB)
    yield memory
    for path in list(memory._sent):
        memory.released(path, False)


def write(memory: SharedMemory, *parts: Any) -> str:
    size = sum(memoryview(part).nbytes for part in parts)
    path = memory.write(list(parts), size)
    if path:
        assert Path(path).read_bytes() == b"".join(parts)
    return path


def test_block_is_written_anew_whatever_its_size_was(memory: SharedMemory) -> None:
    path = write(memory, b"a" * 3 * MIB, b"", b"b" * 5)
    for size in (1, 2 * MIB, 7 * MIB + 3, 7 * MIB + 3, 100):
        memory.released(path, True)
        assert write(memory, os.urandom(size)) == path
        assert memory.size == size


def test_large_parts_writable_or_not_arrive_whole(memory: SharedMemory) -> None:
    data = os.urandom(PARALLEL_BYTES_MIN + 12_345)
    for _ in range(2):
        memory.released(write(memory, b"x", bytearray(data), data, memoryview(bytearray(data))[1:]), True)


def test_block_that_somebody_maps_is_not_written_anew(memory: SharedMemory) -> None:
    first = write(memory, b"a" * MIB)
    held = serialize.map_file(first, private=True)
    memory.released(first, False)
    assert memory.size == 0
    write(memory, b"b" * MIB)
    assert held == b"a" * MIB


def test_blocks_are_bounded_and_spares_make_room(memory: SharedMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    assert write(memory, b"x" * 65 * MIB) == ""
    first, second = write(memory, b"a" * 30 * MIB), write(memory, b"b" * 30 * MIB)
    assert write(memory, b"c" * 30 * MIB) == ""
    memory.released(first, True)
    memory.released(second, True)
    assert write(memory, b"d" * 60 * MIB) == second
    assert memory.size == 60 * MIB
    monkeypatch.setattr(shared, "BLOCKS_MAX", 2)
    assert write(memory, b"e")
    assert write(memory, b"f") == ""


@pytest.mark.parametrize("again", [False, True])
def test_machine_without_room_leaves_nothing(memory: SharedMemory, monkeypatch: pytest.MonkeyPatch, again: bool) -> None:
    def full(*_: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = len(os.listdir("/proc/self/fd"))
    if again:
        memory.released(write(memory, b"x"), True)
    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate" if again else "pwrite", full)
        assert write(memory, b"x" * MIB) == ""
    assert memory.size == 0
    assert len(os.listdir("/proc/self/fd")) == before
    assert write(memory, b"x" * MIB)


async def test_spare_that_is_not_used_goes(memory: SharedMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "SPARE_S", 0.02)
    memory.released(write(memory, b"x" * MIB), True)
    with trio.fail_after(20):
        while memory.size or memory._sweeping:  # noqa: ASYNC110
            await trio.sleep(0.01)
    assert write(memory, b"y" * MIB)


def test_large_argument_goes_through_shared_memory(tmp_path: Path) -> None:
    with driving(tmp_path / "peer", shared_bytes=64 * MIB) as peer:
        assert grid.submit(len, b"x" * 20 * MIB).result(20) == 20 * MIB
        assert grid.submit(len, b"x" * 70 * MIB).result(20) == 70 * MIB
        pages = peer.of(wire.Page)
    assert [page.shared for page in pages] == [True, False]


class Odd:
    """Pickled by reference to this module."""

    def __reduce__(self) -> Any:
        return Odd, ()


def test_modules_that_a_pickle_names() -> None:
    parts, _ = serialize.dump_segment([Odd(), bytearray(400_000), b"\x8c\x02os\x94\x8c\x04path\x94\x93"])
    assert serialize.modules_in(parts) == (__name__, "os")  # the last was text: harmless, it is loaded here


def test_modules_are_told_once_before_a_large_page(tmp_path: Path) -> None:
    with driving(tmp_path / "peer", shared_bytes=64 * MIB) as peer:
        for _ in range(2):
            assert grid.submit(_second, Odd(), b"x" * 10 * MIB).result(20) == 10 * MIB
        kinds = [message for message in peer.received if isinstance(message, wire.Expect | wire.Page)]
    assert kinds[0] == wire.Expect((__name__,))
    assert [type(message) for message in kinds] == [wire.Expect, wire.Page, wire.Page]


def _second(_: Odd, data: bytes) -> int:
    return len(data)


@pytest.mark.real
def test_arguments_that_tasks_keep_and_change_stay_theirs(tmp_path: Path) -> None:
    """Each page is written where the one before was, unless a task still has that; what a task changes, it alone sees."""
    done = run(
        tmp_path,
        """
        import pickle
        import grid

        class Array:
            def __init__(self, data):
                self.data = memoryview(data)

            def __reduce_ex__(self, protocol):
                return Array, (pickle.PickleBuffer(self.data),)

        kept = []
        SIZE = 3 << 20

        def task(array, number):
            for old, known in kept:
                assert old.data == bytes([known]) * SIZE, (old.data[0], known)
            assert array.data == bytes([number]) * SIZE
            if number % 3:
                array.data[:] = bytes(SIZE)
            else:
                kept.append((array, number))

        data = bytearray(SIZE)
        for number in range(1, 13):
            data[:] = bytes([number]) * SIZE
            future = grid.submit(task, Array(data), number)
            data[:] = bytes(SIZE)
            future.result()
        from grid.api.session import current
        print(current().setup.shared_bytes >= SIZE)
        """,
    )
    assert done.stdout.splitlines() == ["True"], done.stderr
    assert done.stderr == ""
