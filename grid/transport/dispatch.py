"""What frames from a peer lead to: messages to the handler in order, requests beside them, answers to those who wait."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import trio

from dht.core import codec
from dht.core.identity import PeerId
from grid.transport.errors import ChannelClosed, PeerUnreachable, RemoteError, TransportError
from grid.transport.handler import MeshHandler
from grid.transport.limits import MESSAGE_BYTES_MAX, REQUESTS_WAITING_MAX
from grid.transport.link import Link
from grid.transport.outbox import CANCEL, ERROR, MESSAGE, REPLY, REQUEST, SERVE_ME, Frame
from grid.transport.remote import Remote, Up

log = logging.getLogger(__name__)


class Dispatch:
    """Serves all peers of one mesh."""

    def __init__(
        self,
        handler: MeshHandler,
        counters: Counter[str],
        spawn: Callable[..., Any],
        lose: Callable[[Remote, Link, str], None],
        serve_back: Callable[[Remote], None],
    ) -> None:
        """spawn(function, *arguments) starts a task in the mesh; lose(remote, link, why) closes a connection."""
        self._handler = handler
        self._counters = counters
        self._spawn = spawn
        self._lose = lose
        self._serve_back = serve_back

    async def on_frame(self, remote: Remote, link: Link, frame: Frame) -> None:
        payload = bytes(frame.payload)
        if frame.kind == MESSAGE:
            await remote.inbox.room()
            remote.inbox.push(payload)
            self.pump_soon(remote)
        elif frame.kind == REQUEST:
            if len(link.running) < REQUESTS_WAITING_MAX and frame.id not in link.running:
                scope = link.running[frame.id] = trio.CancelScope()
                link.nursery.start_soon(self._answer, remote, link, frame.id, payload, scope)
            else:
                remote.outbox.offer(_error(frame.id, "busy", "the peer has too many requests: try again later"))
        elif frame.kind in (REPLY, ERROR):
            pending = remote.pending.pop(frame.id, None)
            if pending is not None and frame.kind == REPLY:
                pending.resolve(payload)
            elif pending is not None:
                pending.fail(_remote_error(payload))
        elif frame.kind == CANCEL:
            if frame.id in link.running:
                link.running[frame.id].cancel()
        elif frame.kind == SERVE_ME:
            self._serve_back(remote)
        else:
            raise ChannelClosed("the other end broke the frame format")

    def pump_soon(self, remote: Remote) -> None:
        """Something was pushed into the inbox."""
        if not remote.inbox.pumping:
            remote.inbox.pumping = True
            self._spawn(self._pump, remote)

    async def _pump(self, remote: Remote) -> None:
        """Hand over what arrived, in order, until there is nothing more."""
        try:
            while (event := remote.inbox.pop()) is not None:
                try:
                    if isinstance(event, bytes):
                        await self._handler.on_message(remote.id, event)
                    elif isinstance(event, Up):
                        await self._handler.on_up(remote.id, event.hello)
                        event.link.announced.set()
                    else:
                        await self._handler.on_down(remote.id, event.why)
                except Exception:
                    self.fault(remote.id)
                    if remote.link is not None:
                        self._lose(remote, remote.link, "this peer failed on a message of it")
        finally:
            remote.inbox.pumping = False

    async def _answer(self, remote: Remote, link: Link, number: int, message: bytes, scope: trio.CancelScope) -> None:
        try:
            with scope:
                try:
                    remote.slots.acquire_nowait()
                except trio.WouldBlock:
                    await remote.slots.acquire()
                try:
                    if not link.announced.is_set():
                        await link.announced.wait()
                    frame = await self._handled(remote, number, message)
                finally:
                    remote.slots.release()
                if link.active:
                    await remote.outbox.put(frame)
        except PeerUnreachable:
            pass  # the queue was given up: so is the answer
        finally:
            del link.running[number]

    async def _handled(self, remote: Remote, number: int, message: bytes) -> Frame:
        try:
            answer = await self._handler.on_request(remote.id, message)
            check_size(answer)
            return Frame(REPLY, number, answer)
        except RemoteError as error:
            return _error(number, error.code, error.text)
        except TransportError as error:
            return _error(number, "unreachable", str(error))
        except Exception as error:
            self.fault(remote.id)
            return _error(number, "internal", f"the peer failed on this request: {type(error).__name__}")

    def fault(self, peer: PeerId) -> None:
        """Count and log the exception being handled: ours, on what this peer sent."""
        self._counters["handler_faults"] += 1
        log.exception("the handler failed on what peer %s sent", peer.hex()[:10])


def check_size(message: bytes) -> None:
    if len(message) > MESSAGE_BYTES_MAX:
        raise ValueError(f"a message of {len(message)} bytes: at most {MESSAGE_BYTES_MAX} are allowed, use a blob")


def _error(number: int, code: str, text: str) -> Frame:
    return Frame(ERROR, number, codec.encode((code, text[:1000])))


def _remote_error(payload: bytes) -> RemoteError:
    try:
        code, text = codec.decode(payload, tuple[str, str])
    except codec.CodecError:
        code, text = "garbled", "the peer's error can't be read"
    return RemoteError(code, text)
