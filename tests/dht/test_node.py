"""Nodes find each other, keep records and answer, on a network in memory and in virtual time."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from tests.dht.world import memory_grid


@pytest.mark.parametrize("count", [2, 3, 5, 12])
async def test_a_few_peers_all_know_each_other_within_two_seconds(autojump_clock: MockClock, count: int) -> None:
    async with trio.open_nursery() as nursery:
        grid = memory_grid(nursery)
        await grid.start_all(count)
        assert await grid.complete() < 2
        assert all(node.counters["failed"] == 0 for node in grid.nodes.values())
        nursery.cancel_scope.cancel()
