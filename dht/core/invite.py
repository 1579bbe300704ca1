"""Invites: one word to paste on the next machine, and the signed grant behind it.

The word holds the grid's id, some addresses and the seed of a key made for this invite alone. The grant, published in
the DHT under the id of that key, says what the holder of the seed may become, so any member can admit it when the
inviter is gone. Rules this file keeps:

- the word is the secret; nothing that is published reveals it;
- a word cut short, mistyped or of a newer version is told apart, and each message says what to do;
- every text that decodes encodes to itself again (but for case and white space), so no altered word passes.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import random
import re
from collections.abc import Container
from typing import Annotated

import msgspec

from dht.core.codec import Bytes32, Bytes64, CodecError, Seconds, Struct, decode, encode
from dht.core.identity import BadSignature, Identity, verify
from dht.core.membership import Chain, Membership, MembershipError, Role, check_roles, verify_chain

GRANT_DOMAIN = "grid/grant/1"
CHECKSUM_DOMAIN = b"grid/invite/1"
CHECKSUM_BYTES = 4
ADDRESSES_MAX = 4
"""Addresses in an invite: enough that some may be dead, few enough that the word stays pasteable."""
ADDRESS_CHARS_MAX = 270
"""A DNS name (RFC 1035: 253 characters) and a port."""
INVITE_CHARS_MAX = 4_096
"""Longer text is not looked at: the longest real invite has 2,000 characters."""
USES_MAX = 256
"""Uses of one invite: a lab's worth of machines, and what the records that count them have room for."""

_TEXT = re.compile(r"grid(\d)([a-z2-7]*)")
_SHORT = "this invite is cut short: copy the whole line"
_MALFORMED = "this is not an invite: copy the whole line that `grid invite` printed, it begins with grid1"


class InviteError(ValueError):
    """The text can't be used as an invite. The message is one line meant for people."""


class Invite(Struct, frozen=True):
    """What the word says. `seed` is the secret of the key whose id the grant is published under."""

    grid: Bytes32
    seed: Bytes32
    expires_s: Seconds
    addresses: Annotated[
        tuple[Annotated[str, msgspec.Meta(max_length=ADDRESS_CHARS_MAX)], ...], msgspec.Meta(max_length=ADDRESSES_MAX)
    ]

    def encode(self) -> str:
        """One word: `grid1`, then lower case base32 of length, body and checksum."""
        body = encode(self)
        payload = len(body).to_bytes(2, "big") + body
        text = base64.b32encode(payload + _checksum(payload)).decode().rstrip("=").lower()
        return "grid1" + text

    @classmethod
    def decode(cls, text: str) -> Invite:
        """The invite in `text`; case and white space don't matter. Raises `InviteError`."""
        if len(text) > INVITE_CHARS_MAX:
            raise InviteError(_MALFORMED)
        word = "".join(text.split()).lower()
        match = _TEXT.fullmatch(word)
        if match is None:
            raise InviteError(_MALFORMED)
        if match[1] != "1":
            raise InviteError(f"this invite is of version {match[1]}, this program knows version 1: upgrade peergrid")
        payload = _unpack(match[2])
        try:
            invite = decode(payload, cls)
        except CodecError:
            raise InviteError(_MALFORMED) from None
        if invite.encode() != word:
            raise InviteError(_MALFORMED)
        return invite

    @property
    def key(self) -> Identity:
        """The invite's own key."""
        return Identity.from_seed(self.seed)

    def check(self, now_s: float) -> None:
        """Raises `InviteError` when the invite has expired."""
        if self.expires_s <= now_s:
            raise InviteError("this invite has expired: ask for a new one (`grid invite` prints it)")


def _checksum(payload: bytes) -> bytes:
    return hashlib.blake2b(payload, digest_size=CHECKSUM_BYTES, key=CHECKSUM_DOMAIN).digest()


def _unpack(text: str) -> bytes:
    """The body within the base32 part, its length and checksum verified."""
    whole = text if len(text) % 8 in (0, 2, 4, 5, 7) else text[:-1]  # other lengths can't end a byte: cut short
    try:
        data = base64.b32decode(whole.upper() + "=" * (-len(whole) % 8))
    except binascii.Error:
        raise InviteError(_MALFORMED) from None
    if len(data) < 2:
        raise InviteError(_SHORT)
    expected = 2 + int.from_bytes(data[:2], "big") + CHECKSUM_BYTES
    if expected > INVITE_CHARS_MAX or len(data) > expected:
        raise InviteError(_MALFORMED)
    if len(data) < expected:
        raise InviteError(_SHORT)
    if _checksum(data[:-CHECKSUM_BYTES]) != data[-CHECKSUM_BYTES:]:
        raise InviteError("this invite has a wrong character in it: paste it, don't type it")
    return data[2:-CHECKSUM_BYTES]


class Grant(Struct, frozen=True):
    """The statement behind an invite: `key` (the invite's) may be turned into `uses` members with `roles`.

    An empty `owner` means each joiner's own. `chain` is the inviter's. Since the chain travels apart from the grant
    in the DHT, it is not under the signature: replacing it by another valid chain of the same key changes nothing.
    """

    key: Bytes32
    roles: int
    owner: Annotated[bytes, msgspec.Meta(max_length=20)]
    uses: Annotated[int, msgspec.Meta(ge=1, le=USES_MAX)]
    expires_s: Seconds
    chain: Chain
    signature: Bytes64


def _signed(grid: bytes, key: bytes, roles: int, owner: bytes, uses: int, expires_s: int) -> bytes:
    return encode((grid, key, roles, owner, uses, expires_s))


def make_invite(
    membership: Membership,
    addresses: tuple[str, ...],
    roles: Role,
    owner: bytes,
    uses: int,
    now_s: float,
    lifetime_s: int,
    rng: random.Random,
) -> tuple[Invite, Grant]:
    """A fresh invite and the grant to publish. Outside tests `rng` is `random.SystemRandom()`: the seed is a secret.

    Raises `MembershipError` when this member may not invite with these roles or for this owner.
    """
    if not 1 <= uses <= USES_MAX:
        raise InviteError(f"uses must be between 1 and {USES_MAX}")
    seed = rng.randbytes(32)
    key = Identity.from_seed(seed).public
    check_roles(int(roles), membership.roles, owner or membership.owner, key, membership.owner)
    expires_s = int(now_s) + lifetime_s
    payload = _signed(membership.grid, key, int(roles), owner, uses, expires_s)
    signature = membership.identity.sign(GRANT_DOMAIN, payload)
    grant = Grant(key, int(roles), owner, uses, expires_s, membership.chain, signature)
    return Invite(membership.grid, seed, expires_s, tuple(addresses[:ADDRESSES_MAX])), grant


def check_grant(grid: bytes, grant: Grant, now_s: float, revoked: Container[bytes] = ()) -> None:
    """Raises `MembershipError` unless a member with the right to do so made this grant and it hasn't expired."""
    inviter = verify_chain(grid, grant.chain, now_s, revoked)
    if grant.expires_s <= now_s:
        raise MembershipError("the invite expired: ask for a new one")
    if grant.owner and len(grant.owner) != 20:
        raise MembershipError("the invite names no valid owner")
    check_roles(grant.roles, Role(inviter.roles), grant.owner or inviter.owner, grant.key, inviter.owner)
    if grant.key in revoked:
        raise MembershipError("the invite was revoked")
    payload = _signed(grid, grant.key, grant.roles, grant.owner, grant.uses, grant.expires_s)
    try:
        verify(inviter.key, GRANT_DOMAIN, payload, grant.signature)
    except BadSignature:
        raise MembershipError("the invite's grant is forged or damaged") from None
