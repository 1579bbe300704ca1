"""News of a job is believed from its leader only."""

from __future__ import annotations

import msgspec
import pytest

from dht.core.identity import BadSignature, Identity
from dht.core.membership import Membership
from grid.core import news as news_module
from grid.core.errors import FencedError, RefusedError
from grid.core.job import BlobRef, JobSpec, job_id, sign_spec
from grid.core.mandate import Branch, Mandate, endorse
from grid.core.messages import Elected, JobNews
from grid.core.news import check_news, sign_news

ROOT, LEADER, STRANGER = (Identity.from_seed(bytes([n]) * 32) for n in (1, 2, 3))
MEMBER = Membership.found(LEADER, ROOT, 1_000_000)
SPEC = JobSpec(
    nonce=bytes(16),
    grid=MEMBER.grid,
    submitter=LEADER.public,
    owner=bytes(MEMBER.owner),
    name="job.py",
    script="job.py",
    argv=(),
    code=BlobRef(bytes(32), 1),
    python="3.11",
    seed=1,
    created_s=0.0,
)
ROOT_BRANCH = Branch()
NEWS = JobNews(sign_spec(SPEC, LEADER, MEMBER.chain), 1, LEADER.id, ("127.0.0.1", 1), 1, "running", True)


def test_leader_is_believed() -> None:
    check_news(sign_news(NEWS, LEADER), SPEC)


@pytest.mark.parametrize(
    "change",
    [{"state": "cancelled"}, {"version": 9}, {"work": False}, {"leader_address": ("127.0.0.1", 2)}, {"signature": b""}],
)
def test_changed_news_is_not_believed(change: dict[str, object]) -> None:
    with pytest.raises(BadSignature):
        check_news(msgspec.structs.replace(sign_news(NEWS, LEADER), **change), SPEC)


def test_member_that_does_not_lead_the_job_is_not_believed() -> None:
    forged = sign_news(msgspec.structs.replace(NEWS, leader=STRANGER.id, state="failed"), STRANGER)
    with pytest.raises(RefusedError):
        check_news(forged, SPEC)


def test_epoch_that_nobody_was_elected_to_is_fenced() -> None:
    with pytest.raises(FencedError):
        check_news(sign_news(msgspec.structs.replace(NEWS, epoch=2), LEADER), SPEC)


# ---- later leaders and branches -----------------------------------------------------------------------------------------

JOB = job_id(NEWS.spec.payload)
REPLICAS = [Identity.from_seed(bytes([n]) * 32) for n in range(10, 15)]
HELD = msgspec.structs.replace(SPEC, replicas=tuple(peer.id for peer in REPLICAS))
NEWCOMERS = [Identity.from_seed(bytes([n]) * 32) for n in range(20, 26)]


def mandate(leader: Identity, voters: list[Identity], count: int = 3, epoch: int = 2, branch: Branch = ROOT_BRANCH) -> Mandate:
    endorsements = tuple(endorse(JOB, branch.name, epoch, leader.id, voter) for voter in voters[:count])
    return Mandate(tuple(voter.id for voter in voters), endorsements)


def led_by(leader: Identity, known: Mandate, epoch: int = 2, branch: Branch = ROOT_BRANCH, **changes: object) -> JobNews:
    news = msgspec.structs.replace(NEWS, leader=leader.id, epoch=epoch, branch=branch, mandate=known, **changes)
    return sign_news(news, leader)


def test_elected_leader_is_believed() -> None:
    check_news(led_by(REPLICAS[1], mandate(REPLICAS[1], REPLICAS)), HELD)


def test_leader_of_a_branch_is_believed() -> None:
    branch = Branch(b"b" * 20, (b"",), 2, 7)
    check_news(led_by(REPLICAS[1], mandate(REPLICAS[1], REPLICAS[:2], 2, 3, branch), 3, branch), HELD)


def test_minority_elects_nobody() -> None:
    with pytest.raises(RefusedError, match="no majority"):
        check_news(led_by(REPLICAS[0], mandate(REPLICAS[0], REPLICAS, 2)), HELD)


def test_mandate_of_another_epoch_or_branch_is_refused() -> None:
    known = mandate(REPLICAS[0], REPLICAS)
    with pytest.raises(BadSignature):
        check_news(led_by(REPLICAS[0], known, epoch=3), HELD)
    with pytest.raises(BadSignature):
        check_news(led_by(REPLICAS[0], known, branch=Branch(b"b", (b"",))), HELD)


def test_news_of_an_elected_leader_are_signed_by_it() -> None:
    news = led_by(REPLICAS[0], mandate(REPLICAS[0], REPLICAS))
    with pytest.raises(RefusedError):
        check_news(msgspec.structs.replace(news, key=STRANGER.public), HELD)
    with pytest.raises(BadSignature):
        check_news(msgspec.structs.replace(news, version=7), HELD)


def test_strangers_that_elect_each_other_are_refused() -> None:
    with pytest.raises(RefusedError, match="nobody who is known"):
        check_news(led_by(NEWCOMERS[0], mandate(NEWCOMERS[0], NEWCOMERS[:3], 2)), HELD)


def test_replicas_of_an_accepted_mandate_vouch_for_later_ones() -> None:
    known = mandate(NEWCOMERS[0], NEWCOMERS[:3], 2)
    check_news(led_by(NEWCOMERS[0], known), HELD, [NEWCOMERS[1].id])
    with pytest.raises(RefusedError, match="nobody who is known"):
        check_news(led_by(NEWCOMERS[0], known), HELD, [NEWCOMERS[2].id])  # it is named, but said nothing


def test_lineage_ties_replicas_nobody_here_knows_to_the_spec() -> None:
    step = mandate(REPLICAS[0], [*REPLICAS[:2], NEWCOMERS[0]], 2)
    last = mandate(NEWCOMERS[1], NEWCOMERS[:3], 2, 5)
    lineage = (Elected(b"", 2, REPLICAS[0].id, step),)
    check_news(led_by(NEWCOMERS[1], last, 5, lineage=lineage), HELD)
    forged = (Elected(b"", 2, NEWCOMERS[0].id, mandate(NEWCOMERS[0], NEWCOMERS[:3], 2)),)
    with pytest.raises(RefusedError):
        check_news(led_by(NEWCOMERS[1], last, 5, lineage=forged), HELD)


def test_mandate_that_was_accepted_is_not_verified_again(monkeypatch: pytest.MonkeyPatch) -> None:
    news = led_by(REPLICAS[1], mandate(REPLICAS[1], REPLICAS))
    check_news(news, HELD)
    newer = led_by(REPLICAS[1], news.mandate, version=8)
    monkeypatch.setattr(news_module, "check_mandate", None)
    check_news(newer, HELD, (), news)
    with pytest.raises(TypeError):
        check_news(newer, HELD, (), None)


@pytest.mark.parametrize(
    "branch",
    [
        Branch(b"", (b"",)),
        Branch(b"b"),
        Branch(b"b", (b"", b"b")),
        Branch(b"b" * 33, (b"",)),
        Branch(b"b", (b"",) * 17),
    ],
)
def test_branches_that_make_no_sense_are_refused(branch: Branch) -> None:
    with pytest.raises(RefusedError):
        check_news(led_by(REPLICAS[0], mandate(REPLICAS[0], REPLICAS, 3, 2, branch), branch=branch), HELD)
