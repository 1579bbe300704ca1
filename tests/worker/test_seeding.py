"""Seeds of tasks."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest

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


def test_module_imported_late_leaves_the_other_generator_alone() -> None:
    """A script that seeds `random` and then imports numpy keeps its seed."""
    program = """
import random, sys
from grid.worker.seeding import Seeder
seeder = Seeder(7)
seeder.seed(11)
seeder.watch(lambda: 11)
random.seed(5)
import numpy.random
assert random.random() == random.Random(5).random()
assert numpy.random.random() == numpy.random.RandomState(11).random_sample()
seeder.seed(12)
assert random.random() == random.Random(12).random()
assert numpy.random.random() == numpy.random.RandomState(12).random_sample()
"""
    pytest.importorskip("numpy")
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
