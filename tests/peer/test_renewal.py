"""Renewing certificates: who asks whom, and what is believed."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest

from dht.core.identity import Identity
from dht.core.membership import CERTIFICATE_LIFETIME_S, Chain, Membership, MembershipError, Role, issue
from grid.core.messages import decode, encode
from grid.renewal import GAIN_S, Renewal, expiry_s, worth_asking
from grid.transport.errors import RemoteError

NOW = time.time()


def grown(generations: int) -> tuple[Identity, list[Membership]]:
    """A grid in which each peer was admitted by the one before."""
    root = Identity.generate()
    members = [Membership.found(Identity.generate(), root, NOW)]
    for _ in range(generations):
        joiner = Identity.generate()
        roles = Role.SUBMIT | Role.WORK | Role.INVITE
        chain = members[-1].admit(joiner.public, roles, joiner.id, NOW)
        members.append(Membership(root.public, joiner, chain))
    return root, members


class FakeMesh:
    """Connections that answer at once."""

    def __init__(self) -> None:
        self.others: dict[bytes, tuple[Any, Any]] = {}

    def connected(self) -> list[Any]:
        return list(self.others)

    def hello(self, peer: Any) -> Any:
        return self.others[peer][0] if peer in self.others else None

    async def request(self, peer: Any, message: bytes, timeout_s: float) -> bytes:
        decode(message)
        return encode(self.others[peer][1]())


class Hello:
    """The part of a hello that counts."""

    def __init__(self, chain: Chain) -> None:
        self.chain = chain


def renewal(membership: Membership, mesh: FakeMesh, folder: Path, saved: list[Chain]) -> Renewal:
    return Renewal(membership, mesh, folder / "root", lambda: saved.append(membership.chain), random.Random(1))  # type: ignore[arg-type]


async def test_long_chain_becomes_short_through_the_founder(tmp_path: Path, autojump_clock: Any) -> None:
    import trio

    _, members = grown(5)
    founder, last = members[0], members[-1]
    theirs = FakeMesh()
    theirs.others[last.identity.id] = (Hello(last.chain), None)
    answering = renewal(founder, theirs, tmp_path, [])
    mesh = FakeMesh()
    mesh.others[founder.identity.id] = (Hello(founder.chain), lambda: answering.answer(last.identity.id))
    saved: list[Chain] = []
    with trio.move_on_after(60):
        await renewal(last, mesh, tmp_path, saved).run()
    assert [len(chain) for chain in saved] == [2]
    assert last.check(last.chain, NOW).key == last.identity.public
    assert last.roles == Role.SUBMIT | Role.WORK | Role.INVITE


async def test_forged_renewal_is_not_adopted(tmp_path: Path, autojump_clock: Any) -> None:
    import trio

    from dht.core import codec
    from grid.core.messages import Renewed

    _, members = grown(4)
    founder, last = members[0], members[-1]
    stranger = Identity.generate()
    forged = (*founder.chain, issue(founder.grid, stranger, last.identity.public, Role.WORK, last.owner, int(NOW) + 10**6))
    mesh = FakeMesh()
    mesh.others[founder.identity.id] = (Hello(founder.chain), lambda: Renewed(codec.encode(forged)))
    saved: list[Chain] = []
    before = last.chain
    with trio.move_on_after(60):
        await renewal(last, mesh, tmp_path, saved).run()
    assert saved == []
    assert last.chain == before


def test_no_answer_for_who_is_not_connected(tmp_path: Path) -> None:
    _, members = grown(1)
    with pytest.raises(MembershipError):
        renewal(members[0], FakeMesh(), tmp_path, []).answer(members[1].identity.id)


def test_member_without_invite_role_renews_nobody(tmp_path: Path) -> None:
    root, members = grown(1)
    worker = Identity.generate()
    chain = members[0].admit(worker.public, Role.WORK, worker.id, NOW)
    mesh = FakeMesh()
    mesh.others[members[1].identity.id] = (Hello(members[1].chain), None)
    with pytest.raises(MembershipError):
        renewal(Membership(root.public, worker, chain), mesh, tmp_path, []).answer(members[1].identity.id)


def test_founder_renews_its_own_from_the_root_key(tmp_path: Path) -> None:
    root = Identity.generate()
    own = Identity.generate()
    old = issue(root.public, root, own.public, Role(15), own.id, int(NOW) + 86_400)
    membership = Membership(root.public, own, (old,))
    (tmp_path / "root").write_bytes(root.seed)
    saved: list[Chain] = []
    renewal(membership, FakeMesh(), tmp_path, saved)._renew_founder()
    assert len(saved) == 1
    assert expiry_s(membership.chain) > NOW + CERTIFICATE_LIFETIME_S - 60


def test_equal_chains_are_not_exchanged() -> None:
    _, members = grown(2)
    assert not worth_asking(members[1].chain, members[1].chain, NOW)
    assert not worth_asking(members[1].chain, members[0].chain, NOW)
    assert worth_asking(members[2].chain, members[0].chain, NOW)


def test_soon_to_expire_chain_is_not_wanted_for_being_short() -> None:
    root, members = grown(3)
    founder = Identity.generate()
    short = (issue(root.public, root, founder.public, Role(15), founder.id, int(NOW) + GAIN_S),)
    assert not worth_asking(members[3].chain, short, NOW)


def test_remote_error_is_a_transport_error() -> None:
    from grid.transport.errors import TransportError

    assert issubclass(RemoteError, TransportError)
