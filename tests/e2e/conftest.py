"""A grid of three peers that scenarios share as long as they leave it as they found it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.grids import Grid, Peer, until


@pytest.fixture
def grid(tmp_path: Path) -> Iterator[Grid]:
    """An empty grid for one test."""
    with Grid(tmp_path) as made:
        yield made


@pytest.fixture(scope="session")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Peer]]:
    """One founder, two that joined by invite, one slot each; all see all."""
    with Grid(tmp_path_factory.mktemp("three")) as grid:
        first = grid.found()
        peers = [first, grid.join(first), grid.join(first)]
        for peer in peers:
            until(lambda peer=peer: len(peer.status()["peers"]) == 3, 10, "three peers see each other")  # type: ignore[misc]
        yield peers
        for peer in peers:
            assert peer.running, peer.log.read_text()
        assert not any("Traceback" in peer.log.read_text() for peer in peers), "\n".join(p.log.read_text() for p in peers)
