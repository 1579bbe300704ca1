"""Stores on a temporary folder, over a disk that can fail."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grid.blobs.store import BlobStore
from tests.blobs.faulty import FaultyDisk
from tests.blobs.helpers import GIB


@pytest.fixture
def disk() -> FaultyDisk:
    return FaultyDisk()


@pytest.fixture
def make(tmp_path: Path, disk: FaultyDisk) -> Callable[..., BlobStore]:
    """Opens the store anew each time it is called, as after a restart."""

    def make_store(quota_bytes: int = GIB, **options: Any) -> BlobStore:
        return BlobStore(tmp_path / "blobs", quota_bytes, disk=disk, **options)

    return make_store
