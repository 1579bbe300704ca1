"""An authenticated, encrypted channel of records over one stream: the handshake's shell and the record layer.

On the wire: each side's clear preamble (magic and protocol version), three Noise XX messages behind u16 lengths, then
records behind u32 lengths. Rules this file keeps:

- the initiator has verified the responder's membership before it sends anything of its own (message 3);
- each wait in a handshake is under one deadline; whatever goes wrong, the stream is closed and one HandshakeError tells;
- a record's length is its associated data, so nobody can cut or join records; records may be longer than Noise's 65,535
  bytes (a deviation: the limit is for small devices), and both ends rekey after each REKEY_RECORDS of them;
- a length is checked before memory is taken.
"""

from __future__ import annotations

import os
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Final

import trio
from trio.abc import HalfCloseableStream

from dht.core import codec
from dht.core.identity import Identity, PeerId
from grid.core.noise import MESSAGE_BYTES_MAX, TAG_BYTES, Buffer, CipherState, HandshakeState, NoiseError
from grid.transport.errors import (
    ChannelClosed,
    HandshakeError,
    HandshakeTimeout,
    NotAPeer,
    Refused,
    VersionMismatch,
    WrongGrid,
    WrongPeer,
)
from grid.transport.hello import Code, Credentials, Hello, Verdict
from grid.transport.limits import (
    DRAIN_READS_MAX,
    DRAIN_S,
    HANDSHAKE_S,
    PROTOCOL_VERSION,
    RECEIVE_BUFFER_BYTES,
    RECORD_BYTES_MAX,
    REKEY_RECORDS,
)

MAGIC: Final = b"\xf0grid\r\n\x1a"
"""No text protocol begins so, and what mangles line ends mangles it (as PNG's does)."""
_PREAMBLE: Final = struct.Struct(">8sH")
_SHORT: Final = struct.Struct(">H")
_LENGTH: Final = struct.Struct(">I")
_LOST: Final = (trio.BrokenResourceError, trio.ClosedResourceError)


class _Input:
    """Exact reads from a stream, many small records a system call."""

    def __init__(self, stream: HalfCloseableStream) -> None:
        self._stream = stream
        self._socket = stream.socket if isinstance(stream, trio.SocketStream) else None
        self._buffer = bytearray(RECEIVE_BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._start = 0
        self._end = 0
        self.waiting_since: float | None = None
        """Trio's time at which the present wait for bytes began; None while nobody waits."""

    async def _fill(self, view: memoryview) -> int:
        """Some bytes into `view`; 0 at the end. A real socket reads straight into it."""
        self.waiting_since = trio.current_time()
        try:
            if self._socket is not None:
                return await self._socket.recv_into(view)
            data = await self._stream.receive_some(len(view))
            view[: len(data)] = data
            return len(data)
        except OSError as error:
            raise trio.BrokenResourceError(f"connection lost: {error}") from error
        finally:
            self.waiting_since = None

    async def exactly(self, size: int) -> memoryview:
        """The next `size` bytes, valid until the next call. Raises ChannelClosed, also on an end in the middle."""
        have = self._end - self._start
        if have >= size:
            view = self._view[self._start : self._start + size]
            self._start += size
            return view
        if size > len(self._buffer):
            return await self._large(size, have)
        if self._start + size > len(self._buffer) or have == 0:
            self._buffer[:have] = self._buffer[self._start : self._end]
            self._start, self._end = 0, have
        while self._end - self._start < size:
            self._end += await self._some(self._view[self._end :])
        return await self.exactly(size)

    async def _large(self, size: int, have: int) -> memoryview:
        whole = memoryview(bytearray(size))
        whole[:have] = self._view[self._start : self._end]
        self._start = self._end = 0
        while have < size:
            have += await self._some(whole[have:])
        return whole

    async def _some(self, view: memoryview) -> int:
        try:
            count = await self._fill(view)
        except _LOST as error:
            raise ChannelClosed("connection lost") from error
        if count == 0:
            raise ChannelClosed("the other end closed the connection")
        return count


class SecureChannel:
    """One established channel. One task may receive while another sends; several of either may not."""

    def __init__(
        self,
        stream: HalfCloseableStream,
        source: _Input,
        states: tuple[CipherState, CipherState],
        hello: Hello,
        *,
        initiator: bool,
    ) -> None:
        self._stream = stream
        self._write_now: Callable[[Buffer], int] | None = getattr(stream, "write_now", None)  # a stream in memory has it
        if isinstance(stream, trio.SocketStream):
            self._write_now = partial(_write, stream.socket)
        self._unsent = b""
        self._input = source
        self._sealer, self._opener = states
        self.hello = hello
        self.peer: PeerId = hello.id
        self.initiator = initiator

    @property
    def waiting_since(self) -> float | None:
        """Trio's time since when `receive` has been without a byte; None while nobody waits for one."""
        return self._input.waiting_since

    async def send(self, *records: Buffer) -> None:
        """Send records, all in one write. Raises ChannelClosed; the channel is unusable after that or a cancel."""
        buffer = self._sealed(records)
        if self._unsent:
            buffer, self._unsent = bytearray(self._unsent) + buffer, b""
        try:
            await self._stream.send_all(buffer)
        except _LOST as error:
            raise ChannelClosed("connection lost") from error

    def send_now(self, record: Buffer) -> bool:
        """Hand a small record to the kernel without waiting, while no other task sends.

        False where the stream can't: nothing was done. What the kernel would not take (see `unsent`) goes out
        before the next `send`. Raises ChannelClosed.
        """
        if self._write_now is None:
            return False
        buffer = self._sealed((record,))
        if self._unsent:
            self._unsent += buffer
            return True
        try:
            count = self._write_now(buffer)
        except BlockingIOError:
            count = 0
        except (OSError, ValueError) as error:
            raise ChannelClosed("connection lost") from error
        self._unsent = bytes(buffer[count:])
        return True

    @property
    def unsent(self) -> bool:
        """Whether `send_now` left something that waits for a `send`."""
        return bool(self._unsent)

    def _sealed(self, records: tuple[Buffer, ...]) -> bytearray:
        buffer = bytearray(sum(map(len, records)) + len(records) * (_LENGTH.size + TAG_BYTES))
        view = memoryview(buffer)
        place = 0
        for record in records:
            size = len(record) + TAG_BYTES
            if len(record) > RECORD_BYTES_MAX:
                raise ValueError(f"a record of {len(record)} bytes: at most {RECORD_BYTES_MAX} are allowed")
            _LENGTH.pack_into(buffer, place, size)
            body = place + _LENGTH.size
            self._sealer.encrypt_into(view[place:body], record, view[body : body + size])
            if self._sealer.n % REKEY_RECORDS == 0:
                self._sealer.rekey()
            place = body + size
        return buffer

    async def receive(self) -> bytes:
        """The next record. Raises ChannelClosed at the end, and for good when a record does not authenticate."""
        prefix = bytes(await self._input.exactly(_LENGTH.size))
        (size,) = _LENGTH.unpack(prefix)
        if not TAG_BYTES <= size <= RECORD_BYTES_MAX + TAG_BYTES:
            raise ChannelClosed("the connection's bytes were altered on the way")
        sealed = await self._input.exactly(size)
        try:
            record = self._opener.decrypt(prefix, sealed)
        except NoiseError as error:
            raise ChannelClosed("the connection's bytes were altered on the way") from error
        if self._opener.n % REKEY_RECORDS == 0:
            self._opener.rekey()
        return record

    async def aclose(self) -> None:
        """Close at once; never blocks."""
        await trio.aclose_forcefully(self._stream)


def _write(socket: trio.socket.SocketType, data: Buffer) -> int:
    return os.write(socket.fileno(), data)


async def initiate(
    stream: HalfCloseableStream,
    credentials: Credentials,
    purpose: str,
    *,
    expected: PeerId | None = None,
    invite: Identity | None = None,
    authenticated: Callable[[Hello], None] = lambda hello: None,
    verdict_s: float = HANDSHAKE_S,
) -> tuple[SecureChannel, Verdict]:
    """Run the dialler's side; closes the stream unless it returns. Raises HandshakeError; Refused with the other's reason.

    `authenticated` is called between the responder's proof and our own: it may raise to call the whole thing off.
    `verdict_s`: seconds to wait for the responder's decision after that.
    """
    async with _guarded(stream):
        with _deadline(HANDSHAKE_S):
            source = _Input(stream)
            noise = _noise(credentials, initiator=True)
            await stream.send_all(_preamble() + _framed(noise.write_message()))
            await _read_preamble(source, stream)
            try:
                payload = noise.read_message(await _read_framed(source))
            except NoiseError as error:
                raise WrongGrid("the peer belongs to another grid") from error
            hello = credentials.read(payload, noise.remote_static)
            credentials.check_member(hello)
            if expected is not None and hello.id != expected:
                raise WrongPeer(f"another peer answers there: {hello.id.hex()[:10]}, not {expected.hex()[:10]}")
            if hello.public == credentials.identity.public:
                raise WrongPeer("this address is our own")
            authenticated(hello)
            await stream.send_all(_framed(noise.write_message(credentials.hello(purpose, invite))))
        with _deadline(verdict_s):
            channel = SecureChannel(stream, source, noise.split(), hello, initiator=True)
            verdict = codec.decode(await channel.receive(), Verdict)
            if verdict.code != Code.OK:
                raise Refused(verdict.code, verdict.text)
            return channel, verdict


async def respond(stream: HalfCloseableStream, credentials: Credentials) -> SecureChannel:
    """Run the listener's side; closes the stream unless it returns. Raises HandshakeError.

    The hello is authenticated but for membership: the caller checks that (or the invite), then sends a verdict.
    """
    async with _guarded(stream):
        with _deadline(HANDSHAKE_S):
            source = _Input(stream)
            noise = _noise(credentials, initiator=False)
            await _read_preamble(source, stream, answer=True)
            noise.read_message(await _read_framed(source))
            await stream.send_all(_preamble() + _framed(noise.write_message(credentials.hello(""))))
            payload = noise.read_message(await _read_framed(source))
            hello = credentials.read(payload, noise.remote_static)
            return SecureChannel(stream, source, noise.split(), hello, initiator=False)


def _noise(credentials: Credentials, *, initiator: bool) -> HandshakeState:
    return HandshakeState(
        initiator=initiator,
        prologue=_preamble() + credentials.grid,
        static=credentials.static,
        ephemeral=credentials.entropy(32),
    )


def _preamble() -> bytes:
    return _PREAMBLE.pack(MAGIC, PROTOCOL_VERSION)


def _framed(message: bytes) -> bytes:
    return _SHORT.pack(len(message)) + message


async def _read_preamble(source: _Input, stream: HalfCloseableStream, *, answer: bool = False) -> None:
    """Check the other end's preamble; a responder that must part over the version says its own first."""
    magic, theirs = _PREAMBLE.unpack(await source.exactly(_PREAMBLE.size))
    if magic != MAGIC:
        raise NotAPeer("what is there does not speak the grid's protocol")
    if theirs != PROTOCOL_VERSION:
        if answer:
            await stream.send_all(_preamble())
            await _drain(stream)
        raise VersionMismatch(theirs, PROTOCOL_VERSION)


async def _drain(stream: HalfCloseableStream) -> None:
    """Wait for the other end to close: to close before it read all we sent, with bytes unread, could reset both ways."""
    with trio.move_on_after(DRAIN_S):
        await stream.send_eof()
        for _ in range(DRAIN_READS_MAX):
            if not await stream.receive_some(RECEIVE_BUFFER_BYTES):
                return


async def _read_framed(source: _Input) -> bytes:
    (size,) = _SHORT.unpack(await source.exactly(_SHORT.size))
    if size > MESSAGE_BYTES_MAX:
        raise NotAPeer("a handshake message is too long")
    return bytes(await source.exactly(size))


@asynccontextmanager
async def _guarded(stream: HalfCloseableStream) -> AsyncIterator[None]:
    """Close the stream on any failure, and give every failure of the other end's making one type."""
    try:
        yield
    except BaseException as error:
        await trio.aclose_forcefully(stream)
        if isinstance(error, (NoiseError, codec.CodecError)):
            raise HandshakeError(f"the handshake failed: {error}") from error
        if isinstance(error, (*_LOST, ChannelClosed)):
            raise HandshakeError("the other end broke off the handshake") from error
        raise


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """`trio.fail_after` with our own error."""
    try:
        with trio.fail_after(seconds):
            yield
    except trio.TooSlowError:
        raise HandshakeTimeout(f"no answer within {seconds:g} s in the middle of the handshake") from None
