"""Messages between peers about jobs: one tagged union, one codec.

Rules: field order is the wire format; fields are only added at the end, with a default; everything is checked on decode,
lengths included (a frame is bounded by the transport). Who may send what is checked by the receiver's handler, with the
session's peer id, never with a field.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from dht.core import codec
from grid.core.bundle import Signed
from grid.core.job import SignedSpec


class Message(msgspec.Struct, array_like=True, frozen=True):
    """Base."""


Ranges: TypeAlias = tuple[tuple[int, int], ...]
"""Half-open ranges of one stage, sorted."""

# ---- gossip ----------------------------------------------------------------------------------------------------------


class JobNews(Message, tag=1, frozen=True):
    """A job exists and who leads it; or that it ended. A higher (epoch, version) replaces a lower. Passed on once."""

    spec: SignedSpec
    epoch: int
    leader: bytes
    leader_address: tuple[str, int]
    version: int
    state: str
    work: bool  # the leader has ranges to give
    signature: bytes = b""  # by the leader; see grid/core/news.py


class JobsWanted(Message, tag=2, frozen=True):
    """A fresh neighbour asks for the news of all live jobs."""


# ---- stealing --------------------------------------------------------------------------------------------------------


class Steal(Message, tag=10, frozen=True):
    """Request: a peer with free slots asks a holder for ranges. `stages`: declarations it has already."""

    job: bytes
    epoch: int
    slots: int
    tags: tuple[str, ...] = ()
    known_stages: Ranges = ()
    holds: tuple[bytes, ...] = ()
    bare: bool = False  # the asker has every segment: ranges only


class Give(Message, tag=11, frozen=True):
    """Reply: a signed grant, with what the thief lacks to run it. `inline[i]` are segment i's bytes, or b"": fetch it."""

    grant: Signed
    declarations: tuple[Signed, ...]
    functions: tuple[tuple[bytes, bytes], ...]  # (hash, bytes) of short functions
    inline: tuple[bytes, ...]
    holders: tuple[tuple[bytes, tuple[bytes, ...]], ...] = ()


class Nothing(Message, tag=12, frozen=True):
    """Reply: no work here. Hints name other holders. parked: the victim will poke when it has work."""

    hints: tuple[bytes, ...] = ()
    parked: bool = False
    state: str = ""
    fence: int = 0  # the epoch the victim knows, when higher


class GrantTaken(Message, tag=13, frozen=True):
    """The thief holds what grant `number` names: the giver may stop claiming it."""

    job: bytes
    number: int


class Poke(Message, tag=14, frozen=True):
    """There is work again: ask."""

    job: bytes


class Claims(Message, tag=15, frozen=True):
    """Heartbeat to the leader: every range this peer holds (queued, running, or finished and not acknowledged)."""

    job: bytes
    epoch: int
    held: tuple[tuple[int, Ranges], ...]
    slots: int
    busy: int
    have: tuple[bytes, ...] = ()
    blocked: str = ""  # why this peer can't run the job's tasks, for `explain`


# ---- completions -----------------------------------------------------------------------------------------------------


class Completed(Message, tag=20, frozen=True):
    """A signed Completion."""

    signed: Signed


class Accepted(Message, tag=21, frozen=True):
    """The leader has taken completions of `session` up to `number`: their results may be dropped where they were made."""

    job: bytes
    number: int
    session: int = 0


class Drop(Message, tag=22, frozen=True):
    """From the leader: these ranges are no longer wanted (done elsewhere or cancelled)."""

    job: bytes
    epoch: int
    ranges: tuple[tuple[int, Ranges], ...]


class Printed(Message, tag=23, frozen=True):
    """What tasks wrote: (stage, index, fd, bytes)."""

    job: bytes
    lines: tuple[tuple[int, int, int, bytes], ...]
    dropped_bytes: int = 0


class Have(Message, tag=24, frozen=True):
    """Tasks stored these blobs at the sender (`grid.put`). It goes before any frame or result that may name them."""

    job: bytes
    blobs: tuple[bytes, ...]


# ---- children of tasks -----------------------------------------------------------------------------------------------


class Relay(Message, tag=30, frozen=True):
    """A frame of the local channel between the job's leader and a child process at another peer (nested stages, both ways).

    `token` is the name that the child's peer gives the child. `header` and `body` are the frame's; a body in a file comes
    as a blob (at the sender) instead.
    """

    job: bytes
    token: int
    header: bytes
    body: bytes = b""
    blob: bytes = b""
    size: int = 0


class RelayClosed(Message, tag=31, frozen=True):
    """To the leader: the child is gone, its unfinished stages are cancelled. From the leader: it forgot the child's stages
    (the connection was lost, or the child broke the protocol: `why`), so the child can only be ended.
    """

    job: bytes
    token: int
    why: str = ""


# ---- questions about jobs --------------------------------------------------------------------------------------------


class Ask(Message, tag=40, frozen=True):
    """Request to the peer that leads or archives a job: `method` of the control interface, JSON parameters."""

    method: str
    params: bytes


class Answer(Message, tag=41, frozen=True):
    """Reply to Ask: JSON, and raw bytes where the method has some."""

    result: bytes
    body: bytes = b""


class FindBlob(Message, tag=46, frozen=True):
    """Request to a job's leader: who holds this blob?"""

    job: bytes
    blob: bytes


class Holders(Message, tag=47, frozen=True):
    """Reply to FindBlob: peer ids, best first."""

    peers: tuple[bytes, ...]


class Renew(Message, tag=44, frozen=True):
    """Request: a fresh certificate chain for the asker (its old one runs out, or is long)."""


class Renewed(Message, tag=45, frozen=True):
    """Reply to Renew: the encoded chain."""

    chain: bytes


AnyMessage: TypeAlias = (
    JobNews
    | JobsWanted
    | Steal
    | Give
    | Nothing
    | GrantTaken
    | Poke
    | Claims
    | Completed
    | Accepted
    | Drop
    | Printed
    | Have
    | Relay
    | RelayClosed
    | Ask
    | Answer
    | Renew
    | Renewed
    | FindBlob
    | Holders
)

_decoder: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(AnyMessage)


def encode(message: Message) -> bytes:
    """Canonical bytes."""
    return codec.encode(message)


def decode(data: bytes) -> AnyMessage:
    """Raises codec.CodecError on anything that is no message."""
    try:
        return _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:  # the latter from a text that is no UTF-8
        raise codec.CodecError(f"not a message: {error}") from None
