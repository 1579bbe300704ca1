"""Each scenario runs in memory under virtual time, and on real loopback sockets.

A test that asks for `world` must ask for `clock` too (for `memory_world`: `autojump_clock`): pytest-trio only uses a clock
that is among the test's own arguments.
"""

from __future__ import annotations

import pytest
import trio.testing

from tests.transport.support import Grid, World


@pytest.fixture(params=["memory", "real"])
def clock(request: pytest.FixtureRequest) -> trio.testing.MockClock | None:
    return trio.testing.MockClock(autojump_threshold=0) if request.param == "memory" else None


@pytest.fixture
def world(clock: trio.testing.MockClock | None) -> World:
    return World(memory=clock is not None)


@pytest.fixture
def memory_world(autojump_clock: trio.testing.MockClock) -> World:
    return World(memory=True)


@pytest.fixture
def grid() -> Grid:
    return Grid()
