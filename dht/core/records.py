"""Records: what the DHT stores. Signed by their issuer, with an absolute expiry, several for each key.

Rules this file keeps:

- a key holds one record for each (issuer, kind); the highest `seq` wins, ties go to the greater encoding so that
  every peer picks the same;
- the expiry is part of what is signed: no holder can make a record younger by storing it again;
- a record fits one datagram;
- the grid is part of what is signed: a record of one grid is nothing in another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated

import msgspec

from dht.core.codec import Bytes20, Bytes32, Bytes64, Seconds, Struct, encode
from dht.core.identity import BadSignature, Identity, PeerId, peer_id, verify

RECORD_DOMAIN = "grid/record/1"
VALUE_BYTES_MAX = 900
"""With 170 B of the record's other fields and 160 B of envelope this stays under a datagram of 1,400 B."""
KIND_CHARS_MAX = 16
LIFETIME_S_MAX = 8 * 86_400
"""A holder refuses to keep a record longer: storage can't be pinned for ever. Publishers renew (republish anew)."""


class RecordError(ValueError):
    """The record is not to be kept nor believed. The message says why."""


class Record(Struct, frozen=True):
    """`value` under `key`, said by `issuer`. `seq` orders the issuer's own versions; `expires_s` is unix time."""

    key: Bytes20
    kind: Annotated[str, msgspec.Meta(min_length=1, max_length=KIND_CHARS_MAX)]
    seq: Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
    expires_s: Seconds
    value: Annotated[bytes, msgspec.Meta(max_length=VALUE_BYTES_MAX)]
    issuer: Bytes32
    signature: Bytes64

    @property
    def issuer_id(self) -> PeerId:
        return peer_id(self.issuer)

    @property
    def slot(self) -> tuple[bytes, str]:
        """What a newer record replaces: (issuer, kind)."""
        return self.issuer, self.kind


Validator = Callable[[Record], None]
"""Raises `RecordError` for a value that its kind does not allow."""


def _signed(grid: bytes, key: bytes, kind: str, seq: int, expires_s: int, value: bytes) -> bytes:
    return encode((grid, key, kind, seq, expires_s, value))


def make_record(grid: bytes, issuer: Identity, key: bytes, kind: str, seq: int, expires_s: int, value: bytes) -> Record:
    """Sign a record. Raises `RecordError` when key, kind or value is out of bounds."""
    if len(key) != 20:
        raise RecordError(f"a key has 20 bytes, not {len(key)}")
    if not 1 <= len(kind) <= KIND_CHARS_MAX or not kind.isascii():
        raise RecordError(f"a kind has 1 to {KIND_CHARS_MAX} ASCII characters")
    if len(value) > VALUE_BYTES_MAX:
        raise RecordError(f"a record's value is limited to {VALUE_BYTES_MAX} bytes, this one has {len(value)}")
    signature = issuer.sign(RECORD_DOMAIN, _signed(grid, key, kind, seq, expires_s, value))
    return Record(key, kind, seq, expires_s, value, issuer.public, signature)


def verify_record(grid: bytes, record: Record, now_s: float) -> None:
    """Raises `RecordError` when the record is expired, lives too long, or its signature doesn't fit.

    That its issuer is a member is checked apart, where the issuer's chain is known.
    """
    if record.expires_s <= now_s:
        raise RecordError("expired")
    if record.expires_s > now_s + LIFETIME_S_MAX:
        raise RecordError("lives too long")
    if not record.kind.isascii():
        raise RecordError("not a kind")
    payload = _signed(grid, record.key, record.kind, record.seq, record.expires_s, record.value)
    try:
        verify(record.issuer, RECORD_DOMAIN, payload, record.signature)
    except BadSignature:
        raise RecordError("forged or damaged") from None


def supersedes(new: Record, old: Record) -> bool:
    """Whether `new` takes the place of `old`, both of one key, issuer and kind."""
    if new.seq != old.seq:
        return new.seq > old.seq
    return encode(new) > encode(old)


def newest(records: Iterable[Record]) -> list[Record]:
    """The winning record of each (key, issuer, kind), in a fixed order."""
    best: dict[tuple[bytes, bytes, str], Record] = {}
    for record in records:
        slot = (record.key, record.issuer, record.kind)
        held = best.get(slot)
        if held is None or supersedes(record, held):
            best[slot] = record
    return [best[slot] for slot in sorted(best)]
