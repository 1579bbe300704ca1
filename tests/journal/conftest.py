"""A disk in memory, and a journal on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.journal.disks import MemoryDisk
from tests.journal.world import World


@pytest.fixture
def disk() -> MemoryDisk:
    return MemoryDisk()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "journal"


@pytest.fixture
def world(folder: Path, disk: MemoryDisk) -> World:
    return World(folder, disk)
