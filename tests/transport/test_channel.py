"""Handshake and records: what passes, and how everything else is refused."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from dht.core import codec
from dht.core.identity import PeerId
from grid.transport import channel as channel_module
from grid.transport.channel import MAGIC, SecureChannel, initiate, respond
from grid.transport.errors import (
    ChannelClosed,
    HandshakeError,
    HandshakeTimeout,
    NotAMember,
    NotAPeer,
    Refused,
    VersionMismatch,
    WrongGrid,
    WrongPeer,
)
from grid.transport.hello import PEER, Code, Credentials, Hello, HelloInfo, Verdict
from grid.transport.limits import HANDSHAKE_S, PROTOCOL_VERSION, RECORD_BYTES_MAX
from tests.transport.support import NOW_S, Grid, World, identity

Outcome = tuple[SecureChannel | Exception, SecureChannel | Exception]


async def caught(call: Callable[[], Any]) -> Any:
    try:
        return await call()
    except HandshakeError as error:
        return error


async def meet(one: Credentials, two: Credentials, verdict: Verdict | None = None, **options: Any) -> Outcome:
    """Both ends' result: a channel, or the error that ended their handshake."""
    near, far = trio.testing.memory_stream_pair()
    ends: dict[str, Any] = {}

    async def dialler() -> None:
        found = await caught(lambda: initiate(near, one, PEER, **options))
        ends["dialler"] = found[0] if isinstance(found, tuple) else found

    async def listener() -> None:
        ends["listener"] = found = await caught(lambda: respond(far, two))
        if isinstance(found, SecureChannel):
            await found.send(codec.encode(verdict or Verdict(Code.OK)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(dialler)
        nursery.start_soon(listener)
    return ends["dialler"], ends["listener"]


async def pair(grid: Grid) -> tuple[SecureChannel, SecureChannel]:
    one, two = await meet(grid.credentials(1), grid.credentials(2))
    assert isinstance(one, SecureChannel)
    assert isinstance(two, SecureChannel)
    return one, two


@asynccontextmanager
async def connection(world: World) -> AsyncIterator[tuple[trio.abc.HalfCloseableStream, trio.abc.HalfCloseableStream]]:
    """Both raw ends of a connection of this world."""
    listener = await world.network("b").listen_stream(world.any_port("b"))
    near = await world.network("a").open_stream(listener.address)
    far, _ = await listener.accept()
    async with near, far:
        yield near, far
    await listener.aclose()


async def test_members_meet(grid: Grid) -> None:
    one, two = await pair(grid)
    assert one.peer == identity(2).id
    assert two.peer == identity(1).id
    assert (one.hello.name, two.hello.name) == ("peer-2", "peer-1")
    assert (one.hello.purpose, two.hello.purpose) == ("", PEER)


async def test_records_of_all_sizes(clock: Any, world: World, grid: Grid) -> None:
    sizes = [0, 1, 255, 65_515, 65_516, 65_517, 131_072, RECORD_BYTES_MAX]
    async with connection(world) as (near, far), trio.open_nursery() as nursery:
        with trio.fail_after(20):

            async def serve() -> None:
                channel = await respond(far, grid.credentials(2))
                await channel.send(codec.encode(Verdict(Code.OK)))
                for _ in sizes:
                    record = await channel.receive()
                    await channel.send(record, b"and", record[:10])

            nursery.start_soon(serve)
            channel, _ = await initiate(near, grid.credentials(1), PEER)
            for size in sizes:
                record = bytes(range(256)) * (size // 256) + bytes(size % 256)
                await channel.send(record)
                assert await channel.receive() == record
                assert await channel.receive() == b"and"
                assert await channel.receive() == record[:10]
            with pytest.raises(ValueError, match="at most"):
                await channel.send(bytes(RECORD_BYTES_MAX + 1))


async def test_other_grid(grid: Grid) -> None:
    one, two = await meet(grid.credentials(1), Grid(root=2000).credentials(2))
    assert isinstance(one, WrongGrid)
    assert str(one) == "the peer belongs to another grid"
    assert isinstance(two, HandshakeError)


async def test_responder_expired(grid: Grid) -> None:
    old = grid.member(2, lifetime_s=100)
    one, two = await meet(grid.credentials(1, NOW_S + 100), grid.credentials(2, chain=lambda: old.chain))
    assert isinstance(one, NotAMember)
    assert "expired" in str(one)
    assert "broke off" in str(two)


async def test_dialler_shows_nothing_to_a_stranger(clock: Any, world: World, grid: Grid) -> None:
    """Up to the responder's proof the dialler has sent its preamble and a bare ephemeral key."""
    stranger = Grid(root=2000).credentials(2)
    async with connection(world) as (near, far), trio.open_nursery() as nursery:
        received = bytearray()

        async def listen() -> None:
            await caught(lambda: respond(Tapped(far, received), stranger))  # type: ignore[arg-type]

        nursery.start_soon(listen)
        with pytest.raises(WrongGrid):
            await initiate(near, grid.credentials(1), PEER)
    assert len(received) == 10 + 2 + 32


class Tapped:
    """A stream that copies what is received."""

    def __init__(self, stream: Any, copy: bytearray) -> None:
        self._stream, self._copy = stream, copy

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    async def receive_some(self, size: int) -> bytes:
        data: bytes = await self._stream.receive_some(size)
        self._copy += data
        return data


trio.abc.AsyncResource.register(Tapped)


async def test_dialler_wants_another_peer(grid: Grid) -> None:
    one, _ = await meet(grid.credentials(1), grid.credentials(2), expected=identity(3).id)
    assert isinstance(one, WrongPeer)
    found, _ = await meet(grid.credentials(1), grid.credentials(2), expected=PeerId(identity(2).id))
    assert isinstance(found, SecureChannel)


async def test_own_address(grid: Grid) -> None:
    one, _ = await meet(grid.credentials(1), grid.credentials(1))
    assert isinstance(one, WrongPeer)
    assert "our own" in str(one)


async def test_someone_elses_certificate(grid: Grid) -> None:
    one, _ = await meet(grid.credentials(1), grid.credentials(2, chain=lambda: grid.member(3).chain))
    assert isinstance(one, NotAMember)


async def test_key_not_held(grid: Grid) -> None:
    """A member's public hello, replayed by one who lacks its keys, is worth nothing."""
    thief = grid.credentials(2)
    victim = grid.credentials(3)
    thief._signature = victim._signature
    one, _ = await meet(grid.credentials(1), thief)
    assert isinstance(one, HandshakeError)
    assert "does not hold the key" in str(one)


async def test_hello_too_long(grid: Grid) -> None:
    _, two = await meet(grid.credentials(1), grid.credentials(2, describe=lambda: HelloInfo(info=bytes(40_000))))
    assert "at most" in str(two)


async def test_refusal_reaches_the_dialler(grid: Grid) -> None:
    one, _ = await meet(grid.credentials(1), grid.credentials(2), Verdict(Code.FULL, "come back later"))
    assert isinstance(one, Refused)
    assert (one.code, one.text) == (Code.FULL, "come back later")


async def test_another_version_dials_us(clock: Any, world: World, grid: Grid) -> None:
    async with connection(world) as (near, far), trio.open_nursery() as nursery:

        async def old_peer() -> None:
            await near.send_all(struct.pack(">8sH", MAGIC, 9) + b"\0\x20" + bytes(32))
            answer = b""
            while data := await near.receive_some(100):
                answer += data
            assert answer == struct.pack(">8sH", MAGIC, PROTOCOL_VERSION)  # it can tell too, and nothing else was said
            await near.aclose()

        nursery.start_soon(old_peer)
        with pytest.raises(VersionMismatch, match="update peergrid here") as caught_error:
            await respond(far, grid.credentials(2))
    assert (caught_error.value.theirs, caught_error.value.ours) == (9, PROTOCOL_VERSION)


async def test_we_dial_another_version(clock: Any, world: World, grid: Grid) -> None:
    async with connection(world) as (near, far):
        await far.send_all(struct.pack(">8sH", MAGIC, 0))
        with pytest.raises(VersionMismatch, match="update peergrid there"):
            await initiate(near, grid.credentials(1), PEER)


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n\r\n", bytes(100), b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"])
async def test_garbage(clock: Any, world: World, grid: Grid, garbage: bytes) -> None:
    async with connection(world) as (near, far):
        await near.send_all(garbage)
        with pytest.raises(NotAPeer):
            await respond(far, grid.credentials(2))
        other_near, other_far = trio.testing.memory_stream_pair()
        await other_far.send_all(garbage)
        with pytest.raises(NotAPeer):
            await initiate(other_near, grid.credentials(1), PEER)


async def test_garbage_behind_a_good_preamble(clock: Any, world: World, grid: Grid) -> None:
    async with connection(world) as (near, far):
        await near.send_all(struct.pack(">8sH", MAGIC, PROTOCOL_VERSION) + b"\0\x05hello")
        with pytest.raises(HandshakeError, match="cut short"):
            await respond(far, grid.credentials(2))


@pytest.mark.parametrize("sent", [b"", MAGIC[:3], struct.pack(">8sH", MAGIC, PROTOCOL_VERSION) + b"\0"])
async def test_half_open_times_out(autojump_clock: Any, grid: Grid, sent: bytes) -> None:
    near, far = trio.testing.memory_stream_pair()
    await near.send_all(sent)
    start = trio.current_time()
    with pytest.raises(HandshakeTimeout):
        await respond(far, grid.credentials(2))
    assert trio.current_time() - start == pytest.approx(HANDSHAKE_S)
    start = trio.current_time()
    with pytest.raises(HandshakeTimeout):
        await initiate(trio.testing.memory_stream_pair()[0], grid.credentials(1), PEER)
    assert trio.current_time() - start == pytest.approx(HANDSHAKE_S)


async def test_cancel_closes_the_stream(autojump_clock: Any, grid: Grid) -> None:
    _near, far = trio.testing.memory_stream_pair()
    with trio.move_on_after(1):
        await respond(far, grid.credentials(2))
    with pytest.raises(trio.ClosedResourceError):
        await far.send_all(b"x")


async def test_altered_record(grid: Grid) -> None:
    for position in range(4 + 5 + 16):
        one, two = await pair(grid)
        sealed = one._sealed((b"hello",))
        sealed[position] ^= 0x10
        await one._stream.send_all(sealed)
        await one._stream.send_eof()
        with pytest.raises(ChannelClosed):
            await two.receive()


async def test_replayed_left_out_and_cut_records(grid: Grid) -> None:
    one, two = await pair(grid)
    first = one._sealed((b"first",))
    await one._stream.send_all(first + first)
    assert await two.receive() == b"first"
    with pytest.raises(ChannelClosed, match="altered"):
        await two.receive()
    one, two = await pair(grid)
    one._sealed((b"left out",))
    await one.send(b"second")
    with pytest.raises(ChannelClosed, match="altered"):
        await two.receive()
    one, two = await pair(grid)
    await one._stream.send_all(one._sealed((b"cut short",))[:-1])
    await one._stream.send_eof()
    with pytest.raises(ChannelClosed, match="closed"):
        await two.receive()


async def test_huge_length_takes_no_memory(grid: Grid) -> None:
    one, two = await pair(grid)
    await one._stream.send_all(struct.pack(">I", 0xFFFF_FFFF))
    with pytest.raises(ChannelClosed, match="altered"):
        await two.receive()


async def test_rekeys_on_both_sides(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_module, "REKEY_RECORDS", 4)
    one, two = await pair(grid)
    first_key = one._sealer._aead
    for number in range(30):
        await one.send(b"%d" % number, b"again")
        assert await two.receive() == b"%d" % number
        assert await two.receive() == b"again"
    assert one._sealer.n == two._opener.n == 60
    assert one._sealer._aead is not first_key


async def test_send_now_leaves_what_the_kernel_refuses(grid: Grid) -> None:
    """Real sockets: fill the kernel's buffer with small records, nothing is lost or reordered."""
    world = World(memory=False)
    async with connection(world) as (near, far), trio.open_nursery() as nursery:
        ends: list[SecureChannel] = []

        async def serve() -> None:
            ends.append(await respond(far, grid.credentials(2)))
            await ends[0].send(codec.encode(Verdict(Code.OK)))

        nursery.start_soon(serve)
        channel, _ = await initiate(near, grid.credentials(1), PEER)
        count = 0
        while not channel.unsent:
            assert channel.send_now(b"%08d" % count + bytes(8000))
            count += 1
        channel.send_now(b"%08d" % count + bytes(8000))
        with trio.fail_after(20):
            nursery.start_soon(channel.send, b"last")
            for number in range(count + 1):
                assert int((await ends[0].receive())[:8]) == number
            assert await ends[0].receive() == b"last"
        assert not channel.unsent


async def test_call_off_between_proofs(grid: Grid) -> None:
    class Off(Exception):
        pass

    def authenticated(hello: Hello) -> None:
        raise Off

    with pytest.raises(ExceptionGroup) as caught_error:
        await meet(grid.credentials(1), grid.credentials(2), authenticated=authenticated)
    assert caught_error.group_contains(Off)
