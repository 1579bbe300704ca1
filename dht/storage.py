"""The records this peer holds for the grid: the kademlia package's storage interface, bounded and validated.

Rules this file keeps:

- nothing is held that wasn't verified, and nothing beyond its signed expiry;
- keys, records a key, bytes, and one issuer's share are bounded, each by a named constant;
- when full, what is farthest from this peer's own id goes first: others are responsible for it;
- the chain of a held record's issuer is held with it, so that a reader can verify the record after the issuer left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from kademlia.storage import IStorage

from dht.core.codec import encode
from dht.core.membership import Chain
from dht.core.records import Record, RecordError, Validator, supersedes

KEYS_MAX = 4_096
"""Keys held: some hundred jobs and invites of a thousand peers."""
RECORDS_PER_KEY_MAX = 64
"""Issuers and kinds under one key: replica sets and uses of an invite have fewer."""
BYTES_MAX = 8 << 20
"""All records together."""
ISSUER_RECORDS_MAX = 512
"""One issuer's share of the records."""
ISSUER_BYTES_MAX = BYTES_MAX // 16
ISSUER_KINDS_PER_KEY_MAX = 8
"""One issuer's kinds under one key, so that no issuer crowds the others out of it."""


@dataclass
class _Share:
    records: int
    bytes: int
    chain: Chain


class Storage(IStorage):  # type: ignore[misc]
    """Records by key and (issuer, kind). `clock` gives unix time in seconds."""

    def __init__(self, own_id: bytes, clock: Callable[[], float]) -> None:
        self._own = int.from_bytes(own_id, "big")
        self._clock = clock
        self._keys: dict[bytes, dict[tuple[bytes, str], Record]] = {}
        self._shares: dict[bytes, _Share] = {}
        self._validators: dict[str, Validator] = {}
        self._bytes = 0

    def validate(self, kind: str, validator: Validator) -> None:
        """From now on records of `kind` must satisfy `validator`."""
        self._validators[kind] = validator

    def check_value(self, record: Record) -> None:
        """Raises `RecordError` when the record's kind doesn't allow its value."""
        validator = self._validators.get(record.kind)
        if validator is not None:
            validator(record)

    @property
    def bytes_held(self) -> int:
        return self._bytes

    def __len__(self) -> int:
        return sum(len(slots) for slots in self._keys.values())

    def held_keys(self) -> list[bytes]:
        return list(self._keys)

    def chain_of(self, issuer: bytes) -> Chain | None:
        """The chain of an issuer whose records are held here."""
        share = self._shares.get(issuer)
        return None if share is None else share.chain

    def put(self, record: Record, chain: Chain) -> bool:
        """Hold a verified record of a verified issuer. False when a newer one is held already.

        Raises `RecordError` when it is invalid for its kind, over a quota, or there is no room.
        """
        self.check_value(record)
        slots = self._keys.get(record.key, {})
        old = slots.get(record.slot)
        if old is not None and not supersedes(record, old):
            return old == record
        self._check_room(record, slots, old)
        old = self._keys.get(record.key, {}).get(record.slot)  # making room may have dropped it
        if old is not None:
            self._drop(old)
        self._keys.setdefault(record.key, {})[record.slot] = record
        size = len(encode(record))
        share = self._shares.setdefault(record.issuer, _Share(0, 0, chain))
        share.records, share.bytes, share.chain = share.records + 1, share.bytes + size, chain
        self._bytes += size
        return True

    def _check_room(self, record: Record, slots: dict[tuple[bytes, str], Record], old: Record | None) -> None:
        size = len(encode(record)) - (len(encode(old)) if old is not None else 0)
        share = self._shares.get(record.issuer)
        if share is not None and (share.bytes + size > ISSUER_BYTES_MAX or (old is None and share.records >= ISSUER_RECORDS_MAX)):
            raise RecordError("over the issuer's share")
        if old is None:
            if len(slots) >= RECORDS_PER_KEY_MAX:
                self.cull(record.key)
            if len(slots) >= RECORDS_PER_KEY_MAX:
                raise RecordError("too many records under this key")
            if sum(issuer == record.issuer for issuer, _ in slots) >= ISSUER_KINDS_PER_KEY_MAX:
                raise RecordError("too many kinds of this issuer under this key")
        if self._is_full(record.key, size):
            self.cull()
        while self._is_full(record.key, size):
            farthest = max(self._keys, key=self._distance)
            if self._distance(record.key) >= self._distance(farthest):
                raise RecordError("no room for a key so far away")
            for held in list(self._keys[farthest].values()):
                self._drop(held)

    def _is_full(self, key: bytes, size: int) -> bool:
        return self._bytes + size > BYTES_MAX or (key not in self._keys and len(self._keys) >= KEYS_MAX)

    def _distance(self, key: bytes) -> int:
        return self._own ^ int.from_bytes(key, "big")

    def _drop(self, record: Record) -> None:
        slots = self._keys[record.key]
        del slots[record.slot]
        if not slots:
            del self._keys[record.key]
        size = len(encode(record))
        self._bytes -= size
        share = self._shares[record.issuer]
        share.records, share.bytes = share.records - 1, share.bytes - size
        if not share.records:
            del self._shares[record.issuer]

    def remove(self, record: Record) -> None:
        """Let go of a record if it is still the one held."""
        if self._keys.get(record.key, {}).get(record.slot) == record:
            self._drop(record)

    def cull(self, key: bytes | None = None) -> None:
        """Drop what has expired, under one key or everywhere."""
        now_s = self._clock()
        for k in self.held_keys() if key is None else [key]:
            for record in [r for r in self._keys.get(k, {}).values() if r.expires_s <= now_s]:
                self._drop(record)

    def records(self, key: bytes, kind: str = "") -> list[Record]:
        """The live records under `key`, in a fixed order; of all kinds if `kind` is empty."""
        self.cull(key)
        slots = self._keys.get(key, {})
        return [slots[slot] for slot in sorted(slots) if not kind or slots[slot].kind == kind]

    # the kademlia package's interface

    def __setitem__(self, key: bytes, value: tuple[Record, Chain]) -> None:
        record, chain = value
        if record.key != key:
            raise RecordError("a record of another key")
        self.put(record, chain)

    def __getitem__(self, key: bytes) -> list[Record]:
        records = self.records(key)
        if not records:
            raise KeyError(key)
        return records

    def get(self, key: bytes, default: list[Record] | None = None) -> list[Record] | None:
        return self.records(key) or default

    def iter_older_than(self, seconds_old: float) -> Iterator[tuple[bytes, list[Record]]]:
        """Nothing: a record's age is in its signed expiry, there is none to be refreshed by holders."""
        return iter(())

    def __iter__(self) -> Iterator[tuple[bytes, list[Record]]]:
        self.cull()
        return iter([(key, self.records(key)) for key in self.held_keys()])
