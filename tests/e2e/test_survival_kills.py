"""Peers of a running job are killed: whoever led it, however many, all of them. Its result is exact; what had ended stays done.

The scenarios share five peers; each finds them all running.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import pytest

from tests.e2e.grids import Grid, Peer
from tests.e2e.survival import Watched, can_come_back, grow, printed, revive, steady, submit

pytestmark = [pytest.mark.real, pytest.mark.timeout(240)]

COUNT = 400
OUT = printed(COUNT)


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Peer]]:
    """Five peers."""
    with Grid(tmp_path_factory.mktemp("five")) as grid:
        peers = grow(grid, 5)
        can_come_back(peers)
        yield peers
        assert not any("Traceback" in peer.log.read_text() for peer in peers), "\n".join(p.log.read_text() for p in peers)


@pytest.fixture
def five(grown: list[Peer]) -> list[Peer]:
    """Five peers, all of them running."""
    revive(grown)
    return grown


def far_along(job: Watched, least: int, most: int) -> None:
    """Wait for a moment that nobody chose: after so many executions, more or less."""
    job.begun(random.randint(least, most))


def test_submitter_dies_as_soon_as_submit_returned(five: list[Peer]) -> None:
    job = submit(five[0], five, steady(100))
    job.kill(five[0])
    shown = job.ends(printed(100), 100)
    assert shown["epoch"] > 1
    assert shown["leader"] != five[0].id
    assert not shown["recovered"]  # four of five are a majority


def test_submitter_dies_at_any_moment(five: list[Peer]) -> None:
    job = submit(five[1], five, steady(COUNT))
    far_along(job, 100, COUNT - 100)
    job.kill(five[1])
    job.ends(OUT, COUNT)
    job.spares_finished_work()


def test_leader_dies_three_times_in_a_row(five: list[Peer]) -> None:
    job = submit(five[2], five, steady(COUNT))
    leaders = [five[2]]
    far_along(job, 60, 100)
    for _ in range(3):
        job.kill(leaders[-1])
        leaders.append(job.leader())
        assert job.shown()["state"] == "running"
        job.begun(job.diary.begun() + random.randint(20, 60))
    job.ends(OUT, COUNT)
    assert len(set(leaders)) == 4
    job.spares_finished_work()


def test_all_but_one_die_one_after_another(five: list[Peer]) -> None:
    """Each when a leader has counted what had ended by the last death: what nobody could be told of dies with who did it."""
    job = submit(five[0], five, steady(COUNT))
    far_along(job, 80, 120)
    for victim in random.sample(five, 4):
        job.counted()
        job.kill(victim)
    assert len(job.witnesses) == 1
    shown = job.ends(OUT, COUNT)
    assert shown["leader"] == job.witnesses[0].id
    job.spares_finished_work()


def test_power_fails_everywhere_and_the_submitter_does_not_come_back(five: list[Peer]) -> None:
    job = submit(five[3], five, steady(COUNT))
    far_along(job, COUNT // 2, COUNT // 2)
    released = job.stdout(five[0])
    job.kill(*five)
    returning = [peer for peer in five if peer is not five[3]]
    random.shuffle(returning)
    for peer in returning:
        peer.start()
    shown = job.ends(OUT, COUNT)
    assert OUT.startswith(released)
    assert not shown["recovered"]
    job.spares_finished_work()


def test_leader_leaves(five: list[Peer]) -> None:
    job = submit(five[4], five, steady(COUNT))
    far_along(job, 100, 200)
    job.deaths_s.append(time.monotonic())
    five[4].end(lambda process: five[4]("leave"))
    job.deaths_s.append(time.monotonic())
    assert five[4].process is not None
    assert five[4].process.returncode == 0
    shown = job.ends(OUT, COUNT)
    assert shown["epoch"] > 1
    assert shown["leader"] != five[4].id
    job.spares_finished_work()
