"""What peers say of themselves inside the handshake, and how it is made and checked.

A hello proves: the sender holds the ed25519 key (it signed the Noise static key this handshake runs under), and that key
is a member's (its certificate chain). A joiner has no chain: it signs with its invite's key instead. Nothing in a hello
is used before it passed `check`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from dht.core import codec
from dht.core.identity import BadSignature, Identity, PeerId, peer_id, verify
from dht.core.membership import Certificate, Chain, MembershipError
from grid.core import noise
from grid.transport.errors import HandshakeError, NotAMember
from grid.transport.limits import HELLO_BYTES_MAX, REVOCATIONS_MAX

STATIC_DOMAIN: Final = "grid/noise-static/1"
JOIN_DOMAIN: Final = "grid/join/1"

PEER: Final = "peer"
"""Purpose: messages and requests, both ways; one such connection a pair."""
BLOBS: Final = "blobs"
"""Purpose: who dials reads blobs."""
SERVE: Final = "serve"
"""Purpose: who dials serves blobs, because the reader asked it to (the reader could not get through)."""
JOIN: Final = "join"
"""Purpose: who dials holds an invite and wants a certificate."""


class Hello(codec.Struct, frozen=True):
    """One end of a connection. Fields are only ever added at the end, with a default."""

    public: bytes  # ed25519
    signature: bytes  # over the Noise static key
    chain: Chain
    purpose: str  # the initiator's; "" in the responder's
    address: str = ""  # "host:port" where this peer wants to be dialled, or ""
    name: str = ""
    version: str = ""  # of the program, for people
    info: bytes = b""  # opaque here
    revocations: tuple[bytes, ...] = ()  # opaque here; see Mesh.on_up
    invite: bytes = b""  # joiner: the invite's public key
    invite_signature: bytes = b""  # joiner: by the invite's key, over its own key and Noise static key

    @property
    def id(self) -> PeerId:
        return peer_id(self.public)


class Verdict(codec.Struct, frozen=True):
    """The responder's first record: whether the connection stands. code is a `Code`."""

    code: str
    text: str = ""
    chain: Chain = ()  # to a joiner
    addresses: tuple[str, ...] = ()  # to a joiner: "host:port" of members it can dial


class Code:
    """Codes of a verdict; an admission that failed has the code of the handler's RemoteError."""

    OK: Final = "ok"
    DUPLICATE: Final = "duplicate"  # our own dial to you goes on: use that connection
    REFUSED: Final = "refused"  # your certificate does not do
    FULL: Final = "full"  # try again later


@dataclass(frozen=True)
class HelloInfo:
    """What a peer tells about itself besides its proof; asked for at each handshake."""

    address: str = ""
    name: str = ""
    version: str = ""
    info: bytes = b""
    revocations: tuple[bytes, ...] = ()


@dataclass
class Credentials:
    """What one process needs for all its handshakes.

    The Noise static key is made here and never stored: it lives as long as the process. `entropy(n)` gives n secret
    random bytes; only a simulation passes anything but os.urandom.
    """

    grid: bytes
    identity: Identity
    chain: Callable[[], Chain]
    check: Callable[[Chain], Certificate]  # raises MembershipError
    describe: Callable[[], HelloInfo] = HelloInfo
    entropy: Callable[[int], bytes] = os.urandom
    static: bytes = field(init=False, repr=False)
    static_public: bytes = field(init=False)
    _signature: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.static = self.entropy(noise.KEY_BYTES)
        self.static_public = noise.public_key(self.static)
        self._signature = self.identity.sign(STATIC_DOMAIN, self.static_public)

    def hello(self, purpose: str, invite: Identity | None = None) -> bytes:
        """Our own hello, encoded; with an invite's key it is a joiner's, which tells nothing else."""
        if invite is not None:
            signature = invite.sign(JOIN_DOMAIN, self.identity.public + self.static_public)
            hello = Hello(self.identity.public, self._signature, (), purpose, invite=invite.public, invite_signature=signature)
        else:
            mine = self.describe()
            hello = Hello(
                self.identity.public,
                self._signature,
                self.chain(),
                purpose,
                mine.address,
                mine.name,
                mine.version,
                mine.info,
                mine.revocations[:REVOCATIONS_MAX],
            )
        data = codec.encode(hello)
        if len(data) > HELLO_BYTES_MAX:
            raise HandshakeError(f"this peer's own hello has {len(data)} bytes: at most {HELLO_BYTES_MAX} are allowed")
        return data

    def read(self, payload: bytes, remote_static: bytes) -> Hello:
        """Decode a hello and check that its sender holds the key it names; whose key it is is still open."""
        if len(payload) > HELLO_BYTES_MAX:
            raise HandshakeError("the other end's hello is too long")
        try:
            hello = codec.decode(payload, Hello)
            verify(hello.public, STATIC_DOMAIN, remote_static, hello.signature)
            if hello.invite:
                verify(hello.invite, JOIN_DOMAIN, hello.public + remote_static, hello.invite_signature)
        except codec.CodecError as error:
            raise HandshakeError(f"the other end's hello can't be read: {error}") from error
        except BadSignature as error:
            raise HandshakeError("the other end does not hold the key it names") from error
        return hello

    def check_member(self, hello: Hello) -> Certificate:
        """The sender's certificate. Raises NotAMember when it has none that holds."""
        try:
            certificate = self.check(hello.chain)
        except MembershipError as error:
            raise NotAMember(f"the other end is no member of this grid: {error}") from error
        if certificate.key != hello.public:
            raise NotAMember("the other end is no member of this grid: it showed someone else's certificate")
        return certificate
