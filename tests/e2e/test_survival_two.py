"""Two peers, of which either dies: the other goes on alone, unless the job was submitted with --strict.

Each peer leads a job when one of them dies: one job loses its leader, the other its helper.
"""

from __future__ import annotations

import pytest

from tests.e2e.grids import Grid, Peer, until
from tests.e2e.survival import TAKEOVER_S, Watched, ask, can_come_back, grow, printed, same, steady, submit

pytestmark = [pytest.mark.real, pytest.mark.timeout(180)]

COUNT = 120
OUT = printed(COUNT)


def under_way(peers: list[Peer], *options: str) -> list[Watched]:
    """A job led by each, none of them done."""
    can_come_back(peers)
    jobs = [submit(peer, peers, steady(COUNT), *options) for peer in peers]
    for job in jobs:
        job.begun(COUNT // 3)
    for job in jobs:
        job.counted()
    assert not any(job.over for job in jobs)
    return jobs


def test_one_of_two_dies(grid: Grid) -> None:
    dies, stays = peers = grow(grid, 2)
    jobs = under_way(peers)
    at_s = jobs[0].kill(dies)
    jobs[1].deaths_s.append(at_s)
    ended = [job.ends(OUT, COUNT) for job in jobs]
    for job, shown in zip(jobs, ended, strict=True):
        assert shown["recovered"]
        assert shown["leader"] == stays.id
        job.spares_finished_work()
    dies.start()
    for job, shown in zip(jobs, ended, strict=True):
        until(lambda shown=shown: same(dies, shown), TAKEOVER_S, "the one that returns learns the outcome")  # type: ignore[misc]
        assert job.stdout(dies) == OUT


def test_outcome_that_was_told_outlives_who_told_it(grid: Grid) -> None:
    dies, stays = peers = grow(grid, 2)
    job = submit(dies, peers, steady(20))
    assert ask(dies, "wait", job=job.id, timeout_s=None)["exit_code"] == 0
    assert dies.process is not None
    dies.process.kill()  # at once: before it has told the other that the outcome is on both disks
    job.kill(dies)
    assert job.ends(printed(20), 20)["leader"]
    assert job.stdout(stays) == printed(20)


def test_strict_jobs_wait_for_the_other(grid: Grid) -> None:
    dies, stays = peers = grow(grid, 2)
    jobs = under_way(peers, "--strict")
    at_s = jobs[0].kill(dies)
    jobs[1].deaths_s.append(at_s)
    for job in jobs:

        def told(job: Watched = job) -> str:
            reasons = (ask(stays, "explain", job=job.id) or {"reasons": []})["reasons"]
            return next((reason["text"] for reason in reasons if "majority" in reason["text"]), "")

        assert "strict" in until(told, TAKEOVER_S, "explain says what the job waits for")
        assert told() in stays("explain", job.id).out
        assert stays.show(job.id)["state"] == "running"
    dies.start()
    for job in jobs:
        assert not job.ends(OUT, COUNT)["recovered"]
        job.spares_finished_work()
