"""Who may lead a job: endorsements by a majority of its replicas, and the names of branches."""

from __future__ import annotations

import msgspec
import pytest

from dht.core import codec
from dht.core.identity import BadSignature, Identity
from grid.core.errors import RefusedError
from grid.core.mandate import (
    DEPTH_MAX,
    ENDORSEMENT_DOMAIN,
    VOTERS_MAX,
    Branch,
    Endorsement,
    Mandate,
    check_mandate,
    endorse,
)

JOB = b"j" * 32
EPOCH = 4
PEERS = [Identity(bytes([number]) * 32) for number in range(1, 6)]
LEADER = PEERS[0]
ROOT = Branch()


def mandate(endorsers: int, voters: int = 5, **changed: object) -> Mandate:
    said: dict[str, object] = {"job": JOB, "branch": b"", "epoch": EPOCH, "leader": LEADER.id, **changed}
    endorsements = tuple(endorse(voter=peer, **said) for peer in PEERS[:endorsers])  # type: ignore[arg-type]
    return Mandate(tuple(peer.id for peer in PEERS[:voters]), endorsements)


def check(shown: Mandate, known: tuple[bytes, ...] = (PEERS[1].id,)) -> None:
    check_mandate(shown, JOB, b"", EPOCH, LEADER.id, known)


def test_majority_endorses() -> None:
    for endorsers, voters in ((3, 5), (5, 5), (2, 3), (2, 2), (1, 1)):
        check(mandate(endorsers, voters), (LEADER.id,))


def test_half_is_no_majority() -> None:
    for endorsers, voters in ((2, 5), (2, 4), (1, 2), (0, 1)):
        with pytest.raises(RefusedError, match="no majority"):
            check(mandate(endorsers, voters), (LEADER.id,))


def test_one_voter_signs_often() -> None:
    shown = mandate(2)
    with pytest.raises(RefusedError, match="twice"):
        check(Mandate(shown.voters, (*shown.endorsements, shown.endorsements[0])))


def test_strangers_endorse() -> None:
    shown = mandate(2)
    stranger = endorse(JOB, b"", EPOCH, LEADER.id, Identity(b"s" * 32))
    with pytest.raises(RefusedError, match="nobody"):
        check(Mandate(shown.voters, (*shown.endorsements, stranger)))


@pytest.mark.parametrize(
    "changed",
    [{"job": b"k" * 32}, {"branch": b"other"}, {"epoch": EPOCH + 1}, {"leader": PEERS[1].id}],
    ids=lambda changed: next(iter(changed)),
)
def test_endorsement_of_something_else(changed: dict[str, object]) -> None:
    with pytest.raises(BadSignature):
        check(mandate(3, **changed))


def test_signature_of_another_purpose() -> None:
    shown = mandate(2)
    statement = codec.encode((JOB, b"", EPOCH, LEADER.id))
    assert ENDORSEMENT_DOMAIN != "grid/news/1"
    false = Endorsement(PEERS[2].public, PEERS[2].sign("grid/news/1", statement))
    with pytest.raises(BadSignature):
        check(Mandate(shown.voters, (*shown.endorsements, false)))


def test_leader_is_no_voter() -> None:
    shown = mandate(5)
    with pytest.raises(RefusedError, match="no voter"):
        check(Mandate(shown.voters[1:], shown.endorsements[1:]))


def test_group_of_which_nobody_is_known() -> None:
    with pytest.raises(RefusedError, match="known"):
        check(mandate(5), (b"x" * 20,))


def test_no_voters_or_too_many() -> None:
    with pytest.raises(RefusedError, match="voters"):
        check(Mandate())
    with pytest.raises(RefusedError, match="too many"):
        check(Mandate((LEADER.id,) * (VOTERS_MAX + 1), mandate(1).endorsements))


def test_mandate_survives_the_wire() -> None:
    shown = mandate(3)
    assert codec.decode(codec.encode(shown), Mandate) == shown
    with pytest.raises(codec.CodecError):
        codec.decode(codec.encode((1, 2)), Mandate)


def test_branch_is_named_by_all_it_is_based_on() -> None:
    def child(**changed: object) -> Branch:
        based: dict[str, object] = {
            "last_term": 3, "last_index": 70, "state": b"state", "opener": LEADER.id, "epoch": 3, "version": 5, **changed
        }
        return ROOT.child(**based)  # type: ignore[arg-type]

    branch = child()
    assert branch == child()
    assert (branch.ancestors, branch.base_epoch, branch.base_version) == ((b"",), 3, 5)
    others = [child(last_term=4), child(last_index=71), child(state=b"other"), child(opener=PEERS[1].id)]
    others.append(branch.child(3, 70, b"state", LEADER.id, 3, 5))
    assert len({branch.name, *(other.name for other in others)}) == 6
    assert others[-1].ancestors == (b"", branch.name)
    assert codec.decode(codec.encode(branch), Branch) == branch


def test_branches_of_branches_end() -> None:
    branch = ROOT
    for depth in range(DEPTH_MAX):
        assert len(branch.ancestors) == depth
        branch = branch.child(1, depth, b"", LEADER.id, 1, 1)
    with pytest.raises(RefusedError, match="too often"):
        branch.child(1, 99, b"", LEADER.id, 1, 1)


def test_branch_of_the_first_version_is_the_root() -> None:
    assert codec.decode(msgspec.msgpack.encode([]), Branch) == ROOT
