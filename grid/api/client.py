"""The client's end of the control socket: how commands and `grid.connect()` talk to the peer of this home.

A frame is wire.py's: `<II` lengths, a msgpack header (one message below), a body of raw bytes. One connection carries
requests one after the other; a stream's events come before its reply. Closing the connection cancels what it asked for.

Blocking sockets, standard library and msgspec only: a command's start-up time is its user's waiting time, and user
processes import this file.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import msgspec

from grid.api import wire

SOCKET_NAME = "control.sock"
POINTER_NAME = "control.path"
"""Where a home's path is too long for a socket address, this file in it names the socket."""
CONNECT_TIMEOUT_S = 5.0
"""Accepting on a local socket takes microseconds; a peer that is stopped (SIGSTOP) or wedged never does."""
ANSWER_TIMEOUT_S = 60.0
"""For `call`: methods that answer at once. What may take longer is a `stream`, which has no limit."""
REQUEST_BYTES_MAX = 1 << 20
"""What a request's params may take; large things are staged as files and named."""
RECEIVE_BYTES = 256 << 10


class ControlError(Exception):
    """An error meant for a person: `code` for programs, `message` says what is wrong, `hint` what to do (or "")."""

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint


class NoPeer(ControlError):
    """No peer answers in this home."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__("no-peer", message, hint)


class ConnectionLost(ControlError):
    """The peer went away before it answered."""

    def __init__(self, message: str = "this machine's peer went away before it answered") -> None:
        super().__init__("peer-lost", message, "start it again with: grid join -d")


class Error(msgspec.Struct, array_like=True, frozen=True):
    """A ControlError on the wire."""

    code: str
    message: str
    hint: str = ""


class Request(msgspec.Struct, array_like=True, frozen=True, tag=1):
    """Client → peer. Ids are the client's own and grow."""

    id: int
    method: str
    params: dict[str, Any] = {}


class Reply(msgspec.Struct, array_like=True, frozen=True, tag=2):
    """Peer → client: the last frame of a request."""

    id: int
    result: Any = None
    error: Error | None = None


class Event(msgspec.Struct, array_like=True, frozen=True, tag=3):
    """Peer → client, before the reply; the frame's body belongs to it."""

    id: int
    name: str
    data: dict[str, Any] = {}


FromPeer: TypeAlias = Reply | Event

_encoder = msgspec.msgpack.Encoder()
from_peer_decoder: msgspec.msgpack.Decoder[FromPeer] = msgspec.msgpack.Decoder(FromPeer)
request_decoder: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)


def encode(message: Request | Reply | Event, body_length: int = 0) -> bytes:
    """Return prefix and header of a frame; the caller sends `body_length` body bytes after it. Raises ValueError."""
    header = _encoder.encode(message)
    if len(header) > wire.HEADER_BYTES_MAX or body_length > wire.BODY_BYTES_MAX:
        raise ValueError(f"a frame of {len(header)} + {body_length} bytes is over the bound")
    return wire.PREFIX.pack(len(header), body_length) + header


def socket_path(home: str | os.PathLike[str]) -> str:
    """Return where the peer of this home listens: its own folder, or where the pointer file there says.

    A pointer is followed only to a socket that is ours: the folder it names is shared with other users.
    """
    folder = os.fspath(home)
    try:
        with open(os.path.join(folder, POINTER_NAME), encoding="utf-8") as file:
            path = file.read(4096).strip()
        if os.lstat(path).st_uid == os.getuid():
            return path
    except OSError:
        pass
    return os.path.join(folder, SOCKET_NAME)


class Client:
    """One connection to this home's peer."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._reader = wire.FrameReader(from_peer_decoder)
        self._frames: Iterator[tuple[Any, bytes]] = iter(())
        self._last_id = 0

    @classmethod
    def open(cls, home: str | os.PathLike[str]) -> Client:
        """Connect to the peer of the home at this path. Raises NoPeer."""
        path = socket_path(home)
        if len(os.fsencode(path)) > 100:
            raise NoPeer(f"no peer runs in {home}", "start it with: grid join -d")
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(CONNECT_TIMEOUT_S)
        try:
            if not stat.S_ISSOCK(os.stat(path).st_mode):
                raise ConnectionRefusedError
            connection.connect(path)
        except TimeoutError:
            connection.close()
            raise NoPeer(f"the peer in {home} does not answer", "is it stopped? look with: grid doctor") from None
        except PermissionError:
            connection.close()
            raise NoPeer(f"the home {home} is another user's", "set GRID_HOME to a folder of your own") from None
        except OSError:
            connection.close()
            known = os.path.exists(os.path.join(os.fspath(home), "membership"))
            if known:
                message = f"this machine's peer is not running (home {home})"
                raise NoPeer(message, "start it with: grid join -d") from None
            raise NoPeer(
                f"no peer runs here and this machine has joined no grid (home {home})",
                "join with: grid join INVITE, or found a grid with: grid join",
            ) from None
        connection.settimeout(None)
        return cls(connection)

    def call(self, method: str, /, **params: Any) -> Any:
        """Ask and return the result; events are dropped. Raises ControlError, ConnectionLost after a minute."""
        self._socket.settimeout(ANSWER_TIMEOUT_S)
        try:
            stream = self.stream(method, **params)
            for _ in stream:
                pass
        except TimeoutError:
            self.close()
            raise ConnectionLost(f"this machine's peer did not answer within {ANSWER_TIMEOUT_S:.0f} s") from None
        self._socket.settimeout(None)
        return stream.result

    def stream(self, method: str, /, **params: Any) -> Stream:
        """Ask and return the events to iterate, `(name, data, body)`; `.result` is the reply once they ended.

        To stop early, close the client: there is no other way to tell the peer.
        """
        self._last_id += 1
        self._send(Request(self._last_id, method, params))
        return Stream(self, self._last_id)

    def attach(self, **params: Any) -> socket.socket:
        """Ask to be a job's driver; the returned socket speaks wire.py's protocol, and this client is spent."""
        self.call("attach", **params)
        return self.detach()

    def detach(self) -> socket.socket:
        """Give up the socket to the caller."""
        return socket.socket(fileno=self._socket.detach())

    def close(self) -> None:
        """Disconnect; what was asked and not answered is cancelled. May be called twice."""
        self._socket.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, request: Request) -> None:
        frame = encode(request)
        if len(frame) > REQUEST_BYTES_MAX:
            message = f"the request {request.method!r} is over {REQUEST_BYTES_MAX >> 20} MiB"
            raise ControlError("too-large", message, "are its arguments that long?")
        try:
            self._socket.sendall(frame)
        except TimeoutError:
            raise
        except OSError:
            pass  # a peer that hung up may have said why: `receive` finds its word, or that it is gone

    def receive(self) -> tuple[FromPeer, bytes]:
        """Return the next frame. Raises ConnectionLost, TimeoutError."""
        while True:
            frame = next(self._frames, None)
            if frame is not None:
                return frame
            try:
                data = self._socket.recv(RECEIVE_BYTES)
            except TimeoutError:
                raise
            except OSError:
                raise ConnectionLost from None
            if not data:
                raise ConnectionLost
            self._frames = self._checked(data)

    def _checked(self, data: bytes) -> Iterator[tuple[Any, bytes]]:
        try:
            yield from self._reader.feed(data)
        except wire.WireError as error:
            raise ConnectionLost(f"this machine's peer speaks another control protocol ({error})") from None


class Stream:
    """The events of one request, then its result."""

    def __init__(self, client: Client, id_: int) -> None:
        self._client = client
        self._id = id_
        self._ended = False
        self.result: Any = None

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> tuple[str, dict[str, Any], bytes]:
        if self._ended:
            raise StopIteration
        while True:
            message, body = self._client.receive()
            if message.id not in (self._id, 0):  # 0: about the connection as a whole
                continue
            if isinstance(message, Event):
                return message.name, message.data, body
            self._ended = True
            if message.error is not None:
                error = message.error
                raise ControlError(error.code, error.message, error.hint)
            self.result = message.result
            raise StopIteration

    def finish(self) -> Any:
        """Drop the events that are left and return the result."""
        for _ in self:
            pass
        return self.result


def home_folder(path: str | os.PathLike[str] | None = None) -> Path:
    """Return this user's home folder on this machine: `path`, else $GRID_HOME, else STATE/peergrid/<machine id>."""
    chosen = os.fspath(path) if path else os.environ.get("GRID_HOME", "")
    if chosen:
        return Path(os.path.abspath(os.path.expanduser(chosen)))
    import platformdirs

    return Path(platformdirs.user_state_dir("peergrid")) / machine_id()


def machine_id() -> str:
    """Return a name of this machine that outlives a reboot: /etc/machine-id, else a hash of host name and card."""
    for name in ("/etc/machine-id", "/var/lib/dbus/machine-id"):
        try:
            with open(name, encoding="ascii") as file:
                text = file.read(64).strip()
        except (OSError, UnicodeError):
            continue
        if len(text) == 32 and text.isalnum():
            return text
    import hashlib
    import uuid

    card = uuid.getnode()
    stable_card = "" if card >> 40 & 1 else f"{card:x}"  # the multicast bit marks a number that getnode made up
    return hashlib.blake2b(f"{socket.gethostname()}/{stable_card}".encode(), digest_size=16).hexdigest()
