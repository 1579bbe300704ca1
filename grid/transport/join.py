"""Getting into a grid with an invite: its addresses in turn, until one member admits us.

The joiner checks each member's chain against the grid named by the invite before it shows anything; it shows its key and
a proof that it holds the invite's, nothing else, and believes the chain it gets only after checking it.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from dht.core.identity import Identity
from dht.core.invite import Invite
from dht.core.membership import Membership, MembershipError, verify_chain
from dht.network import Address, Network
from grid.transport.channel import initiate
from grid.transport.dialling import UNSPECIFIED, format_address, open_stream, parse_address
from grid.transport.errors import HandshakeError, JoinError, Refused, VersionMismatch, WrongGrid
from grid.transport.hello import JOIN, Code, Credentials, Verdict
from grid.transport.limits import ADMIT_S

FINAL_CODES = ("expired", "used")
"""Refusals by a member that no other member would take back. `unknown` is not: another may hold the invite's grant."""


async def join(
    network: Network,
    invite: Invite,
    identity: Identity,
    now_s: float,
    *,
    entropy: Callable[[int], bytes] = os.urandom,
) -> tuple[Membership, list[Address]]:
    """Our membership and addresses of members, that which admitted us first. Raises JoinError.

    now_s: unix time. Each address may take CONNECT_S to open and ADMIT_S to answer.
    """
    if invite.expires_s <= now_s:
        raise JoinError("expired", "this invite has expired: ask for a new one (`grid invite` prints it)")
    addresses = [address for address in map(parse_address, invite.addresses) if address is not None]
    if not addresses:
        raise JoinError("unreachable", "this invite names no address: ask for a new one (`grid invite` prints it)")
    credentials = Credentials(
        invite.grid,
        identity,
        chain=lambda: (),
        check=lambda chain: verify_chain(invite.grid, chain, now_s),
        entropy=entropy,
    )
    errors: list[tuple[Address, Exception]] = []
    for address in addresses:
        try:
            verdict = await _ask(network, address, credentials, invite)
            return _accept(verdict, invite, identity, now_s, address)
        except Refused as error:
            if error.code in FINAL_CODES:
                raise JoinError(error.code, error.text) from error
            errors.append((address, error))
        except (OSError, HandshakeError) as error:
            errors.append((address, error))
    raise _explain(errors)


async def _ask(network: Network, address: Address, credentials: Credentials, invite: Invite) -> Verdict:
    stream = await open_stream(network, address)
    channel, verdict = await initiate(stream, credentials, JOIN, invite=invite.key, verdict_s=ADMIT_S)
    await channel.aclose()
    return verdict


def _accept(
    verdict: Verdict, invite: Invite, identity: Identity, now_s: float, address: Address
) -> tuple[Membership, list[Address]]:
    try:
        verify_chain(invite.grid, verdict.chain, now_s)
        membership = Membership(invite.grid, identity, verdict.chain)
    except MembershipError as error:
        raise Refused(Code.REFUSED, f"it gave a certificate that does not hold: {error}") from error
    told = [found for found in map(parse_address, verdict.addresses) if found and found[0] not in UNSPECIFIED]
    return membership, list(dict.fromkeys([address, *told]))


def _explain(errors: list[tuple[Address, Exception]]) -> JoinError:
    """The most telling of the failures: a member's own words before a wrong grid before silence."""
    places = ", ".join(format_address(address) for address, _ in errors)
    for kind, code in ((Refused, ""), (VersionMismatch, "version"), (WrongGrid, "wrong-grid"), (HandshakeError, "refused")):
        for address, error in errors:
            if isinstance(error, kind):
                if isinstance(error, Refused):
                    return JoinError(error.code, error.text)
                if isinstance(error, WrongGrid):
                    return JoinError(code, f"the peer at {format_address(address)} belongs to another grid: ask for a new invite")
                return JoinError(code, f"the peer at {format_address(address)} does not let us in: {error}")
    return JoinError(
        "unreachable", f"no peer of the grid answers at {places}: check that it runs and that its port can be reached"
    )
