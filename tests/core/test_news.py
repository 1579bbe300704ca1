"""News of a job is believed from its leader only."""

from __future__ import annotations

import msgspec
import pytest

from dht.core.identity import BadSignature, Identity
from dht.core.membership import Membership
from grid.core.errors import FencedError, RefusedError
from grid.core.job import BlobRef, JobSpec, sign_spec
from grid.core.messages import JobNews
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
