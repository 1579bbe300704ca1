"""News of jobs."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from grid.core import limits
from grid.core.board import Board
from grid.core.job import CANCELLED, FINAL, FINISHED, RUNNING, JobId
from tests.core.material import LEADER, news, signed_spec, spec

SPEC, SIGNED = spec(), signed_spec()


def job(number: int) -> JobId:
    return JobId(number.to_bytes(32, "big"))


def hear(board: Board, number: int, now_s: float, *, epoch: int = 1, version: int = 1, state: str = RUNNING) -> bool:
    return board.hear(job(number), SPEC, news(epoch=epoch, version=version, state=state, signed=SIGNED), now_s)


def test_news_is_passed_on_once() -> None:
    board = Board()
    assert hear(board, 1, 0.0)
    assert not hear(board, 1, 1.0)
    assert hear(board, 1, 2.0, version=2)
    assert not hear(board, 1, 3.0, version=1)
    entry = board.get(job(1))
    assert entry is not None
    assert (entry.news.version, entry.leader) == (2, LEADER.id)
    assert board.spec(job(1)) is SPEC


def test_higher_epoch_beats_higher_version() -> None:
    board = Board()
    hear(board, 1, 0.0, epoch=1, version=9)
    assert hear(board, 1, 0.0, epoch=2, version=1)
    assert not hear(board, 1, 0.0, epoch=1, version=10)


def test_repeated_news_keeps_the_job_alive_and_old_news_does_not() -> None:
    board = Board()
    hear(board, 1, 0.0, version=2)
    late_s = limits.JOB_FORGET_S + 5
    hear(board, 1, late_s - 1, version=1)
    assert board.live(late_s) == []
    hear(board, 1, late_s, version=2)
    assert [known for known, _ in board.live(late_s)] == [job(1)]


def test_job_that_is_over_stays_known_and_stays_over() -> None:
    board = Board()
    hear(board, 1, 0.0)
    assert hear(board, 1, 1.0, version=2, state=FINISHED)
    assert not hear(board, 1, 2.0, epoch=5, version=9, state=RUNNING)
    assert board.live(2.0) == []
    entry = board.get(job(1))
    assert entry is not None
    assert not entry.live


def test_unknown_job() -> None:
    board = Board()
    assert board.get(job(1)) is None
    assert board.spec(job(1)) is None


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "JOBS_KNOWN_MAX", 4)


@pytest.mark.usefixtures("small")
def test_ended_jobs_go_before_live_ones_and_the_longest_unheard_of_first() -> None:
    board = Board()
    for number in range(4):
        hear(board, number, float(number), state=CANCELLED if number in (2, 3) else RUNNING)
    hear(board, 4, 4.0)
    assert {known for known, _ in board.entries()} == {job(n) for n in (0, 1, 3, 4)}
    hear(board, 5, 5.0)
    hear(board, 6, 6.0)
    assert {known for known, _ in board.entries()} == {job(n) for n in (1, 4, 5, 6)}
    assert len(board) == 4


@pytest.mark.usefixtures("small")
def test_news_that_there_is_no_room_for_is_not_passed_on() -> None:
    board = Board()
    for number in range(4):
        hear(board, number, float(number))
    assert not hear(board, 9, 9.0, state=FINISHED)
    assert board.get(job(9)) is None


@dataclass
class Known:
    order: tuple[int, int]
    state: str
    heard_s: float


@pytest.mark.usefixtures("small")
class Twin(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.real = Board()
        self.twin: dict[int, Known] = {}
        self.now_s = 0.0

    @rule(
        number=st.integers(0, 3),
        epoch=st.integers(1, 3),
        version=st.integers(1, 3),
        state=st.sampled_from([RUNNING, RUNNING, FINISHED]),
    )
    def hear(self, number: int, epoch: int, version: int, state: str) -> None:
        self.now_s += 1.0
        known = self.twin.get(number)
        fresh = known is None or (known.state not in FINAL and (epoch, version) > known.order)
        assert hear(self.real, number, self.now_s, epoch=epoch, version=version, state=state) == fresh
        if fresh:
            self.twin[number] = Known((epoch, version), state, self.now_s)
        elif known is not None and known.order == (epoch, version):
            known.heard_s = self.now_s

    @invariant()
    def same(self) -> None:
        live = {n for n, k in self.twin.items() if k.state not in FINAL and self.now_s - k.heard_s <= limits.JOB_FORGET_S}
        assert {known for known, _ in self.real.live(self.now_s)} == {job(n) for n in live}
        assert len(self.real) == len(self.twin)


TestTwin = Twin.TestCase
TestTwin.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
