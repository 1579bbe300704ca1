"""Peers that connect, talk and lose each other."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from dht.core.identity import PeerId
from grid.transport import mesh as mesh_module
from grid.transport.channel import initiate
from grid.transport.errors import HandshakeError, PeerUnreachable, Refused, RemoteError
from grid.transport.hello import PEER
from grid.transport.limits import (
    DEAD_S,
    HALF_OPEN_MAX,
    HANDSHAKE_S,
    IDLE_S,
    INBOX_EVENTS_MAX,
    MESSAGE_BYTES_MAX,
    OUTBOX_FRAMES_MAX,
    REQUESTS_RUNNING_MAX,
    REQUESTS_WAITING_MAX,
    UNREACHABLE_S,
)
from tests.transport.support import NOW_S, Grid, Peer, World


@asynccontextmanager
async def peers(world: World, grid: Grid, count: int, **options: Any) -> AsyncIterator[list[Peer]]:
    """Running peers that know each other's addresses, sorted by id."""
    made = [Peer(world, grid.member(number), f"host-{number}", **options) for number in range(1, count + 1)]
    made.sort(key=lambda peer: peer.id)
    async with trio.open_nursery() as nursery:
        for peer in made:
            await peer.start(nursery)
        for peer in made:
            peer.knows(*[other for other in made if other is not peer])
        yield made
        nursery.cancel_scope.cancel()


async def hang(peer: PeerId, message: bytes) -> bytes:
    await trio.sleep_forever()
    return b""


async def test_messages_in_order_between_up_and_down(clock: Any, world: World, grid: Grid) -> None:
    async with peers(world, grid, 2) as (one, two):
        for number in range(3000):
            await one.mesh.send(two.id, b"%d" % number)
        await two.handler.until(lambda: two.handler.count("message") == 3000)
        assert two.handler.messages() == [b"%d" % number for number in range(3000)]
        await one.mesh.close(two.id)
        await two.handler.until(lambda: two.handler.count("down"))
        assert two.handler.kinds(one.id) == ["up", *["message"] * 3000, "down"]
        await one.handler.until(lambda: one.handler.count("down"))
        assert one.handler.kinds(two.id) == ["up", "down"]
        assert one.mesh.connected() == two.mesh.connected() == []


async def test_hello_tells_who_it_is(clock: Any, world: World, grid: Grid) -> None:
    async with peers(world, grid, 2) as (one, two):
        assert await one.mesh.connect_address(two.address) == two.id
        await two.handler.until(lambda: two.handler.count("up"))
        for near, far in ((one, two), (two, one)):
            hello = near.mesh.hello(far.id)
            assert hello is not None
            assert hello.name == far.name
            assert near.mesh.connected() == [far.id]
            assert near.mesh.addresses(far.id)[0] == far.address
        assert await one.mesh.connect_address(two.address) == two.id  # again: the same connection
        assert two.handler.kinds(one.id) == ["up"]


async def test_requests_run_beside_each_other(clock: Any, world: World, grid: Grid) -> None:
    async with peers(world, grid, 2) as (one, two):
        waiting: list[trio.Event] = []

        async def answer(peer: PeerId, message: bytes) -> bytes:
            if message == b"go":
                for event in waiting:
                    event.set()
                return b"gone"
            waiting.append(trio.Event())
            two.handler.add("waiting", peer, message)
            await waiting[-1].wait()
            return b"late " + message

        two.handler.answer = answer
        answers: list[bytes] = []

        async def ask(message: bytes) -> None:
            answers.append(await one.mesh.request(two.id, message, 5))

        async with trio.open_nursery() as nursery:
            for number in range(10):
                nursery.start_soon(ask, b"%d" % number)
            await two.handler.until(lambda: two.handler.count("waiting") == 10)
            assert await one.mesh.request(two.id, b"go", 5) == b"gone"
        assert sorted(answers) == [b"late %d" % number for number in range(10)]


async def test_request_errors(clock: Any, world: World, grid: Grid) -> None:
    async with peers(world, grid, 2) as (one, two):
        cancelled = trio.Event()

        async def answer(peer: PeerId, message: bytes) -> bytes:
            if message == b"refuse":
                raise RemoteError("busy", "come back later")
            if message == b"fault":
                raise KeyError("a fault of ours")
            if message == b"unreachable":
                raise PeerUnreachable(peer, "gone")
            if message == b"huge":
                return bytes(MESSAGE_BYTES_MAX + 1)
            try:
                await trio.sleep_forever()
            finally:
                cancelled.set()
            return b""

        two.handler.answer = answer
        for message, code in ((b"refuse", "busy"), (b"fault", "internal"), (b"unreachable", "unreachable")):
            with pytest.raises(RemoteError) as caught:
                await one.mesh.request(two.id, message, 5)
            assert caught.value.code == code
        with pytest.raises(RemoteError, match="ValueError"):
            await one.mesh.request(two.id, b"huge", 5)
        with pytest.raises(trio.TooSlowError):
            await one.mesh.request(two.id, b"hang", 0.2)
        with trio.fail_after(5):
            await cancelled.wait()  # the other side stops working for nobody
        assert two.mesh.counters["handler_faults"] == 2
        assert one.mesh.connected() == [two.id]


async def test_sizes(clock: Any, world: World, grid: Grid) -> None:
    async with peers(world, grid, 2) as (one, two):
        for size in (0, 1, 16_383, 16_384, 65_536, 1 << 20, MESSAGE_BYTES_MAX):
            message = random.Random(size).randbytes(size)
            assert await one.mesh.request(two.id, message, 10) == message
        for call in (one.mesh.send(two.id, bytes(MESSAGE_BYTES_MAX + 1)), one.mesh.request(two.id, bytes(2 << 20), 1)):
            with pytest.raises(ValueError, match="use a blob"):
                await call


@pytest.mark.parametrize("seed", range(12))
async def test_simultaneous_dials_end_in_one_connection(autojump_clock: Any, grid: Grid, seed: int) -> None:
    rng = random.Random(seed)
    world = World(memory=True, latency_s=0.01, jitter_s=0.03 * (seed % 3))
    async with peers(world, grid, 2) as (one, two):

        async def talk(near: Peer, far: Peer, delay_s: float) -> None:
            await trio.sleep(delay_s)
            for number in range(100):
                await near.mesh.send(far.id, b"%d" % number)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(talk, one, two, rng.random() * 0.05)
            nursery.start_soon(talk, two, one, rng.random() * 0.05)
        for near in (one, two):
            await near.handler.until(near.handler.got("message", 100))
            assert near.handler.messages() == [b"%d" % number for number in range(100)]
            assert near.handler.count("up") == 1
            assert near.handler.count("down") == 0
        assert one.mesh.counters["connections"] == two.mesh.counters["connections"] == 1


async def test_everybody_dials_everybody(clock: Any, world: World, grid: Grid) -> None:
    async with peers(world, grid, 8) as everyone:
        async with trio.open_nursery() as nursery:
            for near in everyone:
                for far in everyone:
                    if near is not far:
                        nursery.start_soon(near.mesh.send, far.id, near.id + far.id)
        for near in everyone:
            await near.handler.until(near.handler.got("message", 7))
            assert sorted(near.handler.messages()) == sorted(far.id + near.id for far in everyone if far is not near)
            assert len(near.mesh.connected()) == 7


async def test_many_tasks_share_one_dial(clock: Any, world: World, grid: Grid) -> None:
    async with peers(world, grid, 2) as (one, two):
        async with trio.open_nursery() as nursery:
            for number in range(50):
                nursery.start_soon(one.mesh.send, two.id, b"%d" % number)
        await two.handler.until(lambda: two.handler.count("message") == 50)
        assert one.mesh.counters["dials"] == 1
        assert two.mesh.counters["accepted"] == 1


async def test_nobody_there(clock: Any, world: World, grid: Grid) -> None:
    async with peers(world, grid, 2) as (one, two):
        stranger = PeerId(bytes(20))
        with pytest.raises(PeerUnreachable, match="no address of it is known"):
            await one.mesh.send(stranger, b"x")
        await two.stop()
        with pytest.raises(PeerUnreachable, match=r"refused|nothing listens"):
            await one.mesh.connect(two.id)
        located = one.located
        with pytest.raises(PeerUnreachable):
            await one.mesh.send(two.id, b"x")  # right after a failure: not dialled again, the DHT not asked again
        assert one.located == located
        with pytest.raises(PeerUnreachable, match="this peer itself"):
            await one.mesh.send(one.id, b"x")
        assert not one.mesh.post(two.id, b"x")


async def test_another_peer_answers(clock: Any, world: World, grid: Grid) -> None:
    async with peers(world, grid, 3) as (one, two, three):
        one.known[three.id] = [two.address]
        with pytest.raises(PeerUnreachable, match="another peer answers there"):
            await one.mesh.connect(three.id)
        await one.mesh.connect(three.id, [two.address, three.address])  # the next address does
        assert one.mesh.connected() == [three.id]


async def test_restarted_peer_is_dialled_again(clock: Any, world: World, grid: Grid) -> None:
    async with peers(world, grid, 2) as (one, two), trio.open_nursery() as nursery:
        one.mesh.keep(two.id)
        await one.handler.until(lambda: one.handler.count("up"))
        await two.stop()
        await one.handler.until(lambda: one.handler.count("down"))
        again = Peer(world, grid.member(1 if two.name == "host-1" else 2), two.name)
        again.address = two.address
        await again.start(nursery)
        await one.handler.until(lambda: one.handler.count("up") == 2)
        await one.mesh.send(again.id, b"hello again")
        await again.handler.until(lambda: again.handler.messages() == [b"hello again"])
        nursery.cancel_scope.cancel()


async def test_cut_is_noticed_and_healed(autojump_clock: Any, memory_world: World, grid: Grid) -> None:
    world = memory_world
    assert world.memory is not None
    async with peers(world, grid, 2) as (one, two):
        one.mesh.keep(two.id)
        await two.handler.until(lambda: two.handler.count("up"))
        await trio.sleep(60)
        assert one.handler.count("down") == two.handler.count("down") == 0  # kept alive without traffic
        world.memory.partition(one.name, two.name)
        start = trio.current_time()
        for near in (one, two):
            await near.handler.until(near.handler.got("down", 1))
        assert DEAD_S - 3 <= trio.current_time() - start <= DEAD_S + 4  # the last byte came before the cut
        assert "no sign of life" in one.handler.events[-1][2]
        assert not one.mesh.post(two.id, b"lost")
        await trio.sleep(120)
        world.memory.heal()
        await one.handler.until(lambda: one.handler.count("up") == 2, within_s=30)
        assert await one.mesh.request(two.id, b"back", 5) == b"back"


async def test_one_way_cut_is_noticed_by_the_deaf_side(autojump_clock: Any, memory_world: World, grid: Grid) -> None:
    world = memory_world
    assert world.memory is not None
    async with peers(world, grid, 2) as (one, two):
        await one.mesh.connect(two.id)
        await two.handler.until(lambda: two.handler.count("up"))
        world.memory.partition(one.name, two.name, one_way=True)
        await two.handler.until(lambda: two.handler.count("down"))
        await one.handler.until(lambda: one.handler.count("down"), within_s=30)


async def test_killed_process_is_noticed_at_once(autojump_clock: Any, memory_world: World, grid: Grid) -> None:
    assert memory_world.memory is not None
    async with peers(memory_world, grid, 2) as (one, two):
        await one.mesh.connect(two.id)
        two.handler.answer = hang

        async def kill() -> None:
            await trio.sleep(1)
            assert memory_world.memory is not None
            memory_world.memory.kill(two.name)

        start = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(kill)
            with pytest.raises(PeerUnreachable):
                await one.mesh.request(two.id, b"?", 60)
        assert trio.current_time() - start < 1.1


async def test_queued_messages_survive_a_reconnect(autojump_clock: Any, memory_world: World, grid: Grid) -> None:
    world = memory_world
    assert world.memory is not None
    async with peers(world, grid, 2) as (one, two):
        await one.mesh.connect(two.id)
        await two.handler.until(lambda: two.handler.count("up"))
        world.memory.partition(one.name, two.name)
        big = bytes(500_000)  # the first fills the stream; what is still queued is not lost with it
        for number in range(6):
            await one.mesh.send(two.id, b"%d" % number + big)
        await one.handler.until(lambda: one.handler.count("down"))
        world.memory.heal()
        await two.handler.until(lambda: two.handler.messages()[-1:] == [b"5" + big], within_s=30)
        got = [message[:1] for message in two.handler.messages()]
        assert got == sorted(set(got))
        assert len(got) >= 5


async def test_unreachable_peer_is_given_up(autojump_clock: Any, memory_world: World, grid: Grid) -> None:
    world = memory_world
    assert world.memory is not None
    async with peers(world, grid, 2) as (one, two):
        await one.mesh.connect(two.id)
        world.memory.partition(one.name, two.name)

        async def flood() -> None:
            for _ in range(OUTBOX_FRAMES_MAX + 10):
                await one.mesh.send(two.id, bytes(10_000))

        start = trio.current_time()
        with pytest.raises(PeerUnreachable):
            await flood()  # blocked by the full queue, not for ever
        assert trio.current_time() - start < DEAD_S + 2 * UNREACHABLE_S + 5
        assert one.mesh.counters["messages_given_up"] > 0


async def test_slow_handler_holds_back_its_peer_only(clock: Any, world: World, grid: Grid) -> None:
    async with peers(world, grid, 3) as (slow, fast, other):
        gate = trio.Event()

        async def hold(peer: PeerId, message: bytes) -> None:
            if peer == fast.id:
                await gate.wait()

        slow.handler.hold = hold
        sent = 0
        message = bytes(4096)
        await fast.mesh.connect(slow.id)
        with trio.move_on_after(1):
            while True:
                await fast.mesh.send(slow.id, b"%06d" % sent + message)
                sent += 1
        assert sent < 20_000  # bounded by queues and kernel buffers
        assert not fast.mesh.post(slow.id, b"x")
        await other.mesh.send(slow.id, b"other")
        await slow.handler.until(lambda: slow.handler.messages(other.id) == [b"other"])
        assert await fast.mesh.request(other.id, b"?", 5) == b"?"
        gate.set()
        await slow.handler.until(lambda: len(slow.handler.messages(fast.id)) == sent, within_s=30)
        assert [int(m[:6]) for m in slow.handler.messages(fast.id)] == list(range(sent))


async def test_slow_handler_is_not_death(autojump_clock: Any, memory_world: World, grid: Grid) -> None:
    """Silence counts only while we listen: a handler may take longer than DEAD_S with a full inbox."""
    async with peers(memory_world, grid, 2) as (one, two):

        async def hold(peer: PeerId, message: bytes) -> None:
            await trio.sleep(0.05)

        two.handler.hold = hold
        for number in range(2 * INBOX_EVENTS_MAX):
            await one.mesh.send(two.id, b"%d" % number + bytes(9000))
        await two.handler.until(lambda: two.handler.count("message") == 2 * INBOX_EVENTS_MAX, within_s=300)
        assert two.handler.kinds(one.id) == ["up", *["message"] * 2 * INBOX_EVENTS_MAX]
        assert one.handler.kinds(two.id) == ["up"]


async def test_requests_of_one_peer_are_bounded(clock: Any, world: World, grid: Grid) -> None:
    async with peers(world, grid, 2) as (one, two):
        running = most = 0
        gate = trio.Event()

        async def answer(peer: PeerId, message: bytes) -> bytes:
            nonlocal running, most
            running += 1
            most = max(most, running)
            two.handler.add("running", peer, running)
            await gate.wait()
            running -= 1
            return b""

        two.handler.answer = answer
        codes: list[str] = []

        async def ask() -> None:
            try:
                await one.mesh.request(two.id, b"", 30)
                codes.append("")
            except RemoteError as error:
                codes.append(error.code)
                if codes.count("busy") == 600 - REQUESTS_WAITING_MAX:
                    enough_busy.set()

        enough_busy = trio.Event()
        async with trio.open_nursery() as nursery:
            for _ in range(600):
                nursery.start_soon(ask)
            await two.handler.until(lambda: two.handler.count("running") == REQUESTS_RUNNING_MAX)
            with trio.fail_after(10):
                await enough_busy.wait()
            gate.set()
        assert most == REQUESTS_RUNNING_MAX
        assert codes.count("") == REQUESTS_WAITING_MAX


async def test_fault_in_a_handler_costs_one_connection(clock: Any, world: World, grid: Grid) -> None:
    async with peers(world, grid, 3) as (one, two, three):

        async def hold(peer: PeerId, message: bytes) -> None:
            if message == b"bad":
                raise KeyError("fault")

        one.handler.hold = hold
        await three.mesh.send(one.id, b"good")
        await two.mesh.send(one.id, b"bad")
        await two.handler.until(lambda: two.handler.count("down"))
        await one.handler.until(lambda: one.handler.kinds(two.id) == ["up", "down"])
        assert one.mesh.counters["handler_faults"] == 1
        assert one.mesh.connected() == [three.id]
        await two.mesh.send(one.id, b"fine")
        await one.handler.until(lambda: one.handler.messages(two.id) == [b"fine"])


async def test_idle_connection_is_closed_unless_kept(autojump_clock: Any, memory_world: World, grid: Grid) -> None:
    async with peers(memory_world, grid, 3) as (one, two, three):
        await one.mesh.connect(two.id)
        one.mesh.keep(three.id)
        await one.handler.until(lambda: one.handler.count("up") == 2)
        await trio.sleep(IDLE_S - 20)
        assert sorted(one.mesh.connected()) == sorted([two.id, three.id])
        await trio.sleep(60)
        assert one.mesh.connected() == [three.id]
        assert "idle" in next(value for kind, who, value in one.handler.events if kind == "down")
        await trio.sleep(3 * IDLE_S)
        assert one.mesh.connected() == [three.id]
        assert three.handler.kinds(one.id) == ["up"]
        assert two.id not in one.mesh._remotes


async def test_too_many_connections_drop_the_idlest(
    autojump_clock: Any, memory_world: World, grid: Grid, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mesh_module, "CONNECTIONS_MAX", 2)
    async with peers(memory_world, grid, 4) as (one, two, three, four):
        await two.mesh.send(one.id, b"x")
        await trio.sleep(20)
        await three.mesh.send(one.id, b"x")
        one.mesh.keep(two.id)
        with pytest.raises(PeerUnreachable, match="too many connections"):
            await four.mesh.connect(one.id)
        one.mesh.unkeep(two.id)
        await trio.sleep(1)
        await four.mesh.connect(one.id)
        await two.handler.until(lambda: two.handler.count("down"))
        assert sorted(one.mesh.connected()) == sorted([three.id, four.id])


async def test_expired_member_is_refused_and_dropped(autojump_clock: Any, memory_world: World, grid: Grid) -> None:
    async with trio.open_nursery() as nursery:
        short = Peer(memory_world, grid.member(5, lifetime_s=100), "short")
        long = Peer(memory_world, grid.member(6), "long")
        for peer in (short, long):
            await peer.start(nursery)
        short.knows(long)
        short.mesh.keep(long.id)
        await long.handler.until(lambda: long.handler.count("up"))
        await long.handler.until(lambda: long.handler.count("down"), within_s=120)
        assert "expired" in long.handler.events[-1][2]
        await short.handler.until(lambda: short.handler.count("down"))
        with pytest.raises(PeerUnreachable, match="expired"):
            await short.mesh.connect(long.id)
        assert long.mesh.counters["NotAMember"] > 0
        nursery.cancel_scope.cancel()


async def test_revoked_member_is_dropped_at_once(clock: Any, world: World, grid: Grid) -> None:
    async with trio.open_nursery() as nursery:
        membership = grid.member(6)
        one, two = Peer(world, grid.member(5), "one"), Peer(world, membership, "two")
        for peer in (one, two):
            await peer.start(nursery)
        one.knows(two)
        await one.mesh.connect(two.id)
        await two.handler.until(lambda: two.handler.count("up"))
        membership.revoke([grid.member(5).identity.public])
        two.mesh.recheck()
        await one.handler.until(lambda: one.handler.count("down"))
        with pytest.raises(PeerUnreachable, match="revoked"):
            await one.mesh.connect(two.id)
        nursery.cancel_scope.cancel()


async def test_stranger_is_refused(clock: Any, world: World, grid: Grid) -> None:
    """A key of no member that knows the grid's id gets through the handshake's cryptography and no further."""
    async with peers(world, grid, 1) as (one,):
        stranger = grid.credentials(9, chain=lambda: (), check=lambda chain: chain[-1])
        stream = await world.network("stranger").open_stream(one.address)
        with pytest.raises(Refused, match="no certificate"):
            await initiate(stream, stranger, PEER)
        with trio.fail_after(5):
            while one.mesh.counters["NotAMember"] != 1:
                await trio.lowlevel.checkpoint()
        assert one.handler.events == []


async def test_garbage_and_half_open_connections_are_bounded(autojump_clock: Any, memory_world: World, grid: Grid) -> None:
    world = memory_world
    async with peers(world, grid, 2) as (one, two):
        await trio.testing.wait_all_tasks_blocked()
        tasks = trio.lowlevel.current_statistics().tasks_living
        attacker = world.network("attacker")
        held = [await attacker.open_stream(one.address) for _ in range(HALF_OPEN_MAX + 40)]
        await held[-1].send_all(b"GET / HTTP/1.1\r\n\r\n")
        await two.mesh.connect(one.id)  # an honest peer gets in all the same
        assert one.mesh.counters["half_open_cut"] >= 40
        assert one.mesh.counters["NotAPeer"] == 1
        await two.mesh.close(one.id)
        await trio.sleep(HANDSHAKE_S + 1)
        for stream in held:
            with trio.fail_after(1):
                assert await end_of(stream)
        assert trio.lowlevel.current_statistics().tasks_living == tasks
        assert one.mesh.counters["HandshakeTimeout"] >= HALF_OPEN_MAX - 2


async def end_of(stream: trio.abc.HalfCloseableStream) -> bool:
    try:
        return await stream.receive_some(1) == b""
    except trio.BrokenResourceError:
        return True


async def test_garbled_bytes_cost_one_connection(clock: Any, world: World, grid: Grid) -> None:
    async with peers(world, grid, 2) as (one, two):
        await one.mesh.connect(two.id)
        link = one.mesh._remotes[two.id].link
        assert link is not None
        await link.channel._stream.send_all(b"\0\0\0\x20" + bytes(32))
        await two.handler.until(lambda: two.handler.count("down"))
        assert "altered" in two.handler.events[-1][2]
        assert await two.mesh.request(one.id, b"again", 5) == b"again"


async def test_stopped_mesh_says_so(clock: Any, world: World, grid: Grid) -> None:
    async with peers(world, grid, 2) as (one, two):
        await one.mesh.connect(two.id)
        errors: list[Exception] = []

        async def ask() -> None:
            try:
                await one.mesh.request(two.id, b"?", 30)
            except PeerUnreachable as error:
                errors.append(error)

        asked = trio.Event()

        async def answer(peer: PeerId, message: bytes) -> bytes:
            asked.set()
            await trio.sleep_forever()
            return b""

        two.handler.answer = answer
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await asked.wait()
            await one.stop()
        assert "stops" in str(errors[0])
        await two.handler.until(lambda: two.handler.count("down"))


async def test_port_taken(clock: Any, world: World, grid: Grid) -> None:
    async with peers(world, grid, 1) as (one,):
        other = Peer(world, grid.member(7), one.name)
        other.address = one.address
        with pytest.raises(ExceptionGroup) as caught:
            async with trio.open_nursery() as nursery:
                await other.start(nursery)
        assert caught.group_contains(OSError)


async def test_connect_address_failures(clock: Any, world: World, grid: Grid) -> None:
    async with peers(world, grid, 1) as (one,):
        free = ("host-9", 9) if world.memory is not None else ("127.0.0.1", 1)
        with pytest.raises(OSError, match=r"no host|failed"):
            await one.mesh.connect_address(free)
        with pytest.raises(HandshakeError, match="our own"):
            await one.mesh.connect_address(one.address)
        async with peers(world, Grid(root=2000), 1) as (foreign,):
            with pytest.raises(HandshakeError, match="another grid"):
                await one.mesh.connect_address(foreign.address)


def test_now_is_before_certificates_expire() -> None:
    assert Grid().member(1).chain[-1].expires_s > NOW_S
