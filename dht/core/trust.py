"""Whose certificates this peer has seen and verified: chains by key, bounded.

Rules this file keeps:

- nothing is kept that wasn't verified from the root down; each certificate is verified once;
- expiry and revocation are looked at on every use, for every link;
- the least recently used goes first, so strangers' hellos can't fill memory, nor can members'.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from dht.core.membership import CHAIN_LENGTH_MAX, Certificate, Chain, Membership, MembershipError, verify_link

KEYS_MAX = 4_096
"""Keys whose chains are kept: 200 B each, as chains share their beginnings."""


class Trust:
    """The verified chains, this peer's own among them for ever."""

    def __init__(self, membership: Membership, keys_max: int = KEYS_MAX) -> None:
        self._membership = membership
        self._chains: OrderedDict[bytes, Chain] = OrderedDict()
        self._keys_max = keys_max

    def __len__(self) -> int:
        return len(self._chains)

    def chain(self, key: bytes, now_s: float) -> Chain | None:
        """The valid chain of `key`, or None. `now_s` is unix time."""
        if key == self._membership.identity.public:
            return self._membership.chain
        chain = self._chains.get(key)
        if chain is None:
            return None
        revoked = self._membership.revoked
        if any(c.expires_s <= now_s or c.key in revoked for c in chain):
            del self._chains[key]
            return None
        self._chains.move_to_end(key)
        return chain

    def member(self, key: bytes, now_s: float) -> Certificate | None:
        """The certificate of `key` if it is a member as far as this peer knows."""
        chain = self.chain(key, now_s)
        return None if chain is None else chain[-1]

    def learn(self, certificates: Iterable[Certificate], now_s: float) -> None:
        """Take in certificates, each signed by the root or by a key known already (root-first within the call).

        Raises `MembershipError` at the first that doesn't hold; those before it stay.
        """
        for certificate in certificates:
            held = self._chains.get(certificate.key)
            if held is not None and held[-1] == certificate:
                continue
            above: Chain = ()
            if certificate.issuer != self._membership.grid:
                found = self.chain(certificate.issuer, now_s)
                if found is None:
                    raise MembershipError("a certificate in the chain is missing")
                above = found
            if len(above) >= CHAIN_LENGTH_MAX:
                raise MembershipError(f"a chain of over {CHAIN_LENGTH_MAX} certificates")
            parent = above[-1] if above else None
            verify_link(self._membership.grid, parent, certificate, now_s, self._membership.revoked)
            self._keep((*above, certificate), now_s)

    def _keep(self, chain: Chain, now_s: float) -> None:
        key = chain[-1].key
        held = self.chain(key, now_s)
        if held is not None and _lasts_s(held) >= _lasts_s(chain):
            return
        self._chains[key] = chain
        self._chains.move_to_end(key)
        while len(self._chains) > self._keys_max:
            self._chains.popitem(last=False)


def _lasts_s(chain: Chain) -> int:
    return min(certificate.expires_s for certificate in chain)
