"""The control socket: both ends together, and the server against clients that misbehave."""

from __future__ import annotations

import logging
import os
import socket
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from grid import control
from grid.api import wire
from grid.api.client import REQUEST_BYTES_MAX, Client, ConnectionLost, ControlError, NoPeer, Request, encode
from grid.config import Home
from grid.control import Call, Control


class Server:
    """Handlers that do what their name says, and note what became of them."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self.entered = trio.Event()
        self.cancelled = trio.Event()
        self.finished = trio.Event()
        names = (
            "echo",
            "count",
            "refuse",
            "refuse_in_nursery",
            "crash",
            "hang",
            "early",
            "attach",
            "flood",
            "torn",
            "own_network",
        )
        self.handlers = {name: getattr(self, name) for name in names}

    async def echo(self, call: Call) -> Any:
        return call.params

    async def count(self, call: Call) -> Any:
        for i in range(call.params["n"]):
            await call.event("number", {"i": i}, b"x" * call.params.get("size", i))
        return "done"

    async def refuse(self, call: Call) -> Any:
        raise ControlError("no", "it can't be", "try another")

    async def refuse_in_nursery(self, call: Call) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.refuse, call)
            await trio.sleep_forever()

    async def crash(self, call: Call) -> None:
        raise ZeroDivisionError("oops")

    async def hang(self, call: Call) -> None:
        self.entered.set()
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            self.cancelled.set()
            raise

    async def early(self, call: Call) -> None:
        await call.reply("first")
        self.finished.set()

    async def attach(self, call: Call) -> None:
        stream = await call.takeover({"job": "ab"})
        while data := await stream.receive_some(100):
            await stream.send_all(data.upper())
        self.finished.set()

    async def flood(self, call: Call) -> None:
        self.entered.set()
        try:
            while True:
                await call.event("data", {}, bytes(1 << 20))
        except BaseException:
            self.cancelled.set()
            raise

    async def torn(self, call: Call) -> None:
        with trio.move_on_after(0.05):
            await self.flood(call)
        self.finished.set()
        await trio.sleep_forever()

    async def own_network(self, call: Call) -> None:
        raise trio.BrokenResourceError("another connection")


@pytest.fixture
async def server(tmp_path: Path, nursery: trio.Nursery) -> Server:
    home = Home.open(tmp_path / "home", create=True)
    found = Server(home)
    await nursery.start(Control(home).serve, found.handlers)
    return found


async def in_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    with trio.fail_after(10):
        return await trio.to_thread.run_sync(function, *arguments, abandon_on_cancel=True)


async def ask(server: Server, method: str, **params: Any) -> Any:
    def work() -> Any:
        with Client.open(server.home.path) as client:
            return client.call(method, **params)

    return await in_thread(work)


async def test_call(server: Server) -> None:
    assert await ask(server, "echo", a=1, b=[b"\0\xff", None, {"c": "ü"}]) == {"a": 1, "b": [b"\0\xff", None, {"c": "ü"}]}


async def test_stream_then_call_on_one_connection(server: Server) -> None:
    def work() -> Any:
        with Client.open(server.home.path) as client:
            stream = client.stream("count", n=4)
            events = list(stream)
            return events, stream.result, client.call("echo", x=1)

    events, result, echoed = await in_thread(work)
    assert events == [("number", {"i": i}, b"x" * i) for i in range(4)]
    assert result == "done"
    assert echoed == {"x": 1}


async def test_bodies_of_every_size_arrive_whole(server: Server) -> None:
    def work() -> list[int]:
        with Client.open(server.home.path) as client:
            sizes = []
            for size in (0, 1, control.RECEIVE_BYTES - 1, control.RECEIVE_BYTES, 3 << 20, wire.BODY_BYTES_MAX):
                sizes += [len(body) for _, _, body in client.stream("count", n=2, size=size)]
            return sizes

    sizes = await in_thread(work)
    assert sizes[::2] == [0, 1, control.RECEIVE_BYTES - 1, control.RECEIVE_BYTES, 3 << 20, wire.BODY_BYTES_MAX]


@pytest.mark.parametrize("method", ["refuse", "refuse_in_nursery"])
async def test_error_reaches_the_caller(server: Server, method: str) -> None:
    with pytest.raises(ControlError) as caught:
        await ask(server, method)
    assert (caught.value.code, caught.value.message, caught.value.hint) == ("no", "it can't be", "try another")


async def test_unknown_method(server: Server) -> None:
    with pytest.raises(ControlError, match="knows no 'nosuch'"):
        await ask(server, "nosuch")


@pytest.mark.parametrize("method", ["crash", "own_network"])
async def test_handler_fault_is_logged_and_harms_nobody(server: Server, method: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR), pytest.raises(ControlError, match="failed inside the peer") as caught:
        await ask(server, method)
    assert caught.value.code == "internal"
    assert caplog.records[0].exc_info is not None
    assert await ask(server, "echo", x=1) == {"x": 1}


async def test_disconnect_cancels_the_handler(server: Server) -> None:
    client = await in_thread(Client.open, server.home.path)
    client.stream("hang")
    with trio.fail_after(5):
        await server.entered.wait()
        client.close()
        await server.cancelled.wait()
    assert await ask(server, "echo", x=1) == {"x": 1}


async def test_reader_that_stops_holds_up_only_its_own_handler(server: Server) -> None:
    client = await in_thread(Client.open, server.home.path)
    client.stream("flood")
    with trio.fail_after(5):
        await server.entered.wait()
        assert await ask(server, "echo", x=1) == {"x": 1}
        client.close()
        await server.cancelled.wait()


async def test_event_cut_short_ends_the_connection(server: Server) -> None:
    client = await in_thread(Client.open, server.home.path)
    stream = client.stream("torn")
    with trio.fail_after(5):
        await server.finished.wait()

    def drain() -> None:
        for _ in stream:
            pass

    with pytest.raises(ConnectionLost):
        await in_thread(drain)
    client.close()


async def test_early_reply(server: Server) -> None:
    assert await ask(server, "early") == "first"
    with trio.fail_after(5):
        await server.finished.wait()


async def test_takeover(server: Server) -> None:
    def work() -> bytes:
        with Client.open(server.home.path).attach(name="x") as sock:
            sock.sendall(b"hello")
            answer = sock.recv(100)
            sock.shutdown(socket.SHUT_WR)
            assert sock.recv(100) == b""
            return answer

    assert await in_thread(work) == b"HELLO"
    assert server.finished.is_set()


async def test_peer_that_stops_loses_the_connection(tmp_path: Path) -> None:
    home = Home.open(tmp_path / "home", create=True)
    async with trio.open_nursery() as nursery:
        server = Server(home)
        path = await nursery.start(Control(home).serve, server.handlers)
        client = await in_thread(Client.open, home.path)
        stream = client.stream("hang")
        await server.entered.wait()
        nursery.cancel_scope.cancel()
    with pytest.raises(ConnectionLost):
        await in_thread(stream.finish)
    client.close()
    assert not await trio.Path(path).exists()


def test_no_peer(tmp_path: Path) -> None:
    with pytest.raises(NoPeer, match="has joined no grid"):
        Client.open(tmp_path)
    (tmp_path / "membership").touch()
    with pytest.raises(NoPeer, match="is not running"):
        Client.open(tmp_path)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "control.sock"))
    with pytest.raises(NoPeer, match="is not running"):
        Client.open(tmp_path)
    with pytest.raises(NoPeer):
        Client.open(tmp_path / ("x" * 200))


async def test_socket_left_by_a_killed_peer_is_replaced(tmp_path: Path, nursery: trio.Nursery) -> None:
    home = Home.open(tmp_path / "home", create=True)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(home.bind_path()))
    server = Server(home)
    path = await nursery.start(Control(home).serve, server.handlers)
    assert stat.S_IMODE((await trio.Path(path).stat()).st_mode) == 0o600
    assert await ask(server, "echo") == {}


async def raw(server: Server, data: bytes) -> bytes:
    """Send bytes, and return all that comes until the server hangs up."""
    async with await trio.open_unix_socket(str(server.home.path / "control.sock")) as stream:
        with trio.fail_after(10):
            await stream.send_all(data)
            received = b""
            while part := await stream.receive_some():
                received += part
            return received


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        struct.pack("<II", 5, 0) + b"\xc1\xc1\xc1\xc1\xc1",
        struct.pack("<II", 0xFFFFFFFF, 0),
        struct.pack("<II", 0, 0xFFFFFFFF),
        encode(Request(1, "echo"), 3) + b"abc",
        encode(Request(1, "hang")) * (control.REQUESTS_PER_CLIENT_MAX + 1),
    ],
    ids=["http", "no msgpack", "huge header", "huge body", "request with a body", "too many"],
)
async def test_garbage_ends_its_connection_with_a_word(server: Server, data: bytes) -> None:
    assert b"not a request this peer understands" in await raw(server, data)
    assert await ask(server, "echo", x=1) == {"x": 1}


async def test_request_over_the_bound(server: Server) -> None:
    with pytest.raises(ControlError, match="is over 1 MiB"):
        await ask(server, "echo", x=bytes(REQUEST_BYTES_MAX))
    assert b"the request is over 1 MiB" in await raw(server, struct.pack("<II", 3 << 20, 0) + bytes(2 << 20))
    assert await ask(server, "echo", x=1) == {"x": 1}


async def test_client_that_floods_and_hangs_up(server: Server) -> None:
    async with await trio.open_unix_socket(str(server.home.path / "control.sock")) as stream:
        await stream.send_all(encode(Request(1, "count", {"n": 2, "size": 1 << 20})))
    assert await ask(server, "echo", x=1) == {"x": 1}


async def test_clients_are_bounded(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "CLIENTS_MAX", 2)
    path = str(server.home.path / "control.sock")
    async with await trio.open_unix_socket(path) as one, await trio.open_unix_socket(path):
        await one.send_all(encode(Request(1, "echo")))  # its answer shows that both are served
        await one.receive_some()
        with pytest.raises(ControlError, match="already serves"):
            await ask(server, "hang")
    with trio.fail_after(5):
        while True:
            try:
                assert await ask(server, "echo", x=1) == {"x": 1}
                return
            except (ControlError, AssertionError):
                await trio.lowlevel.checkpoint()


async def test_other_users_are_not_served(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "_same_user", lambda sock: False)
    with pytest.raises(ControlError):
        await ask(server, "echo")


async def test_same_user_is_told_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = trio.socket.socketpair()
    with ours, theirs:
        assert control._same_user(ours)
        monkeypatch.setattr(os, "getuid", lambda: 12345)
        assert not control._same_user(ours)
