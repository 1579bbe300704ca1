"""News of jobs."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from dht.core.identity import Identity
from grid.core import limits
from grid.core.board import CONFLICTS_MAX, Board
from grid.core.job import CANCELLED, FINAL, FINISHED, RUNNING, JobId
from grid.core.mandate import Branch, Endorsement, Mandate
from grid.core.messages import JobNews
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


def test_outcome_beats_later_news_of_the_same_branch() -> None:
    board = Board()
    hear(board, 1, 0.0, epoch=4, version=9)
    assert hear(board, 1, 1.0, epoch=3, version=2, state=FINISHED)


CHILD = Branch(b"c" * 20, (b"",), 2, 5)
SIBLING = Branch(b"d" * 20, (b"",), 2, 5)


def on(branch: Branch, epoch: int, version: int, state: str = RUNNING, voters: tuple[bytes, ...] = ()) -> JobNews:
    known = news(epoch=epoch, version=version, state=state, signed=SIGNED)
    return msgspec.structs.replace(known, branch=branch, mandate=Mandate(voters))


def test_branch_replaces_what_it_was_opened_from_and_is_replaced_by_newer_news_of_it() -> None:
    board = Board()
    hear(board, 1, 0.0, epoch=2, version=5)
    assert board.hear(job(1), SPEC, on(CHILD, 3, 1), 1.0)
    assert not hear(board, 1, 2.0, epoch=2, version=5)
    assert hear(board, 1, 3.0, epoch=2, version=6)  # its majority lives
    assert not board.hear(job(1), SPEC, on(CHILD, 9, 9), 4.0)


def test_of_two_branches_the_lower_name_goes_on() -> None:
    board = Board()
    board.hear(job(1), SPEC, on(SIBLING, 9, 9), 0.0)
    assert board.hear(job(1), SPEC, on(CHILD, 3, 1), 1.0)
    assert not board.hear(job(1), SPEC, on(SIBLING, 9, 10), 2.0)


def test_outcome_of_another_branch_is_remembered_and_passed_on_once() -> None:
    board = Board()
    board.hear(job(1), SPEC, on(CHILD, 3, 1, FINISHED), 0.0)
    assert board.hear(job(1), SPEC, on(SIBLING, 3, 1, CANCELLED), 1.0)
    assert not board.hear(job(1), SPEC, on(SIBLING, 3, 1, CANCELLED), 2.0)
    entry = board.get(job(1))
    assert entry is not None
    assert (entry.news.branch, entry.news.state) == (CHILD, FINISHED)
    assert entry.conflict is not None
    assert (entry.conflict.branch, entry.conflict.state) == (SIBLING.name, CANCELLED)


def test_outcome_that_wins_replaces_the_one_shown_and_the_conflict_stays() -> None:
    board = Board()
    board.hear(job(1), SPEC, on(CHILD, 3, 1, CANCELLED), 0.0)
    assert not hear(board, 1, 1.0, epoch=2, version=9)  # it goes on elsewhere: no outcome yet
    assert hear(board, 1, 2.0, epoch=2, version=10, state=FINISHED)
    entry = board.get(job(1))
    assert entry is not None
    assert (entry.news.branch, entry.news.state) == (Branch(), FINISHED)
    assert [conflict.branch for conflict in entry.conflicts] == [CHILD.name]


def test_outcome_of_a_branch_ends_a_job_whose_ancestor_still_runs() -> None:
    board = Board()
    hear(board, 1, 0.0, epoch=2, version=9)
    assert board.hear(job(1), SPEC, on(CHILD, 3, 1, FINISHED), 1.0)
    entry = board.get(job(1))
    assert entry is not None
    assert not entry.live
    assert entry.news.branch == CHILD
    assert entry.conflict is None
    assert not hear(board, 1, 2.0, epoch=2, version=10)
    assert hear(board, 1, 3.0, epoch=2, version=11, state=FINISHED)  # it had not heard
    assert [conflict.branch for conflict in entry.conflicts] == [CHILD.name]


def test_conflicts_are_bounded() -> None:
    board = Board()
    board.hear(job(1), SPEC, on(Branch(b"a", (b"",)), 3, 1, FINISHED), 0.0)
    for number in range(2 * CONFLICTS_MAX):
        board.hear(job(1), SPEC, on(Branch(b"b%d" % number, (b"",)), 3, 1, FINISHED), 1.0)
    entry = board.get(job(1))
    assert entry is not None
    assert len(entry.conflicts) == CONFLICTS_MAX


def test_peers_that_hold_a_job_latest_first() -> None:
    board = Board()
    board.hear(job(1), SPEC, on(Branch(), 2, 1, voters=(b"a", b"b")), 0.0)
    board.hear(job(1), SPEC, on(Branch(), 3, 1, voters=(b"c", b"a")), 1.0)
    entry = board.get(job(1))
    assert entry is not None
    assert entry.voters == (b"c", b"a", b"b")
    assert entry.keepers == (LEADER.id, b"c", b"a", b"b")


PEERS = [LEADER, *(Identity(bytes([n]) * 32) for n in range(1, 5))]


def elected(epoch: int, *voters: int) -> JobNews:
    """News of a leader whom these endorse; 0: the submitter's peer."""
    backers = tuple(Endorsement(PEERS[n].public, b"") for n in voters)
    return msgspec.structs.replace(on(Branch(), epoch, 1), mandate=Mandate(tuple(PEERS[n].id for n in voters), backers))


def test_lineage_is_the_shortest_chain_to_peers_the_spec_names() -> None:
    board = Board()

    def epochs(news_: JobNews) -> list[int]:
        return [link.epoch for link in board.lineage(job(1), news_)]

    assert epochs(elected(2, 0, 1)) == []
    board.hear(job(1), SPEC, elected(2, 0, 1), 0.0)
    assert epochs(elected(3, 1, 2)) == [2]
    board.hear(job(1), SPEC, elected(3, 1, 2), 1.0)
    assert epochs(elected(3, 1, 2)) == [2]
    assert epochs(elected(4, 2, 3)) == [2, 3]
    assert epochs(elected(4, 1, 3)) == [2]
    assert epochs(elected(4, 0, 3)) == []


def test_who_listens_is_told_of_what_is_new() -> None:
    board = Board()
    told: list[JobId] = []
    board.listeners.append(told.append)
    hear(board, 1, 0.0)
    hear(board, 1, 0.0)
    hear(board, 2, 0.0)
    assert told == [job(1), job(2)]


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
        fresh = known is None or (known.state not in FINAL and (state in FINAL or (epoch, version) > known.order))
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
