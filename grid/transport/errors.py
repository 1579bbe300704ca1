"""What can go wrong between peers, as types; each text is one line that says what is wrong and what to do."""

from __future__ import annotations

from dht.core.identity import PeerId


class TransportError(Exception):
    """Base of everything the transport raises."""


class ChannelClosed(TransportError):
    """The connection is gone: closed, reset, silent for too long, or its bytes were altered."""


class HandshakeError(TransportError):
    """The connection was not accepted, by us or by the other end."""


class NotAPeer(HandshakeError):
    """What answers (or calls) does not speak our protocol at all."""


class VersionMismatch(HandshakeError):
    """The other end speaks another version of the protocol."""

    def __init__(self, theirs: int, ours: int) -> None:
        side = "there" if theirs < ours else "here"
        super().__init__(f"the peer speaks protocol version {theirs}, this one version {ours}: update peergrid {side}")
        self.theirs = theirs
        self.ours = ours


class WrongGrid(HandshakeError):
    """The other end runs the handshake of another grid (or its bytes were altered on the way)."""


class NotAMember(HandshakeError):
    """The other end's certificate does not make it a member: expired, revoked, someone else's."""


class WrongPeer(HandshakeError):
    """Somebody else answers at this address than the peer we dialled."""


class HandshakeTimeout(HandshakeError):
    """The other end went silent in the middle of the handshake."""


class Refused(HandshakeError):
    """The other end said no; `code` is one of `hello.Code`."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


class PeerUnreachable(TransportError):
    """No connection to this peer can be had, or it broke while an answer was awaited."""

    def __init__(self, peer: PeerId, why: str) -> None:
        super().__init__(f"peer {peer.hex()[:10]} can't be reached: {why}")
        self.peer = peer
        self.why = why


class RemoteError(TransportError):
    """The other peer's answer to a request is an error. Handlers raise it to send one."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


class BlobMissing(TransportError):
    """The peer does not hold (all of) the range of the blob that was asked for."""

    def __init__(self, peer: PeerId, blob: bytes) -> None:
        super().__init__(f"peer {peer.hex()[:10]} does not hold blob {blob.hex()[:10]}")
        self.peer = peer
        self.blob = blob


class JoinError(TransportError):
    """This invite did not get us in; `code`: expired, used, unknown, unreachable, wrong-grid, version, refused."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text
