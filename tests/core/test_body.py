"""Bodies in memory that a child shares: it is written anew only once nobody can see it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from grid import body as bodies
from grid.body import FileSlice, SharedFile


class World:
    """A spool, a file that stands for a child's memory, and what the child was told."""

    def __init__(self, folder: Path) -> None:
        self.spool = bodies.Spool(folder / "spool")
        self.path = folder / "memory"
        self.path.write_bytes(b"page")
        self.told: list[tuple[str, bool]] = []

    def share(self) -> tuple[FileSlice, SharedFile]:
        body = self.spool.share(str(self.path), lambda path, reusable: self.told.append((path, reusable)))
        assert isinstance(body.file, SharedFile)
        return body, body.file


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_shared_memory_outlives_its_child(world: World) -> None:
    body, _ = world.share()
    world.path.unlink()
    assert (bodies.read(body), body.whole, bodies.size_of(body), bodies.memory_of(body)) == (b"page", True, 4, 0)
    path = body.file.path
    bodies.release(body)
    assert not os.path.exists(path)


@pytest.mark.parametrize("worker_first", [False, True])
def test_shared_memory_comes_back_after_all_who_see_it(world: World, worker_first: bool) -> None:
    body, file = world.share()
    file.owners += 1
    file.lent += 2
    for last in (False, True):
        (file.give_back(True) if worker_first else bodies.release(body))
        assert not world.told
        (bodies.release(body) if worker_first else file.give_back(True))
        assert world.told == ([(str(world.path), True)] if last else [])


def test_shared_memory_that_a_worker_kept_is_not_reusable(world: World) -> None:
    body, file = world.share()
    file.lent += 2
    file.give_back(False)
    bodies.release(body)
    assert not world.told, "a worker may be about to map it"
    file.give_back(True)
    assert world.told == [(str(world.path), False)]


def test_what_is_no_memory_is_refused(world: World) -> None:
    world.path.unlink()
    os.mkfifo(world.path)
    with pytest.raises(OSError, match="is no memory"):
        world.share()
    assert not world.told


def test_shared_memory_goes_with_the_job(world: World) -> None:
    body, file = world.share()
    file.lent += 1
    path = body.file.path
    world.spool.close()
    assert not os.path.exists(path)
    with pytest.raises(FileNotFoundError):
        bodies.read(body)
    bodies.release(body)
    file.give_back(True)
    assert not world.told
