"""The registry of jobs over restarts of the peer: what goes on, what is failed, what is forgotten, what is kept."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from dht.core import codec
from dht.core.identity import PeerId
from grid.api.client import ControlError
from grid.core.board import Board
from grid.core.job import FAILED, FINISHED, Outcome, job_id
from grid.core.mandate import Branch
from grid.jobs import ARCHIVED_MAX, Jobs
from tests.core.material import signed_spec, spec

ME, OTHER = PeerId(b"m" * 20), PeerId(b"o" * 20)
SPEC, SIGNED = spec(), signed_spec()
JOB = job_id(SIGNED.payload)
SHOWN = {"leader": OTHER.hex(), "epoch": 4, "replicas": [OTHER.hex(), ME.hex()], "stages": [], "peers": {}}


class Home:
    """A folder of jobs, and the registry of each of the peer's lives."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.forgotten: list[str] = []

    def start(self) -> Jobs:
        jobs = Jobs(self.folder, ME, Board(), None, self.forgotten.append)
        jobs.load()
        return jobs

    @property
    def job(self) -> Path:
        return self.folder / JOB.hex()

    def follow(self, jobs: Jobs) -> Any:
        self.job.mkdir(exist_ok=True)
        return jobs.follow(JOB, SIGNED, SPEC, self.job)


@pytest.fixture
async def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


async def test_job_with_a_journal_goes_on(home: Home) -> None:
    home.follow(home.start())
    (home.job / "raft-root").mkdir()
    (home.job / "work").mkdir()
    jobs = home.start()
    assert [(job, path) for job, _, _, path in jobs.unfinished] == [(JOB, home.job)]
    assert jobs.archived == {}
    assert not (home.job / "work").exists()
    assert home.follow(jobs).spec == SPEC


async def test_job_that_lived_here_alone_is_failed(home: Home) -> None:
    jobs = home.start()
    home.job.mkdir()
    jobs.begin(JOB, cast(Any, SimpleNamespace(folder=home.job)), SIGNED)
    again = home.start()
    outcome = again.archived[JOB].view.outcome
    assert outcome is not None
    assert (outcome.state, outcome.code) == (FAILED, "leader-stopped")
    assert home.start().archived[JOB].view.outcome == outcome


async def test_job_that_others_hold_is_not_failed(home: Home) -> None:
    jobs = home.start()
    home.follow(jobs)
    jobs.unfollow(JOB)
    assert not home.job.exists()
    home.job.mkdir()
    (home.job / "spec").write_bytes(codec.encode(SIGNED))  # killed before it was accepted
    again = home.start()
    assert (again.archived, again.unfinished) == ({}, [])
    assert not home.job.exists()


async def test_outcome_is_kept_with_what_its_leader_said(home: Home) -> None:
    jobs = home.start()
    followed = home.follow(jobs)
    followed.view.write(1, b"output")
    jobs.archive(JOB, SPEC, Outcome(FINISHED, 0), SHOWN | {"branch": "ab"})
    assert jobs.followed == {}
    for life in (jobs, home.start()):
        shown, _ = await life.ask(JOB, "show", {})
        assert (shown["state"], shown["leader"], shown["epoch"], shown["branch"]) == (FINISHED, OTHER.hex(), 4, "ab")
        assert shown["replicas"] == [OTHER.hex(), ME.hex()]
        answer, body = await life.ask(JOB, "poll", {"stdout": 0, "stderr": 0, "print": -1})
        assert (body, answer["final"]) == (b"output", True)
        row = life.known()[JOB]
        assert (row["leader"], row["epoch"], row["replicas"], row["conflict"]) == (OTHER.hex(), 4, 2, False)


async def test_who_led_the_job_knows_more_than_its_log(home: Home) -> None:
    jobs = home.start()
    jobs.archive(JOB, SPEC, Outcome(FINISHED, 0), SHOWN)
    mine = SHOWN | {"leader": ME.hex(), "epoch": 5, "peers": {ME.hex(): {"done": 1, "executed": 2, "stolen": 3}}}
    jobs.archive(JOB, SPEC, Outcome(FINISHED, 0), mine)
    jobs.archive(JOB, SPEC, Outcome(FINISHED, 0), SHOWN)
    shown, _ = await jobs.ask(JOB, "show", {})
    assert shown["peers"] == mine["peers"]


async def test_prints_of_tasks_are_not_at_a_replica(home: Home) -> None:
    jobs = home.start()
    jobs.archive(JOB, SPEC, Outcome(FINISHED, 0), SHOWN)
    with pytest.raises(ControlError) as caught:
        await jobs.answer(JOB, "task_log", {"stage": 0, "index": 0})
    assert caught.value.code == "not-here"


async def test_archive_is_bounded(home: Home) -> None:
    jobs = home.start()
    for number in range(ARCHIVED_MAX + 3):
        signed = signed_spec(b"%d" % number)
        jobs.archive(job_id(signed.payload), spec(b"%d" % number), Outcome(FINISHED, 0), SHOWN)
    assert len(jobs.archived) == ARCHIVED_MAX
    assert home.forgotten == [f"outcome:{job_id(signed_spec(b'%d' % n).payload).hex()}" for n in range(3)]


async def test_damaged_folder_costs_only_itself(home: Home) -> None:
    jobs = home.start()
    jobs.archive(JOB, SPEC, Outcome(FINISHED, 0), SHOWN)
    (home.job / "spec").write_bytes(codec.encode(SIGNED))
    (home.folder / "broken").mkdir()
    (home.folder / "broken" / "spec").write_bytes(b"\xff\xff")
    assert list(home.start().archived) == [JOB]


async def test_jobs_that_nobody_can_take_over(home: Home) -> None:
    jobs = home.start()

    def led(voters: tuple[PeerId, ...] | None) -> Any:
        replica = SimpleNamespace(voters=voters, branch=Branch()) if voters is not None else None
        return SimpleNamespace(replica=replica, view=SimpleNamespace(outcome=None), abandoned=False)

    names = [job_id(b"%d" % number) for number in range(3)]
    jobs.led.update(zip(names, (led((ME, OTHER)), led((ME,)), led(None)), strict=True))
    assert jobs.stranded() == ([names[1]], [names[2]])
