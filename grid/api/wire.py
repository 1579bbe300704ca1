"""The local channel: frames between a peer and one child process (a driver or a worker), over a Unix stream.

A frame is `<II` (header length, body length), a header (msgpack of one message below), a body (opaque bytes: pickles that
only children open). The peer never looks into a body. Rules this file keeps:

- no I/O and no third-party import but msgspec: user processes import it;
- every length is checked against a bound before memory is taken;
- field order is the wire format: fields are only ever added at the end, with a default.

Indexes are task numbers in their stage, ranges are half open `[lo, hi)`, durations say their unit in their name.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, TypeAlias

import msgspec

HEADER_BYTES_MAX = 4 << 20
"""Page tables of the largest page stay far under this; more is a broken or hostile child."""
BODY_BYTES_MAX = 64 << 20
"""Anything larger travels as a file in the job's spool folder, so that no frame holds the channel up."""
INLINE_BYTES_MAX = 1 << 20
"""A body above this is written to the spool folder and named by `path` instead."""

PREFIX = struct.Struct("<II")
EARLY = struct.Struct("<qq")
"""Before an early result: the driver's number for the stage, the task's index. The result's segment follows."""
EARLY_BYTES_MAX = 4 << 10
"""Of that segment: what is larger comes from the peer alone."""
EARLY_NS = 50_000_000
"""A task that is done later after it was given to its worker comes from the peer alone: it might be run elsewhere by then."""
PROGRESS = struct.Struct("<qq")
"""A worker's progress cell (shared memory): index of the running task or -1, its start in CLOCK_MONOTONIC ns."""


CALLS = 2
"""A stage's `kind`: calls that are submitted one by one."""


class WireError(Exception):
    """The other end broke the frame format; the channel is unusable."""


class Message(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Base of all messages on the local channel."""


class Options(Message, frozen=True):
    """Options of one stage. None means: the job's default."""

    retries: int | None = None
    task_timeout_s: float | None = None
    cpus: int | None = None
    memory_bytes: int | None = None
    tags: tuple[str, ...] = ()
    pure: bool = True


# ---- peer → child ----------------------------------------------------------------------------------------------------


class Setup(Message, tag=1, frozen=True):
    """First frame to every child: who it is and which job it serves."""

    role: str  # "driver" or "worker"
    job: str  # hex
    job_name: str
    peer: str  # hex
    seed: int
    script: str  # absolute path of the script in the job's code folder ("" for a connected driver)
    argv: tuple[str, ...]
    workdir: str
    spool: str  # folder on the blob store's disk for bodies that are too large for a frame
    inputs: str = ""  # folder that holds (or will hold) the job's input files
    options: Options = Options()
    env: dict[str, str] = {}
    epoch: int = 1
    name: str = ""  # the peer's name
    replay: str = ""  # file with the cuts of an earlier run of this driver (grid.api.replay); "": it runs for the first time
    shared_bytes: int = 0  # of pages that a driver may have in memory which it shares with the peer and its workers; 0: none


class Function(Message, tag=2, frozen=True):
    """body: the cloudpickled function `fn`. Sent once to a worker before the first Run that names it."""

    fn: int


class Run(Message, tag=3, frozen=True):
    """Run tasks [lo, hi) of a stage; body (or the file at path): one segment whose first item is task `first`.

    A worker answers with any number of Done / Failed that together cover [lo, hi), or what it does not return of it, exactly
    once, the last one `final`. `timed`: the progress cell tells when each task began, for its time is limited.
    """

    ticket: int
    stage: int
    fn: int
    first: int
    lo: int
    hi: int
    attempt: int = 0
    path: str = ""
    timed: bool = False
    shared: bool = False  # what is at path will be written anew once nobody maps it: answer Unmapped, too
    early: int = -1  # the driver's number for the stage, if it waits for this one task: it may have the result from us, too
    given_ns: int = 0  # then: CLOCK_MONOTONIC when it was given


class Result(Message, tag=4, frozen=True):
    """To a driver or waiting worker: tasks [lo, hi) are done; body (or file): one result segment (a list of values).

    The receiver owns the file at `path` for as long as the child lives (hard link or copy), read-only.
    Ordered stages get their results in index order, others as they come.
    """

    stage: int
    lo: int
    hi: int
    path: str = ""
    skip: int = 0  # values of the segment before that of task lo; it may hold more behind that of hi - 1, too


class Failure(Message, tag=5, frozen=True):
    """To a driver or waiting worker: task `index` failed for good. body: pickled exception, or empty."""

    stage: int
    index: int
    kind: str  # raised | died | timeout | memory | cancelled | unpicklable | failed
    type_name: str
    message: str
    traceback: str


class Cancelled(Message, tag=6, frozen=True):
    """To a driver or waiting worker: what of [lo, hi) was not reported yet never will be."""

    stage: int
    lo: int
    hi: int


class Reply(Message, tag=7, frozen=True):
    """Answer to the request with this id. error is "" on success, else one line for the user."""

    id: int
    error: str = ""
    text: str = ""
    path: str = ""


class Stop(Message, tag=8, frozen=True):
    """Finish what runs and exit with status 0."""


class Throttle(Message, tag=9, frozen=True):
    """To a producer: hold back (True) or resume (False) further pages of this stage."""

    stage: int
    hold: bool


class Revoke(Message, tag=10, frozen=True):
    """To a worker: give a ticket back that was not begun yet (answer: Returned); one that was begun is not affected."""

    ticket: int


class Compare(Message, tag=11, frozen=True):
    """To a replayed driver: are items [first, first + count) of its stage `stage` the same although their bytes differ?

    body: the recorded segment (its first `old_bytes` bytes), then the one that the driver has just sent; both hold `count`
    items. Answered with Same, in no particular order and whenever it is known; other frames don't wait for that. Over 8 MiB,
    or where anything raises, nothing is the same.
    """

    id: int  # the asker's own number, one series with CompareFunction's
    stage: int  # the driver's own number for it
    first: int
    count: int
    old_bytes: int


class CompareFunction(Message, tag=12, frozen=True):
    """To a replayed driver: have two functions the same code, and did they capture the same?

    body: the recorded function (its first `old_bytes` bytes), then the one that the driver defined. Answered with Same, whose
    ranges are ((0, 1),) or nothing. Functions whose names differ are different: don't ask.
    """

    id: int
    old_bytes: int


class Released(Message, tag=13, frozen=True):
    """To a driver: the peer is done with the shared memory at `path`. reusable: nobody maps it, it may be written anew."""

    path: str
    reusable: bool


class Import(Message, tag=14, frozen=True):
    """To a worker that has nothing to do: the next Run's arguments will need these modules. Not answered."""

    modules: tuple[str, ...]


# ---- child → peer ----------------------------------------------------------------------------------------------------


class Ready(Message, tag=20, frozen=True):
    """First frame of every child."""

    pid: int
    python: str  # "3.11.7"


class Define(Message, tag=21, frozen=True):
    """body: cloudpickled function; `fn` is the child's own number for it, used by its stages."""

    fn: int
    name: str  # qualified name, for people


class Stage(Message, tag=22, frozen=True):
    """A stage opens. Stage numbers are the child's own, from 0; the peer maps those of nested calls.

    For a nested stage `parent_stage`, `parent_index` are the running task's as given in its Run, and `occurrence` counts
    the stages that task has made so far; the driver's stages have parent_stage = -1. `kind` is that of all its segments
    (grid.api.serialize): 0 one argument an item, 1 a tuple of arguments, 2 submitted calls.
    """

    stage: int
    fn: int
    name: str
    ordered: bool
    options: Options = Options()
    parent_stage: int = -1
    parent_index: int = -1
    occurrence: int = 0
    kind: int = 0


class Page(Message, tag=23, frozen=True):
    """Consecutive tasks of a stage, from index `first`; body (or file): the segments' bytes one after the other.

    counts[i] tasks and lengths[i] bytes make segment i; refs[i] names (hex BLAKE3) the blobs its tasks will read, so that
    they can be fetched before it runs. `final` closes the stage: no page follows.
    """

    stage: int
    first: int
    counts: tuple[int, ...]
    lengths: tuple[int, ...]
    refs: tuple[tuple[str, ...], ...] = ()
    path: str = ""
    final: bool = False
    shared: bool = False  # path is memory of the driver, which it does not touch before it is Released


class Close(Message, tag=24, frozen=True):
    """No page of this stage follows; it has `total` tasks."""

    stage: int
    total: int


class Cancel(Message, tag=25, frozen=True):
    """Tasks [lo, hi) are no longer wanted; hi = -1: all, including those not declared yet. `reason` is for people."""

    stage: int
    lo: int = 0
    hi: int = -1
    reason: str = ""


class Consumed(Message, tag=26, frozen=True):
    """The reader took this many body bytes of results: credit for more."""

    stage: int
    size: int


class Done(Message, tag=27, frozen=True):
    """Worker: tasks [lo, hi) of a ticket are done; body (or file): one result segment. elapsed_us: time in user code."""

    ticket: int
    lo: int
    hi: int
    elapsed_us: int
    final: bool
    path: str = ""
    early: bool = False  # sent to the driver, too, after this


class Failed(Message, tag=28, frozen=True):
    """Worker: task `index` of a ticket raised (or its result can't be pickled). body: pickled exception, or empty."""

    ticket: int
    index: int
    kind: str
    type_name: str
    message: str
    traceback: str
    elapsed_us: int
    final: bool


class Print(Message, tag=29, frozen=True):
    """Worker: the task wrote body to its stdout (1) or stderr (2)."""

    stage: int
    index: int
    fd: int


class Waiting(Message, tag=30, frozen=True):
    """Worker: the running task blocks on results of its own children (True) or goes on (False): its slot is free."""

    blocked: bool


class Put(Message, tag=31, frozen=True):
    """Store body (or adopt the file at path) as a blob; Reply.text is its hex BLAKE3."""

    id: int
    path: str = ""


class Fetch(Message, tag=32, frozen=True):
    """Make blob `ref` (hex BLAKE3; size in bytes) readable here; Reply.path: a read-only file that stays for the job."""

    id: int
    ref: str
    size: int


class OpenInput(Message, tag=33, frozen=True):
    """Make the job's input file `name` (relative, as listed in the manifest) readable here; Reply.path is its path."""

    id: int
    name: str


class ListInputs(Message, tag=34, frozen=True):
    """Reply.path names a file with the job's input manifest: a JSON list of [name, size]."""

    id: int


class Returned(Message, tag=35, frozen=True):
    """Worker: tasks from `lo` on (-1: all) of a ticket that was revoked or takes far longer than expected; none was begun.

    `elapsed_us`: how long it has been at those before them that are not reported yet. If there are none, this ends the ticket.
    """

    ticket: int
    lo: int = -1
    elapsed_us: int = 0


class Same(Message, tag=36, frozen=True):
    """Driver: answer to the Compare (or CompareFunction) of this id: the ranges [lo, hi) of indexes that are the same."""

    id: int
    ranges: tuple[tuple[int, int], ...] = ()


class Unmapped(Message, tag=37, frozen=True):
    """Worker: a ticket whose Run said `shared` is over. clean: nothing of this process maps its arguments any more."""

    ticket: int
    clean: bool


class Expect(Message, tag=38, frozen=True):
    """Driver: a page that takes a while to write will need these modules where its tasks run."""

    modules: tuple[str, ...]


ToChild: TypeAlias = (
    Setup
    | Function
    | Run
    | Result
    | Failure
    | Cancelled
    | Reply
    | Stop
    | Throttle
    | Revoke
    | Compare
    | CompareFunction
    | Released
    | Import
)
FromChild: TypeAlias = (
    Ready
    | Define
    | Stage
    | Page
    | Close
    | Cancel
    | Consumed
    | Done
    | Failed
    | Print
    | Waiting
    | Put
    | Fetch
    | OpenInput
    | ListInputs
    | Returned
    | Same
    | Unmapped
    | Expect
)

_encoder = msgspec.msgpack.Encoder()
to_child_decoder: msgspec.msgpack.Decoder[ToChild] = msgspec.msgpack.Decoder(ToChild)
from_child_decoder: msgspec.msgpack.Decoder[FromChild] = msgspec.msgpack.Decoder(FromChild)

Buffer: TypeAlias = bytes | bytearray | memoryview


def encode(message: Message, body_length: int = 0) -> bytes:
    """Return prefix and header of a frame; the caller sends `body_length` body bytes after it."""
    assert 0 <= body_length <= BODY_BYTES_MAX
    header = _encoder.encode(message)
    return PREFIX.pack(len(header), body_length) + header


class FrameReader:
    """Cuts a byte stream into frames: `feed` bytes as they arrive, iterate the frames that are whole.

    Raises WireError on a length over its bound or a header that is no message; after that the reader is unusable.
    """

    def __init__(self, decoder: msgspec.msgpack.Decoder[Any]) -> None:
        self._decoder = decoder
        self._buffer = bytearray()

    def feed(self, data: Buffer) -> Iterator[tuple[Any, bytes]]:
        """Yield each (message, body) that `data` completes. Iterate to the end before `data` changes or more is fed."""
        source: Buffer = data
        if self._buffer:
            self._buffer += data
            source = self._buffer
        start, size = 0, len(source)
        try:
            with memoryview(source) as view:
                while size - start >= PREFIX.size:
                    header_length, body_length = PREFIX.unpack_from(view, start)
                    if header_length > HEADER_BYTES_MAX or body_length > BODY_BYTES_MAX:
                        raise WireError(f"frame of {header_length} + {body_length} bytes is over the bound")
                    header_end = start + PREFIX.size + header_length
                    end = header_end + body_length
                    if size < end:
                        break
                    try:
                        message = self._decoder.decode(view[start + PREFIX.size : header_end])
                    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                        raise WireError(f"not a message: {error}") from None
                    body = bytes(view[header_end:end])
                    start = end
                    yield message, body
        finally:
            if source is self._buffer:
                del self._buffer[:start]
            elif start < size:
                self._buffer += memoryview(data)[start:]
