"""The bodies of requests and answers.

Field order is the wire format: fields are only ever added at the end, with a default.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from dht.core.codec import Bytes20, Bytes32, Struct
from dht.core.membership import Certificate
from dht.core.records import KIND_CHARS_MAX, Record

HOST_CHARS_MAX = 64
"""Contacts are handed out with numeric hosts (an IPv6 address with a zone: 60 characters)."""
CERTIFICATES_MAX = 6
"""Certificates in one datagram, 163 B each."""
CONTACTS_MAX = 32
RECORDS_MAX = 16

Host = Annotated[str, msgspec.Meta(min_length=1, max_length=HOST_CHARS_MAX)]
Port = Annotated[int, msgspec.Meta(ge=1, le=65_535)]
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 16)]

ContactInfo = tuple[Bytes32, Host, Port]
"""(public key, host, port). The id isn't sent: it follows from the key."""
Contacts = Annotated[tuple[ContactInfo, ...], msgspec.Meta(max_length=CONTACTS_MAX)]
Certificates = Annotated[tuple[Certificate, ...], msgspec.Meta(max_length=CERTIFICATES_MAX)]

STORED = 0
NEED_CHAIN = 1
"""The issuer's certificates are unknown here: say hello with them and store again."""
REFUSED = 2
"""Invalid, over a quota, or no room."""
STALE = 3
"""A newer record of this issuer and kind is held already."""


class Ping(Struct, frozen=True):
    """`advertise`: where the sender wants to be contacted, if not where it writes from. Proven before it is used."""

    advertise: tuple[Host, Port] | None = None


class Find(Struct, frozen=True):
    target: Bytes20


class Found(Struct, frozen=True):
    """The contacts nearest to the target."""

    contacts: Contacts


class Value(Struct, frozen=True):
    """Records under `key`, of all kinds if `kind` is empty. Page 0 has contacts too; page n begins with record n - 1."""

    key: Bytes20
    kind: Annotated[str, msgspec.Meta(max_length=KIND_CHARS_MAX)] = ""
    page: Count = 0


class Values(Struct, frozen=True):
    """As many records as fit. `next` is the page to ask for next, 0 when there are no more."""

    contacts: Contacts
    records: Annotated[tuple[Record, ...], msgspec.Meta(max_length=RECORDS_MAX)]
    next: Count


class Store(Struct, frozen=True):
    record: Record


class Stored(Struct, frozen=True):
    status: int


class Hello(Struct, frozen=True):
    """Certificates root-first (a slice of a chain), and whose chain is wanted in return, from which place on."""

    certificates: Certificates
    want: Bytes32
    offset: Count = 0


class Welcome(Struct, frozen=True):
    """The slice wanted, and the length of the whole chain (0: unknown here)."""

    certificates: Certificates
    length: Count
