"""Whoever follows a job sees all it writes, once and in order, whoever leads it; and hears of a change in a line or two."""

from __future__ import annotations

import re

import pytest

from tests.e2e.grids import Done, Grid
from tests.e2e.survival import Diary, Watched, grow, printed, steady, submit

pytestmark = [pytest.mark.real, pytest.mark.timeout(240)]

COUNT = 240
OUT = printed(COUNT)
USUAL = re.compile(r"job [0-9a-f]{64}|stage \d+ .*")
"""What an attached submit says of a job that nothing happens to."""
LINES_MAX = 2
AT = 10
SUM = sum(i * i for i in range(AT))


def heard(done: Done) -> list[str]:
    """What is on stderr because something happened."""
    return [line for line in done.err.splitlines() if not USUAL.fullmatch(line)]


def quiet(done: Done, out: str) -> None:
    """It ended well with this output, and said next to nothing else."""
    assert (done.status, done.out) == (0, out), done.err
    assert len(heard(done)) <= LINES_MAX, done.err


def test_members_follow_a_job_whose_leader_dies(grid: Grid) -> None:
    peers = grow(grid, 3)
    job = submit(peers[0], peers, steady(COUNT))
    job.begun(20)
    following, waiting, fetching = (peers[2].begin(*words, job.id) for words in (("logs", "-f"), ("wait",), ("result",)))
    following.lines_until("stdout", f"{AT} {SUM}")
    job.begun(COUNT // 2)
    job.kill(peers[0])
    job.ends(OUT, COUNT)
    quiet(following.finish(), OUT.partition(f"{AT} {SUM}\n")[2])
    quiet(waiting.finish(), "")
    quiet(fetching.finish(), OUT)


def test_submit_goes_on_after_its_own_peer_slept_and_the_next_leader_died(grid: Grid) -> None:
    peers = grow(grid, 4)
    diary = Diary(grid.root / "diary.txt")
    attached = peers[0].begin("submit", *diary.options, peers[0].script(steady(COUNT)))
    job = Watched(attached.lines_until("stderr", "job ").split()[1], peers, diary)
    job.begun(40)
    with job.frozen(peers[0]):
        job.leader()
        job.begun(diary.begun() + 20)
    leader = job.leader()
    assert leader is not peers[0]
    job.begun(diary.begun() + 20)
    job.kill(leader)
    job.ends(OUT, COUNT)
    quiet(attached.finish(), OUT)


def test_what_was_shown_before_a_death_is_shown_after_it(grid: Grid) -> None:
    """From its first byte, by a peer that came when the first leader was dead."""
    peers = grow(grid, 3)
    job = submit(peers[0], peers, steady(COUNT))
    job.begun(COUNT // 2)
    before = job.stdout(peers[1])
    assert before
    job.kill(peers[0])
    job.leader()
    newcomer = grid.join(peers[1])
    following, fetching = newcomer.begin("logs", "-f", job.id), newcomer.begin("result", job.id)
    for watcher in (following, fetching):
        done = watcher.finish()
        quiet(done, OUT)
        assert done.out.startswith(before)
