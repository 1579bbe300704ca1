"""The control socket: a Unix socket in the peer's home where this user's commands ask their peer for things.

The server's end of grid/api/client.py. Rules:

- only this machine's user who runs the peer is served (the folder's mode, and the kernel's word on who connects);
- a client that disconnects cancels what it asked for: handlers run in a nursery of their connection;
- a slow reader holds up its own handler (`await call.event`), nothing else; frames, clients and requests are bounded;
- a handler that fails harms only its caller: ControlError is the caller's one line, anything else is logged here.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import stat
import struct
import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import trio

from grid.api import wire
from grid.api.client import REQUEST_BYTES_MAX, ControlError, Error, Event, Reply, Request, encode, request_decoder
from grid.config import ConfigError, Home

CLIENTS_MAX = 64
"""Commands of one user at once; each may hold a frame in memory."""
REQUESTS_PER_CLIENT_MAX = 16
"""Requests a client may have open; the commands have one."""
DISMISS_TIMEOUT_S = 1.0
"""For a client to read why it is sent away; one of ours takes microseconds."""
RECEIVE_BYTES = 64 << 10

Handler = Callable[["Call"], Awaitable[Any]]
logger = logging.getLogger(__name__)


class Call:
    """One request being served. A handler's return value (plain data) is the reply, unless `reply` was called."""

    def __init__(self, client: _Client, request: Request) -> None:
        self._client = client
        self._id = request.id
        self._answered = False
        self.method = request.method
        self.params: dict[str, Any] = request.params

    async def event(self, name: str, data: Mapping[str, Any] | None = None, body: bytes = b"") -> None:
        """Send an event; return once the kernel took it. A body is at most wire.BODY_BYTES_MAX (16 MiB): cut larger."""
        assert not self._answered, "events come before the reply"
        await self._client.send(Event(self._id, name, dict(data or {})), body)

    async def reply(self, result: Any = None) -> None:
        """Answer now and go on, for a handler whose next act ends the peer."""
        assert not self._answered, "one reply a request"
        self._answered = True
        await self._client.send(Reply(self._id, result))

    async def takeover(self, result: Any = None) -> trio.SocketStream:
        """Answer, and take the connection, for the handler alone to read and write. Closed when the handler returns."""
        self._answered = True
        return await self._client.takeover(Reply(self._id, result))

    async def fail(self, error: ControlError) -> None:
        """Answer with an error, unless there was an answer."""
        if not self._answered:
            self._answered = True
            await self._client.send(Reply(self._id, None, Error(error.code, error.message, error.hint)))

    async def finish(self, result: Any) -> None:
        """Answer with the handler's return value, unless there was an answer."""
        if not self._answered:
            await self.reply(result)


class _Client:
    """One connection: reads requests, runs each in its nursery, sends frames whole."""

    def __init__(self, stream: trio.SocketStream, handlers: Mapping[str, Handler]) -> None:
        self._stream = stream
        self._handlers = handlers
        self._sending = trio.Lock()
        self._reader = wire.FrameReader(request_decoder)
        self._reading = trio.CancelScope()
        self._stopped_reading = trio.Event()
        self._buffered_bytes = 0
        self._gone = False
        self._taken = False
        self._open_requests = 0

    async def serve(self) -> None:
        """Serve until the client disconnects or breaks the protocol."""
        async with self._stream, trio.open_nursery() as nursery:
            with self._reading, contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                await self._read(nursery)
            self._stopped_reading.set()
            if not self._taken:
                nursery.cancel_scope.cancel()

    async def _read(self, nursery: trio.Nursery) -> None:
        while data := await self._stream.receive_some(RECEIVE_BYTES):
            self._buffered_bytes += len(data)
            try:
                for request, body in self._reader.feed(data):
                    self._buffered_bytes = 0
                    if body or self._open_requests >= REQUESTS_PER_CLIENT_MAX:
                        raise wire.WireError("too many requests at once, or a request with a body")
                    self._open_requests += 1
                    nursery.start_soon(self._run, Call(self, request), nursery.cancel_scope)
                if self._buffered_bytes > REQUEST_BYTES_MAX:
                    raise wire.WireError(f"the request is over {REQUEST_BYTES_MAX >> 20} MiB")
            except wire.WireError as error:
                await _dismiss(self._stream, Error("protocol", f"not a request this peer understands: {error}"))
                return

    async def _run(self, call: Call, connection: trio.CancelScope) -> None:
        try:
            await call.finish(await self._handler(call.method)(call))
        except Exception as error:  # a fault in one command's handler must not end the peer
            if not self._gone:
                with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    await call.fail(_for_people(call.method, error))
        finally:
            self._open_requests -= 1
            if self._gone:
                connection.cancel()

    def _handler(self, method: str) -> Handler:
        handler = self._handlers.get(method)
        if handler is None:
            hint = "is it another version than this command? restart it: grid leave, grid join -d"
            raise ControlError("unknown-method", f"this machine's peer knows no {method!r}", hint)
        return handler

    async def send(self, message: Reply | Event, body: bytes = b"") -> None:
        """Send one frame whole; cancelled half-way the connection ends, for what follows would be garbage."""
        frame = encode(message, len(body))
        async with self._sending:
            try:
                await self._stream.send_all(frame + body if len(body) < RECEIVE_BYTES else frame)
                if len(body) >= RECEIVE_BYTES:
                    await self._stream.send_all(body)
            except BaseException:
                self._gone = True
                self._stream.socket.close()
                raise

    async def takeover(self, reply: Reply) -> trio.SocketStream:
        """Stop reading requests, send the reply and hand the stream out."""
        self._taken = True
        self._reading.cancel()
        await self._stopped_reading.wait()
        await self.send(reply)
        return self._stream


class Control:
    """The server. The home must be locked by this process: a socket found there is a dead peer's and is replaced."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._clients = 0

    async def serve(
        self, handlers: Mapping[str, Handler], *, task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Serve until cancelled; started with the socket's path. Raises ConfigError if it can't be bound."""
        path = os.fspath(self._home.bind_path())
        listener = _listen(path)
        try:
            async with trio.open_nursery() as nursery:
                serve = self._connection(handlers)
                await nursery.start(trio.serve_listeners, serve, [listener])
                task_status.started(path)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(path)

    def _connection(self, handlers: Mapping[str, Handler]) -> Callable[[trio.SocketStream], Awaitable[None]]:
        async def serve(stream: trio.SocketStream) -> None:
            refusal = None
            if not _same_user(stream.socket):
                refusal = Error("foreign-user", "this peer serves only the user who runs it")
            elif self._clients >= CLIENTS_MAX:
                refusal = Error("busy", f"this machine's peer already serves {CLIENTS_MAX} commands", "end some of them")
            if refusal is not None:
                await _dismiss(stream, refusal)
                return
            self._clients += 1
            try:
                await _Client(stream, handlers).serve()
            finally:
                self._clients -= 1

        return serve


async def _dismiss(stream: trio.SocketStream, error: Error) -> None:
    """Say why, and close. What the client still sends is read first: closing over unread bytes would destroy the answer."""
    with trio.move_on_after(DISMISS_TIMEOUT_S), contextlib.suppress(trio.BrokenResourceError, trio.BusyResourceError):
        await stream.send_all(encode(Reply(0, None, error)))
        await stream.send_eof()
        while await stream.receive_some(RECEIVE_BYTES):
            pass
    await trio.aclose_forcefully(stream)


def _for_people(method: str, error: BaseException) -> ControlError:
    """Return what the caller is told. A handler's nursery may have wrapped its ControlError in a group."""
    found = error
    while isinstance(found, BaseExceptionGroup) and len(found.exceptions) == 1:
        found = found.exceptions[0]
    if isinstance(found, ControlError):
        return found
    logger.error("the handler of %r failed", method, exc_info=error)
    return ControlError("internal", f"{method} failed inside the peer: {type(found).__name__}: {found}", "see its log")


def _listen(path: str) -> trio.SocketListener:
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(os.lstat(path).st_mode):
            os.unlink(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(path)
        os.chmod(path, 0o600)
        sock.listen(CLIENTS_MAX)
    except OSError as error:
        sock.close()
        message = f"can't open the control socket {path}: {error.strerror}"
        raise ConfigError("home-unusable", message, "set GRID_HOME to a folder on a local disk") from None
    return trio.SocketListener(trio.socket.from_stdlib_socket(sock))


def _same_user(sock: trio.socket.SocketType) -> bool:
    """Whether the process at the other end is this user's. Where the kernel doesn't tell, the folder's mode guards."""
    if sys.platform != "linux":
        return True
    _pid, uid, _gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return bool(uid == os.getuid())
