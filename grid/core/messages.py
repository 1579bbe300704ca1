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
from grid.core.mandate import Branch, Endorsement, Mandate


class Message(msgspec.Struct, array_like=True, frozen=True):
    """Base."""


Ranges: TypeAlias = tuple[tuple[int, int], ...]
"""Half-open ranges of one stage, sorted."""

# ---- gossip ----------------------------------------------------------------------------------------------------------


class Elected(msgspec.Struct, array_like=True, frozen=True):
    """Somebody led a branch in an epoch, by this mandate."""

    branch: bytes
    epoch: int
    leader: bytes
    mandate: Mandate


class JobNews(Message, tag=1, frozen=True):
    """A job exists and who leads it; or that it ended. A higher (epoch, version) replaces a lower. Passed on once.

    Epochs compare only within a branch; `mandate` shows that its replicas know this leader (empty in epoch 1 of the root).
    `key` is the leader's (b"": the submitter's). `lineage`: for who knows none of the mandate's voters, earlier mandates that
    lead from peers the spec names to them, oldest first.
    """

    spec: SignedSpec
    epoch: int
    leader: bytes
    leader_address: tuple[str, int]
    version: int
    state: str
    work: bool  # the leader has ranges to give
    signature: bytes = b""  # by the leader; see grid/core/news.py
    branch: Branch = Branch()
    mandate: Mandate = Mandate()
    key: bytes = b""
    lineage: tuple[Elected, ...] = ()


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
    pause_ms: int = 0  # from a leader: ask no more often than this for now


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


class Beat(Message, tag=59, frozen=True):
    """From the leader: send Claims this often from now on, in this epoch."""

    job: bytes
    interval_ms: int


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
    """The sender holds these blobs: its tasks stored them (`grid.put`; this goes before any frame or result that may name
    them), or it was asked to keep them. `refused`: it was asked to, and does not. `sizes`: in bytes, of what tasks stored.
    """

    job: bytes
    blobs: tuple[bytes, ...]
    refused: tuple[bytes, ...] = ()
    sizes: tuple[int, ...] = ()


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


# ---- replicas --------------------------------------------------------------------------------------------------------


class Enlist(Message, tag=50, frozen=True):
    """Request: hold a replica of this job's log on this branch, empty as yet. An older one of that branch here is void then."""

    spec: SignedSpec
    branch: Branch
    blobs: tuple[tuple[bytes, int], ...] = ()  # (blob, size) the job needs wherever it is led: fetched in the background


class Enlisted(Message, tag=51, frozen=True):
    """Reply to Enlist: the journal exists on disk under this incarnation."""

    incarnation: int


class Mail(Message, tag=52, frozen=True):
    """A consensus message between two replicas of a branch of a job (grid/core/raft_messages.py)."""

    job: bytes
    branch: bytes
    sender: int  # incarnations; the peers are the session's two ends
    to: int
    data: bytes


class Dismissed(Message, tag=53, frozen=True):
    """From a branch's leader: this incarnation is in its group no more. Its journal may go."""

    job: bytes
    branch: bytes
    incarnation: int


class Survey(Message, tag=54, frozen=True):
    """Request: what do you have of this job? Asked when no leader was heard for a while."""

    job: bytes
    branch: bytes


class Surveyed(Message, tag=55, frozen=True):
    """Reply to Survey. `led`: the sender hears (or is) a leader. Without a replica of that branch: incarnation 0."""

    incarnation: int
    term: int = 0
    last_term: int = 0
    last_index: int = 0
    led: bool = False
    final: bool = False


class Endorse(Message, tag=56, frozen=True):
    """Request to a voter by the leader of `epoch`: sign that you know me as such."""

    job: bytes
    branch: bytes
    epoch: int


class Endorsed(Message, tag=57, frozen=True):
    """Reply to Endorse."""

    endorsement: Endorsement


class Keep(Message, tag=58, frozen=True):
    """From a job's leader: fetch these blobs (blob, size) from me or `holders` and keep them for the job. Answered by Have."""

    job: bytes
    blobs: tuple[tuple[bytes, int], ...]
    holders: tuple[bytes, ...] = ()


AnyMessage: TypeAlias = (
    JobNews
    | JobsWanted
    | Steal
    | Give
    | Nothing
    | GrantTaken
    | Poke
    | Claims
    | Beat
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
    | Enlist
    | Enlisted
    | Mail
    | Dismissed
    | Survey
    | Surveyed
    | Endorse
    | Endorsed
    | Keep
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
