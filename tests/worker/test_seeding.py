"""Seeds of tasks."""

from __future__ import annotations

import itertools

from grid.worker.seeding import stage_seed, task_seed


def test_seeds_are_what_they_were() -> None:
    """Another value would change the results of people's jobs."""
    assert stage_seed(7, 0) == 11503480967311697123
    assert task_seed(stage_seed(7, 0), 0) == 18347745078051501702


def test_seeds_of_neighbours_differ_in_about_half_their_bits() -> None:
    base = stage_seed(1, 2)
    seeds = [task_seed(base, index) for index in range(2000)]
    assert len(set(seeds)) == 2000
    flips = [(a ^ b).bit_count() for a, b in itertools.pairwise(seeds)]
    assert 30 < sum(flips) / len(flips) < 34
    assert min(flips) > 8
