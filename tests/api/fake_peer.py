"""A deliberately naive peer in a thread: speaks wire.py over a socketpair and runs every task itself, in order.

It knows nothing of bundles, leases or other peers, so what it computes is what a real one must compute.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import socket
import threading
import traceback
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grid.api import serialize, session, wire
from grid.api.channel import Channel, ChannelClosed


class FakePeer:
    """Set the attributes before attaching; `gate` holds tasks back, `release` lets them run."""

    def __init__(self, folder: Path, role: str = "driver", **setup: Any) -> None:
        ours, theirs = socket.socketpair()
        self.spool = folder / "spool"
        self.blobs = folder / "blobs"
        for path in (self.spool, self.blobs):
            path.mkdir(parents=True, exist_ok=True)
        self.results_each = 1000
        """Tasks answered in one Result."""
        self.window_bytes = 1 << 20
        self.results_as_files = False
        self.script_folder = str(folder)
        self.child = Channel(theirs)
        self.setup = wire.Setup(role, "a" * 32, "test", "b" * 40, 7, "", (), "", str(self.spool), **setup)
        self.received: list[Any] = []
        self.pages: list[wire.Page] = []
        self.segments: list[tuple[int, int, bytes]] = []
        """(stage, tasks, bytes) of each, as it came."""
        self.cancelled: dict[int, set[int] | None] = {}
        self.frames = threading.Condition()
        self.release = threading.Event()
        self.release.set()
        self.inputs: dict[str, bytes] = {}
        self.manifest: list[Any] = []
        self.fail_next: list[wire.Failure] = []
        self._channel = Channel(ours, wire.from_child_decoder)
        self._functions: dict[int, Any] = {}
        self._stages: dict[int, wire.Stage] = {}
        self._work: deque[tuple[int, int, Any, int]] = deque()
        self._unacknowledged: dict[int, int] = {}
        self._closed = False
        self._threads = [
            threading.Thread(target=self._guard, args=(self._read,), daemon=True),
            threading.Thread(target=self._guard, args=(self._run,), daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def post(self, message: wire.Message, *body: Any) -> None:
        """Send a frame to the child."""
        self._channel.send(message, *body)

    def wait_for(self, predicate: Any, timeout_s: float = 20.0) -> None:
        """Wait until `predicate()` holds, looking after each frame."""
        with self.frames:
            assert self.frames.wait_for(predicate, timeout_s), f"never came true; received {self.received[-20:]}"

    def of(self, kind: type) -> list[Any]:
        """Messages of this kind received so far."""
        return [message for message in self.received if type(message) is kind]

    def close(self) -> None:
        """Stop both threads."""
        self._closed = True
        self.release.set()
        self._channel.close()
        with self.frames:
            self.frames.notify_all()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()

    def _guard(self, work: Any) -> None:
        with contextlib.suppress(ChannelClosed):
            work()

    def _read(self) -> None:
        while True:
            message, body = self._channel.receive()
            self._take(message, body)
            with self.frames:
                self.received.append(message)
                self.frames.notify_all()

    def _take(self, message: Any, body: Any) -> None:
        match message:
            case wire.Define(fn, _):
                self._functions[fn] = bytes(body)
            case wire.Stage():
                self._stages[message.stage] = message
            case wire.Page():
                self._page(message, body)
            case wire.Cancel(stage, lo, hi):
                if hi < 0:
                    self.cancelled[stage] = None
                elif self.cancelled.get(stage, ()) is not None:
                    self.cancelled.setdefault(stage, set()).update(range(lo, hi))  # type: ignore[union-attr]
                self.post(wire.Cancelled(stage, lo, hi))
            case wire.Consumed(stage, size):
                with self.frames:
                    self._unacknowledged[stage] = self._unacknowledged.get(stage, 0) - size
                    assert self._unacknowledged[stage] >= 0, "credit for more than was sent"
                    self.frames.notify_all()
            case wire.Put(id_, path):
                data = Path(path).read_bytes() if path else bytes(body)
                name = hashlib.blake2b(data, digest_size=32).hexdigest()
                (self.blobs / name).write_bytes(data)
                if path:
                    os.unlink(path)
                self.post(wire.Reply(id_, text=name))
            case wire.Fetch(id_, ref, size):
                known = self.blobs / ref
                assert known.stat().st_size == size
                self.post(wire.Reply(id_, path=str(known)))
            case wire.ListInputs(id_):
                import json

                path = self.spool / "manifest.json"
                path.write_text(json.dumps(self.manifest))
                self.post(wire.Reply(id_, path=str(path)))
            case wire.OpenInput(id_, name):
                if name not in self.inputs:
                    self.post(wire.Reply(id_, error=f"no input file is called {name}"))
                    return
                path = self.spool / ("input-" + name.replace("/", "_"))
                path.write_bytes(self.inputs[name])
                self.post(wire.Reply(id_, path=str(path)))

    def _page(self, page: wire.Page, body: Any) -> None:
        data = Path(page.path).read_bytes() if page.path else bytes(body)
        if page.shared:
            self.post(wire.Released(page.path, True))
        elif page.path:
            os.unlink(page.path)
        assert sum(page.lengths) == len(data)
        assert len(page.counts) == len(page.lengths)
        self.pages.append(page)
        offset, first = 0, page.first
        for count, length in zip(page.counts, page.lengths, strict=True):
            self._work.append((page.stage, first, data[offset : offset + length], count))
            self.segments.append((page.stage, count, data[offset : offset + length]))
            offset += length
            first += count

    def _run(self) -> None:
        while not self._closed:
            with self.frames:
                self.frames.wait_for(lambda: (self._work and self.release.is_set()) or self._closed, 0.05)
            if self._closed or not self._work or not self.release.is_set():
                continue
            self._segment(*self._work.popleft())

    def _dropped(self, stage: int, index: int) -> bool:
        dropped = self.cancelled.get(stage, set())
        return dropped is None or index in dropped

    def _segment(self, number: int, first: int, data: bytes, count: int) -> None:
        stage = self._stages[number]
        function = serialize.load_function(self._functions[stage.fn])
        segment = serialize.load_segment(bytearray(data))
        assert len(segment.items) == count
        call = segment.bind(function)
        writer, lo = serialize.ResultWriter(), first
        for index, item in enumerate(segment.items, first):
            if self._dropped(number, index):
                self._send(number, lo, writer)
                writer, lo = serialize.ResultWriter(), index + 1
                continue
            try:
                serialize.set_namespace(f"task/{number}/{index}")
                writer.add(call(item))
            except BaseException as error:
                self._send(number, lo, writer)
                writer, lo = serialize.ResultWriter(), index + 1
                text = "".join(traceback.format_exception(error))
                failure = wire.Failure(number, index, "raised", type(error).__name__, str(error), text)
                self.post(failure, serialize.dump_exception(error))
                continue
            if writer.count >= self.results_each:
                self._send(number, lo, writer)
                writer, lo = serialize.ResultWriter(), index + 1
        self._send(number, lo, writer)

    def _send(self, number: int, lo: int, writer: serialize.ResultWriter) -> None:
        count = writer.count
        if not count or self.cancelled.get(number, ()) is None:
            return
        parts, size = writer.finish()
        with self.frames:
            self.frames.wait_for(
                lambda: (
                    self._unacknowledged.get(number, 0) < self.window_bytes
                    or self._closed
                    or self.cancelled.get(number, ()) is None
                )
            )
            self._unacknowledged[number] = self._unacknowledged.get(number, 0) + size
        if size > wire.INLINE_BYTES_MAX or self.results_as_files:
            path = self.spool / f"result-{number}-{lo}"
            path.write_bytes(b"".join(bytes(part) for part in parts))
            self.post(wire.Result(number, lo, lo + count, str(path)))
        else:
            self.post(wire.Result(number, lo, lo + count), *parts)


@contextlib.contextmanager
def driving(folder: Path, **setup: Any) -> Iterator[FakePeer]:
    """A fake peer, and this process as its driver."""
    peer = FakePeer(folder, **setup)
    current = session.attach(peer.child, peer.setup)
    try:
        yield peer
    finally:
        peer.close()
        current.close()
        session.detach()
        serialize.set_namespace("")
        shutil.rmtree(folder, ignore_errors=True)
