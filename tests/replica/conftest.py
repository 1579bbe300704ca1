"""A world of peers; tests take `autojump_clock` too, so that its time is virtual."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path

import pytest

from tests.replica.world import World, world_of

Peers = Callable[..., AbstractAsyncContextManager[World]]


@pytest.fixture
def peers(tmp_path: Path) -> Peers:
    """peers(count, seed=0): an async context manager of a World."""
    return partial(world_of, tmp_path)
