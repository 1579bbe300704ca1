"""How a home comes to be a member: its key, its certificate chain on disk, joining with an invite, founding a grid.

Rules: nothing of the home changes before a join succeeded; a damaged or foreign file is an error with its way out, never
silently replaced.
"""

from __future__ import annotations

import time

from dht.core import codec
from dht.core.identity import Identity
from dht.core.invite import Invite, InviteError
from dht.core.membership import Chain, Membership, MembershipError
from dht.network import Address, Network
from grid.api.client import ControlError
from grid.config import ConfigError, Home, parse_address, write_file
from grid.transport.errors import JoinError
from grid.transport.join import join


async def enrol(
    home: Home, invite_text: str | None, identity: Identity, network: Network
) -> tuple[Membership, list[Address]]:
    """The saved membership, or that of a grid joined or founded now; with addresses to begin at.

    Raises ControlError (the invite doesn't do), ConfigError (the home doesn't).
    """
    saved = load(home, identity)
    invite = _invite(invite_text) if invite_text else None
    if saved is not None:
        membership, known = saved
        if invite is not None and invite.grid != membership.grid:
            raise ControlError(
                "other-grid",
                f"this home belongs to grid {membership.grid.hex()[:8]}, the invite to grid {invite.grid.hex()[:8]}",
                "join it from another home: grid join --home DIR; or leave the old grid: grid leave --forget",
            )
        return membership, [*(parse_address(text) for text in (invite.addresses if invite else ())), *known]
    if invite is not None:
        try:
            membership, known = await join(network, invite, identity, time.time())
        except JoinError as error:
            raise ControlError(error.code, str(error)) from None
    else:
        root = Identity.generate()
        write_file(home.path / "root", root.seed)
        membership, known = Membership.found(identity, root, time.time()), []
    save(home, membership, known)
    return membership, known


def identity_of(home: Home) -> Identity:
    """The home's key, made at the first use. Raises ConfigError."""
    try:
        return Identity.from_seed(home.identity.read_bytes())
    except FileNotFoundError:
        identity = Identity.generate()
        write_file(home.identity, identity.seed)
        return identity
    except ValueError as error:
        raise ConfigError("home-damaged", f"the identity in {home.path} is damaged: {error}", "join from a new home") from None


def load(home: Home, identity: Identity) -> tuple[Membership, list[Address]] | None:
    """The membership and the addresses known when it was granted: the DHT's own list may not have been written yet."""
    try:
        grid_id, chain, known = codec.decode(home.membership.read_bytes(), tuple[bytes, Chain, tuple[Address, ...]])
    except FileNotFoundError:
        return None
    except codec.CodecError as error:
        raise ConfigError("home-damaged", f"the membership in {home.path} is damaged: {error}", "join anew") from None
    try:
        membership = Membership(grid_id, identity, chain)
        membership.check(chain, time.time())
    except MembershipError as error:
        hint = "ask for an invite and join again after: grid leave --forget"
        raise ConfigError("not-a-member", f"this home is no member of its grid any more: {error}", hint) from None
    return membership, list(known)


def save(home: Home, membership: Membership, known: list[Address]) -> None:
    """Keep the membership, durably."""
    write_file(home.membership, codec.encode((membership.grid, membership.chain, tuple(known))))


def _invite(text: str) -> Invite:
    try:
        invite = Invite.decode(text)
        invite.check(time.time())
    except InviteError as error:
        raise ControlError("invite", str(error)) from None
    return invite
