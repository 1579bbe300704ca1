"""Who belongs to a grid: certificates from the root key down, with roles that never grow on the way.

Rules this file keeps:

- the grid id is the root's public key; a chain starts with a certificate the root signed and ends with the member's;
- every signer on the way holds `INVITE`, and gives only roles it holds itself (`ADMIN` may give any);
- nobody makes others a machine of a person it isn't: a certificate's owner is the new key itself or its signer's
  owner, unless the signer is an admin. Owners decide whose jobs run unsandboxed, so this is a matter of safety;
- revocation beats admission: one revoked key anywhere in a chain breaks it;
- whatever was verified once is kept in a bounded table, never trusted beyond its first expiry.
"""

from __future__ import annotations

import enum
import hashlib
from collections import OrderedDict
from collections.abc import Container, Iterable

from dht.core.codec import Bytes20, Bytes32, Bytes64, Seconds, Struct, encode
from dht.core.identity import BadSignature, Identity, PeerId, peer_id, verify

CERTIFICATE_DOMAIN = "grid/certificate/1"
CHAIN_LENGTH_MAX = 32
"""Certificates in a chain. Each admission through the newest member adds one; 32 is 5 KB and 2.5 ms to verify."""
CERTIFICATE_LIFETIME_S = 365 * 86_400
"""A certificate's lifetime when the caller has no other wish."""
CHAINS_CACHED_MAX = 1_024
"""Verified chains a peer remembers: one for each peer it talks to, about 200 B each as prefixes are shared."""


class Role(enum.IntFlag):
    """What a member may do."""

    SUBMIT = 1
    WORK = 2
    INVITE = 4
    ADMIN = 8


ALL_ROLES = Role.SUBMIT | Role.WORK | Role.INVITE | Role.ADMIN
ROLES: dict[str, Role] = {
    "member": Role.SUBMIT | Role.WORK | Role.INVITE,
    "worker": Role.WORK,
    "submitter": Role.SUBMIT,
    "admin": ALL_ROLES,
}
"""The roles as `grid invite --role` names them."""


class MembershipError(Exception):
    """The chain does not make its last key a member. The message says why, in one line meant for people."""


class Certificate(Struct, frozen=True):
    """`issuer` lets `key` into the grid. `expires_s` is unix time; `owner` is the id of a person's first machine."""

    key: Bytes32
    issuer: Bytes32
    roles: int
    owner: Bytes20
    expires_s: Seconds
    signature: Bytes64


Chain = tuple[Certificate, ...]
"""The root's certificate first, the member's own last."""


def _signed(grid: bytes, key: bytes, issuer: bytes, roles: int, owner: bytes, expires_s: int) -> bytes:
    return encode((grid, key, issuer, roles, owner, expires_s))


def issue(grid: bytes, issuer: Identity, key: bytes, roles: Role, owner: bytes, expires_s: int) -> Certificate:
    """Sign a certificate. Whether `issuer` may is what `verify_chain` decides."""
    payload = _signed(grid, key, issuer.public, int(roles), owner, expires_s)
    signature = issuer.sign(CERTIFICATE_DOMAIN, payload)
    return Certificate(key, issuer.public, int(roles), owner, expires_s, signature)


def check_roles(given: int, held: Role, owner: bytes, key: bytes, issuer_owner: bytes) -> None:
    """The two attenuation rules, for certificates and for the grants behind invites alike."""
    if not held & Role.INVITE:
        raise MembershipError("signed by a member that may not invite")
    if given & ~int(ALL_ROLES) or given <= 0:
        raise MembershipError(f"unknown roles {given}")
    if held & Role.ADMIN:
        return
    if given & ~int(held):
        raise MembershipError("gives roles its signer does not hold")
    if owner not in (peer_id(key), issuer_owner):
        raise MembershipError("names an owner its signer does not speak for")


def verify_link(
    grid: bytes, above: Certificate | None, certificate: Certificate, now_s: float, revoked: Container[bytes] = ()
) -> None:
    """Check one certificate under the verified one `above` it (None: the root). Raises `MembershipError`."""
    issuer, held, owner = (
        (grid, ALL_ROLES, bytes(certificate.owner)) if above is None else (above.key, Role(above.roles), above.owner)
    )
    if certificate.issuer != issuer:
        raise MembershipError("of another grid" if above is None else "a certificate in the chain is missing")
    if certificate.key in revoked or issuer in revoked:
        raise MembershipError("revoked")
    if certificate.expires_s <= now_s:
        raise MembershipError("the certificate expired")
    check_roles(certificate.roles, held, certificate.owner, certificate.key, owner)
    payload = _signed(grid, certificate.key, issuer, certificate.roles, certificate.owner, certificate.expires_s)
    try:
        verify(issuer, CERTIFICATE_DOMAIN, payload, certificate.signature)
    except BadSignature:
        raise MembershipError("a certificate is forged or damaged") from None


def verify_chain(grid: bytes, chain: Chain, now_s: float, revoked: Container[bytes] = ()) -> Certificate:
    """The member's own certificate, the last of `chain`. Raises `MembershipError` when any link does not hold.

    `now_s` is unix time; `revoked` holds public keys.
    """
    if not chain:
        raise MembershipError("no certificate")
    if len(chain) > CHAIN_LENGTH_MAX:
        raise MembershipError(f"a chain of over {CHAIN_LENGTH_MAX} certificates")
    above = None
    for certificate in chain:
        verify_link(grid, above, certificate, now_s, revoked)
        above = certificate
    return chain[-1]


class ChainCache:
    """Chains verified before, by content: at most `CHAINS_CACHED_MAX`, the least recently used go first."""

    def __init__(self, size_max: int = CHAINS_CACHED_MAX) -> None:
        self._expiries: OrderedDict[bytes, int] = OrderedDict()
        self._size_max = size_max

    def __len__(self) -> int:
        return len(self._expiries)

    def clear(self) -> None:
        self._expiries.clear()

    def check(self, grid: bytes, chain: Chain, now_s: float, revoked: Container[bytes]) -> Certificate:
        """`verify_chain`, at the price of one hash when this chain was seen before."""
        name = hashlib.blake2b(encode(chain), digest_size=32).digest()
        expires_s = self._expiries.get(name)
        if expires_s is not None and now_s < expires_s:
            self._expiries.move_to_end(name)
            return chain[-1]
        leaf = verify_chain(grid, chain, now_s, revoked)
        self._expiries[name] = min(certificate.expires_s for certificate in chain)
        while len(self._expiries) > self._size_max:
            self._expiries.popitem(last=False)
        return leaf


class Membership:
    """This peer's own view: its grid, its key, its chain, and the keys it knows to be revoked.

    The chain's shape is checked here, its validity (which needs the time) by `check(self.chain, now_s)`.
    """

    def __init__(self, grid: bytes, identity: Identity, chain: Chain, revoked: Iterable[bytes] = ()) -> None:
        if not chain or chain[-1].key != identity.public:
            raise MembershipError("the certificate is of another key")
        if chain[0].issuer != grid:
            raise MembershipError("the certificate is of another grid")
        self.grid = grid
        self.identity = identity
        self.chain = chain
        self.revoked: set[bytes] = set(revoked)
        self._cache = ChainCache()

    @classmethod
    def found(cls, identity: Identity, root: Identity, now_s: float) -> Membership:
        """The first member of a new grid whose id is `root`'s public key; it holds every role."""
        expires_s = int(now_s) + CERTIFICATE_LIFETIME_S
        certificate = issue(root.public, root, identity.public, ALL_ROLES, identity.id, expires_s)
        return cls(root.public, identity, (certificate,))

    @property
    def certificate(self) -> Certificate:
        """This peer's own certificate."""
        return self.chain[-1]

    @property
    def owner(self) -> PeerId:
        """The id of the first machine of the person this one belongs to."""
        return PeerId(self.certificate.owner)

    @property
    def roles(self) -> Role:
        return Role(self.certificate.roles)

    def revoke(self, keys: Iterable[bytes]) -> None:
        """Learn of revoked public keys; there is no way back."""
        self.revoked.update(keys)
        self._cache.clear()

    def check(self, chain: Chain, now_s: float) -> Certificate:
        """The leaf of another peer's verified chain. Raises `MembershipError`."""
        return self._cache.check(self.grid, chain, now_s, self.revoked)

    def admit(self, key: bytes, roles: Role, owner: bytes, now_s: float, lifetime_s: int = CERTIFICATE_LIFETIME_S) -> Chain:
        """The chain of a joiner: this peer's own and a new certificate for `key`.

        An empty `owner` means the joiner's own. Raises `MembershipError` when this peer may not give that.
        """
        owner = owner or peer_id(key)
        if not self.roles & Role.INVITE:
            raise MembershipError("this peer may not invite: its role does not include it")
        check_roles(int(roles), self.roles, owner, key, self.owner)
        if len(self.chain) >= CHAIN_LENGTH_MAX:
            raise MembershipError("this peer is too many invitations from the root: ask one that joined earlier")
        if key in self.revoked:
            raise MembershipError("revoked")
        certificate = issue(self.grid, self.identity, key, roles, owner, int(now_s) + lifetime_s)
        return (*self.chain, certificate)
