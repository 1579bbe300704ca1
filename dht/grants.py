"""Invites in the DHT: the grant behind each, and how often it was used, so that any member can admit a joiner.

Both lie under the id of the invite's key. Rules this file keeps:

- a grant is stored without its chain, which would not fit a datagram: every holder has the chain of each record's
  issuer and shows it to the reader, who puts the two together and verifies them as one;
- uses are counted over all members that admitted somebody. Two that admit at the same instant can exceed the number by
  one each: an invite is a convenience for joiners, not a lock;
- the same joiner admitted again is no further use.
"""

from __future__ import annotations

import contextlib
from typing import Annotated

import msgspec

from dht.core.codec import Bytes20, CodecError, decode, encode
from dht.core.identity import PeerId, peer_id
from dht.core.invite import Grant, check_grant
from dht.core.membership import MembershipError
from dht.core.records import Record, RecordError
from dht.node import Node

GRANT_KIND = "grant"
SPENT_KIND = "spent"
JOINERS_PER_RECORD_MAX = 40
"""Joiners in one record: 22 B each of the 900 B a value may have."""
SPENT_KINDS_MAX = 7
"""Records of one admitter for one invite (`spent`, `spent1`, ...): 280 joiners, over any invite's uses."""
SPENT_LIFETIME_S_MIN = 60.0

_Joiners = Annotated[tuple[Bytes20, ...], msgspec.Meta(max_length=JOINERS_PER_RECORD_MAX)]


def invite_key(public: bytes) -> PeerId:
    """Where the records of the invite with this public key lie."""
    return peer_id(public)


def _check_grant_record(record: Record) -> None:
    grant = _decoded_grant(record)
    if invite_key(grant.key) != record.key:
        raise RecordError("a grant under another key")


def _check_spent_record(record: Record) -> None:
    _joiners(record)


def _decoded_grant(record: Record) -> Grant:
    try:
        return decode(record.value, Grant)
    except CodecError as error:
        raise RecordError(f"not a grant: {error}") from None


def register(node: Node) -> None:
    """Have this node refuse malformed grants and counts. Call it once, before `run`."""
    node.validate(GRANT_KIND, _check_grant_record)
    for number in range(SPENT_KINDS_MAX):
        node.validate(_spent_kind(number), _check_spent_record)


def _spent_kind(number: int) -> str:
    return f"{SPENT_KIND}{number or ''}"


async def publish_grant(node: Node, grant: Grant) -> int:
    """Store a grant of this node's own until it expires; the number of other peers that acknowledged it now."""
    if grant.chain[-1].key != node.membership.identity.public:
        raise MembershipError("only the inviter can publish its grant")
    value = encode(msgspec.structs.replace(grant, chain=()))
    return await node.publish(GRANT_KIND, invite_key(grant.key), value, grant.expires_s - node.clock())


async def find_grant(node: Node, public: bytes) -> Grant | None:
    """The valid grant behind the invite with this public key, its chain attached; None when there is none."""
    for record in await node.lookup(invite_key(public), GRANT_KIND):
        chain = node.chain_of(record.issuer)
        if chain is None:
            continue
        try:
            grant = msgspec.structs.replace(_decoded_grant(record), chain=chain)
            check_grant(node.membership.grid, grant, node.clock(), node.membership.revoked)
        except (MembershipError, RecordError):
            continue
        if grant.key == public:
            return grant
    return None


def _joiners(record: Record) -> list[PeerId]:
    try:
        return [PeerId(joiner) for joiner in decode(record.value, _Joiners)]
    except CodecError as error:
        raise RecordError(f"not a list of joiners: {error}") from None


async def _spent(node: Node, public: bytes) -> dict[tuple[bytes, str], list[PeerId]]:
    """The joiners by (admitter, kind of record); what can't be read is left out."""
    found = {}
    for record in await node.lookup(invite_key(public)):
        if record.kind.startswith(SPENT_KIND):
            with contextlib.suppress(RecordError):
                found[record.slot] = _joiners(record)
    return found


async def spent(node: Node, public: bytes) -> list[PeerId]:
    """Who was admitted with this invite, as far as is known."""
    return list(dict.fromkeys(joiner for joiners in (await _spent(node, public)).values() for joiner in joiners))


async def spend(node: Node, grant: Grant, joiner: bytes) -> None:
    """Note that this peer admits `joiner` (a public key). Raises `MembershipError` when the invite is used up."""
    found = await _spent(node, grant.key)
    used = {admitted for joiners in found.values() for admitted in joiners}
    name = peer_id(joiner)
    if name in used:
        return
    if len(used) >= grant.uses:
        raise MembershipError("this invite was used already: ask for a new one (`grid invite` prints it)")
    for number in range(SPENT_KINDS_MAX):
        listed = found.get((node.membership.identity.public, _spent_kind(number)), [])
        if len(listed) < JOINERS_PER_RECORD_MAX:
            lifetime_s = max(SPENT_LIFETIME_S_MIN, grant.expires_s - node.clock())
            await node.publish(_spent_kind(number), invite_key(grant.key), encode((*listed, name)), lifetime_s)
            return
    raise MembershipError("this peer admitted too many with this invite: ask for a new one")
