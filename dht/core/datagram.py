"""The envelope of every datagram: who says it, to whom, in which grid, in answer to what.

    "pgd" | version (1 B) | sender's public key (32 B) | signature (64 B) | packet (msgpack)

Rules this file keeps:

- the signature covers the grid id, so a datagram of one grid is noise in another, and the receiver's id, so that one
  recorded here is worth nothing elsewhere. Only a `PROBE` may leave the receiver open: the sender doesn't know it yet;
- requests of every kind are at least as long as the answers a stranger can get (`RETRY`, `WHO`);
- what is too long, too short, of another version or not canonical in shape never gets further than `parse`.
"""

from __future__ import annotations

import enum
from typing import Annotated, NamedTuple

import msgspec

from dht.core.codec import Bytes20, CodecError, Struct, decode, encode
from dht.core.identity import ID_BYTES, KEY_BYTES, SIGNATURE_BYTES, Identity, verify

VERSION = 1
"""The protocol's version; datagrams of another are dropped and counted."""
MAGIC = b"pgd"
DATAGRAM_DOMAIN = "grid/datagram/1"
DATAGRAM_BYTES_MAX = 1_400
"""Fits every common path (Ethernet 1,500, PPPoE 1,492, WireGuard 1,420) without fragments."""
ID_LENGTH = 8
"""Bytes of a message id: enough not to be guessed by who doesn't see the request."""
TOKEN_BYTES = 8
NO_TOKEN = bytes(TOKEN_BYTES)
ANYBODY = bytes(ID_BYTES)
"""The receiver in a `PROBE`: whoever is at that address."""
HEAD_BYTES = len(MAGIC) + 1 + KEY_BYTES + SIGNATURE_BYTES
ENVELOPE_BYTES = HEAD_BYTES + 1 + 1 + (2 + ID_LENGTH) + (2 + ID_BYTES) + (2 + TOKEN_BYTES) + 3
"""A datagram without its body, at most."""
BODY_BYTES_MAX = DATAGRAM_BYTES_MAX - ENVELOPE_BYTES

Bytes8 = Annotated[bytes, msgspec.Meta(min_length=8, max_length=8)]


class Kind(enum.IntEnum):
    """Requests below 16, answers from 16 on. All are under 128: one byte each."""

    PROBE = 1  # who is at this address?
    PING = 2
    FIND = 3  # contacts near an id
    VALUE = 4  # records under a key, and contacts near it
    STORE = 5
    INFO = 6  # what `grid status` shows
    HELLO = 7  # here are my certificates, show me yours
    BYE = 8  # I leave; no answer
    ANSWER = 16
    RETRY = 17  # say it again with this address token
    WHO = 18  # I don't know your certificate


class Packet(Struct, frozen=True):
    """The signed part. `id` pairs an answer with its request; `token` is what the receiver gave the sender to prove its
    address, or in an answer what the receiver should use next; `body` depends on `kind`."""

    kind: int
    id: Bytes8
    to: Bytes20
    token: Bytes8
    body: bytes


class Envelope(NamedTuple):
    """A datagram taken apart; nothing in it is verified yet."""

    key: bytes
    signature: bytes
    signed: bytes
    packet: Packet


class OtherVersion(Exception):
    """A datagram of another protocol version, in `args[0]`."""


def seal(grid: bytes, sender: Identity, packet: Packet) -> bytes:
    """The datagram. Raises `ValueError` when it would be too long: a fault of the caller."""
    payload = encode(packet)
    datagram = MAGIC + bytes([VERSION]) + sender.public + sender.sign(DATAGRAM_DOMAIN, grid + payload) + payload
    if len(datagram) > DATAGRAM_BYTES_MAX:
        raise ValueError(f"a datagram of {len(datagram)} B; the limit is {DATAGRAM_BYTES_MAX} B")
    return datagram


def parse(data: bytes) -> Envelope:
    """Take a datagram apart. Raises `OtherVersion`, or `CodecError` for anything that isn't a datagram of ours."""
    if len(data) <= len(MAGIC) or data[: len(MAGIC)] != MAGIC:
        raise CodecError("not a datagram of a grid")
    if data[len(MAGIC)] != VERSION:
        raise OtherVersion(data[len(MAGIC)])
    if not HEAD_BYTES < len(data) <= DATAGRAM_BYTES_MAX:
        raise CodecError("too short or too long")
    key = data[len(MAGIC) + 1 :][:KEY_BYTES]
    signature = data[len(MAGIC) + 1 + KEY_BYTES : HEAD_BYTES]
    return Envelope(key, signature, data[HEAD_BYTES:], decode(data[HEAD_BYTES:], Packet))


def check_signature(grid: bytes, envelope: Envelope) -> None:
    """Raises `BadSignature` when the sender's key did not sign this for this grid."""
    verify(envelope.key, DATAGRAM_DOMAIN, grid + envelope.signed, envelope.signature)
