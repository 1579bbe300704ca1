"""A script that goes from result to result, whose tasks give something else each time: what it showed stays, whoever dies.

Its results reach it before the peer that leads has taken them in (`grid.crew`, `hear`): nothing that follows from them may be on
record without them.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.grids import Grid, until
from tests.e2e.survival import END_S, Watched, grow, submit

pytestmark = [pytest.mark.real, pytest.mark.timeout(240)]

COUNT = 6_000
DEATHS = 3
SCRIPT = f"""
import os
import grid

def draw(i):
    return os.urandom(8).hex()

last = ""
for i in range({COUNT}):
    last = grid.submit(draw, i).result()
    print(i, last, flush=True)
print("last", last)
"""


def test_leaders_of_a_serial_script_die_and_nothing_shown_changes(tmp_path: Path) -> None:
    with Grid(tmp_path) as grid:
        peers = grow(grid, 5)
        job = submit(peers[0], peers, SCRIPT)
        shown = ""
        for death in range(DEATHS):
            wanted = (death + 1) * COUNT // (DEATHS + 2)
            until(lambda wanted=wanted: lines(job) >= wanted or job.over, END_S, f"{wanted} lines")  # type: ignore[misc]
            leader = job.leader()
            before = job.stdout()
            assert before.startswith(shown)
            shown = before
            job.kill(leader)
        done = job.witnesses[0]("result", job.id, within_s=END_S)
        assert done.status == 0, (done.err, job.logs())
        assert done.out.startswith(shown)
        drawn = [line.split() for line in done.out.splitlines()]
        assert [word for word, _ in drawn] == [*map(str, range(COUNT)), "last"]
        assert drawn[-1][1] == drawn[-2][1]
        assert "grid: " not in job.output()[1]  # no run of the script differed from the one before
        assert job.shown()["epoch"] > DEATHS


def lines(job: Watched) -> int:
    """Shown by now."""
    return job.stdout().count("\n")
