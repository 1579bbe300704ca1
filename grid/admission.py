"""Invites and who they let in.

An invite's grant is published in the DHT under the hash of its key, so that any member with the right to invite can admit
after the inviter left; each admission leaves a "spent" record there. Rules: a grant is checked before anything is signed;
uses are counted over all members' records, so an invite may be overspent only while members can't see each other's.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import trio

from dht import grants
from dht.core.identity import peer_id
from dht.core.invite import Grant, InviteError, check_grant, make_invite
from dht.core.membership import ROLES, Chain, Membership, MembershipError, Role
from dht.core.records import RecordError
from grid.api.client import ControlError
from grid.transport.errors import RemoteError

if TYPE_CHECKING:
    from dht.node import Node

USED: Final = "this invite has been used: ask for a new one (`grid invite` prints it)"
LIFETIME_S_MAX: Final = 30 * 86_400
ADDRESSES: Final = 3
"""In one invite: this peer's and two others', as any of them may be gone when it is used."""
GRANTS_MAX: Final = 256
"""Invites of this peer that are remembered, and used ones."""
LOOKUP_S: Final = 3.0
log = logging.getLogger(__name__)


class Admission:
    """Makes invites and admits their holders."""

    def __init__(self, membership: Membership, node: Node, addresses: Callable[[], list[str]], used: Callable[[], None]) -> None:
        self._membership = membership
        self._node = node
        self._addresses = addresses
        self._used = used
        self._grants: dict[bytes, Grant] = {}
        self._used_by: dict[bytes, set[bytes]] = {}  # here, by invite: the joiners' keys
        self._lock = trio.Lock()

    async def invite(self, role: str, uses: int, expires_s: float, same_owner: bool) -> str:
        """A fresh invite as one word. Raises ControlError."""
        if role not in ROLES:
            raise ControlError("usage", f"{role!r} is no role", f"one of: {', '.join(ROLES)}")
        lifetime_s = int(min(max(expires_s, 1.0), LIFETIME_S_MAX))
        owner = bytes(self._membership.owner) if same_owner else b""
        addresses = tuple(self._addresses()[:ADDRESSES])
        try:
            invite, grant = make_invite(
                self._membership, addresses, ROLES[role], owner, uses, time.time(), lifetime_s, random.SystemRandom()
            )
        except (MembershipError, InviteError) as error:
            raise ControlError("refused", f"this peer can't make that invite: {error}") from None
        self._grants[grant.key] = grant
        while len(self._grants) > GRANTS_MAX:
            self._grants.pop(next(iter(self._grants)))
        with trio.move_on_after(LOOKUP_S):
            try:
                await grants.publish_grant(self._node, grant)
            except RecordError as error:  # too many are published: this peer alone can admit with it
                log.info("the invite is known to this peer alone: %s", error)
        return invite.encode()

    async def admit(self, invite: bytes, key: bytes) -> Chain:
        """The chain for a joiner that proved it holds the invite's key. Raises RemoteError: one line for the joiner."""
        if not self._membership.roles & Role.INVITE:
            raise RemoteError("unknown", "the peer at that address may not admit others")
        now_s = time.time()
        async with self._lock:
            grant = self._grants.get(invite)
            if grant is None:
                with trio.move_on_after(LOOKUP_S):
                    grant = await grants.find_grant(self._node, invite)
            if grant is None:
                raise RemoteError("unknown", "no peer here knows this invite: ask for a new one (`grid invite` prints it)")
            try:
                check_grant(self._membership.grid, grant, now_s, self._membership.revoked)
            except MembershipError as error:
                code = "expired" if grant.expires_s <= now_s else "refused"
                raise RemoteError(code, f"{error}") from None
            used = self._used_by.setdefault(invite, set())
            if key not in used and len(used) >= grant.uses:
                raise RemoteError("used", USED)
            try:
                chain = self._membership.admit(key, Role(grant.roles), grant.owner or bytes(peer_id(key)), now_s)
            except MembershipError as error:
                raise RemoteError("refused", f"the peer at that address can't admit with this invite: {error}") from None
            await self._spend(grant, key)
            used.add(key)
            while len(self._used_by) > GRANTS_MAX:
                self._used_by.pop(next(iter(self._used_by)))
        self._used()
        return chain

    async def _spend(self, grant: Grant, key: bytes) -> None:
        """Count the use over all members, as far as they can be seen. Raises RemoteError when it was used up elsewhere."""
        with trio.move_on_after(LOOKUP_S):
            try:
                await grants.spend(self._node, grant, key)
            except MembershipError:
                raise RemoteError("used", USED) from None
            except RecordError as error:
                log.info("an invite's use can't be published: %s", error)
