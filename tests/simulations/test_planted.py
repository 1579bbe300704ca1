"""Bugs put into the product on purpose: the checkers must find each, within 200 seeds of a scenario in which it does harm."""

from __future__ import annotations

import pytest

from simulations import scenario, world
from simulations.planted import BUGS, WHERE

SEEDS = 200


@pytest.mark.timeout(900)
@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(bug: str) -> None:
    of = scenario.load(WHERE[bug])
    for seed in range(1, SEEDS + 1):
        with BUGS[bug]():
            planted = world.run(of, seed)
        if not planted.ok and world.run(of, seed).ok:  # it is the bug that was found
            return
    pytest.fail(f"a product that {bug} ran {SEEDS} worlds of {of.name} without a violation of its own")
