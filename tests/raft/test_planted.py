"""Each planted bug is caught by the checkers within 200 seeds: they bite."""

from __future__ import annotations

import pytest

from grid.core.raft import Raft
from grid.core.raft_check import Violation
from grid.core.raft_log import InvariantError
from tests.raft import planted
from tests.raft.test_simulation import PROFILES, world_of
from tests.raft.world import SmallRaft

SEEDS = 200
BUGS = [bug for bug in vars(planted).values() if isinstance(bug, type) and issubclass(bug, Raft) and bug is not Raft]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_planted_bug_is_caught(bug: type[Raft]) -> None:
    small = type(bug.__name__, (bug, SmallRaft), {})
    for seed in range(SEEDS):
        try:
            world = world_of(seed, sorted(PROFILES)[seed % len(PROFILES)], small)
            world.run(300)
        except (Violation, InvariantError):
            return
    pytest.fail(f"{bug.__name__} was not caught in {SEEDS} seeds")


def test_there_are_planted_bugs() -> None:
    assert len(BUGS) >= 8
