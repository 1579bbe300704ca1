"""A new leader's papers: the endorsements of a majority of its voters, which peers without a replica ask for.

Rules: each voter signs for a leader it follows in that term; without a majority all are asked again while the leadership lasts;
members that change make the papers be collected anew, so that later leaders are known by peers that know these.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

import trio

from dht.core.identity import BadSignature, Identity, PeerId
from grid.core.mandate import Endorsement, Mandate, check_endorsement, endorse
from grid.core.messages import Endorse, Endorsed, Message
from grid.replica import Replica

ASK_S: Final = 1.0
"""For one voter's answer."""
AGAIN_S: Final = 0.1
"""Before those that refused are asked again: they may not have heard of the leader yet."""

Request = Callable[[PeerId, Message, float], Awaitable[Message | None]]


async def collect(replica: Replica, term: int, identity: Identity, request: Request) -> None:
    """Get a majority's endorsements, then let the replica take over (or renew its mandate). Ends early with the leadership."""
    voters = replica.voters
    found: dict[PeerId, Endorsement] = {}
    if identity.id in voters:
        found[identity.id] = endorse(replica.job, replica.branch.name, term, identity.id, identity)

    told = 0

    def tell() -> None:
        """Once there is a majority, and when there are more: who knows only one of the voters wants that one's word."""
        nonlocal told
        if 2 * len(found) > len(voters) and len(found) > told and replica.voters == voters:
            told = len(found)
            replica.take_over(term, Mandate(tuple(sorted(voters)), tuple(found[peer] for peer in sorted(found))))

    async def ask(peer: PeerId) -> None:
        answer = await request(peer, Endorse(replica.job, replica.branch.name, term), ASK_S)
        if isinstance(answer, Endorsed) and _holds(replica, term, identity.id, peer, answer.endorsement):
            found[peer] = answer.endorsement
            if not told:
                tell()

    tell()
    while replica.term == term and replica.voters == voters and replica.leads():
        async with trio.open_nursery() as nursery:
            for peer in voters:
                if peer not in found:
                    nursery.start_soon(ask, peer)
        tell()
        if told:
            return
        await trio.sleep(AGAIN_S)


def _holds(replica: Replica, term: int, leader: PeerId, voter: PeerId, endorsement: Endorsement) -> bool:
    """Whether it is this voter's word for this leader."""
    try:
        return check_endorsement(endorsement, replica.job, replica.branch.name, term, leader) == voter
    except BadSignature:
        return False
