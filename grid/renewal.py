"""Certificates renew among members: a peer asks a neighbour whose chain is better than its own for a fresh certificate.

Better is shorter (each admission through the newest member makes chains longer) or valid for longer. The founder, who holds
the root key, renews its own. Rules: a renewal gives just the roles and the owner that the asker has; what it gets it checks
before it uses or saves it.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

from dht.core import codec
from dht.core.codec import CodecError
from dht.core.identity import Identity, PeerId
from dht.core.membership import CERTIFICATE_LIFETIME_S, Chain, Membership, MembershipError, Role, issue
from grid.core.messages import Renew, Renewed, decode, encode
from grid.transport.errors import TransportError

if TYPE_CHECKING:
    from grid.transport.mesh import Mesh

FIRST_S: Final = 10.0
"""After the start: neighbours are connected by then."""
CHECK_S: Final = 3600.0
GAIN_S: Final = 30 * 86_400
"""Asking for less gained lifetime than this is not worth the messages."""
ASK_S: Final = 5.0
log = logging.getLogger(__name__)


def expiry_s(chain: Chain) -> int:
    """When the first certificate of a chain runs out."""
    return min(certificate.expires_s for certificate in chain)


def worth_asking(own: Chain, other: Chain, now_s: float) -> bool:
    """Would a certificate under `other` be better than `own`?"""
    expires_s = min(expiry_s(other), int(now_s) + CERTIFICATE_LIFETIME_S)
    if len(other) + 1 < len(own):
        return expires_s >= expiry_s(own) - GAIN_S
    return expires_s > expiry_s(own) + GAIN_S


class Renewal:
    """This peer's side of renewing, asking and answering."""

    def __init__(self, membership: Membership, mesh: Mesh, root: Path, save: Callable[[], None], rng: random.Random) -> None:
        self._membership = membership
        self._mesh = mesh
        self._root = root
        self._save = save
        self._rng = rng

    def answer(self, peer: PeerId) -> Renewed:
        """A fresh chain for a connected member. Raises MembershipError."""
        hello = self._mesh.hello(peer)
        if hello is None or not hello.chain:
            raise MembershipError("who asks is not connected")
        theirs = hello.chain[-1]
        chain = self._membership.admit(theirs.key, Role(theirs.roles), bytes(theirs.owner), time.time())
        return Renewed(codec.encode(chain))

    async def run(self) -> None:
        """Look for a better chain now and then, until cancelled."""
        await trio.sleep(FIRST_S * (0.5 + self._rng.random()))
        while True:
            self._renew_founder()
            for peer in self._mesh.connected():
                hello = self._mesh.hello(peer)
                if hello is not None and worth_asking(self._membership.chain, hello.chain, time.time()):
                    await self._ask(peer)
            await trio.sleep(CHECK_S * (0.5 + self._rng.random()))

    def _renew_founder(self) -> None:
        own = self._membership.certificate
        if len(self._membership.chain) != 1 or own.expires_s - time.time() > CERTIFICATE_LIFETIME_S / 2:
            return
        try:
            root = Identity.from_seed(self._root.read_bytes())
        except (OSError, ValueError):
            return
        expires_s = int(time.time()) + CERTIFICATE_LIFETIME_S
        fresh = issue(root.public, root, own.key, Role(own.roles), bytes(own.owner), expires_s)
        self._adopt((fresh,))

    async def _ask(self, peer: PeerId) -> None:
        try:
            answer = decode(await self._mesh.request(peer, encode(Renew()), ASK_S))
            if isinstance(answer, Renewed):
                self._adopt(codec.decode(answer.chain, Chain))
        except (TransportError, CodecError, MembershipError, trio.TooSlowError) as error:
            log.debug("peer %s renewed nothing: %s", peer.hex()[:8], error)

    def _adopt(self, chain: Chain) -> None:
        own = self._membership.certificate
        fresh = self._membership.check(chain, time.time())
        if (fresh.key, fresh.roles, fresh.owner) != (own.key, own.roles, own.owner):
            raise MembershipError("a renewed certificate for something else")
        self._membership.chain = chain
        self._save()
        log.info("the certificate was renewed: %d signatures from the root", len(chain))
