"""Real sockets on loopback."""

from __future__ import annotations

import time

import pytest
import trio

from dht.network import RealNetwork
from tests.dht.world import loopback_grid


async def test_a_port_that_was_not_asked_for_is_free_for_both_protocols() -> None:
    network = RealNetwork()
    for _ in range(20):
        datagrams = await network.open_datagram(("127.0.0.1", 0))
        listener = await network.listen_stream(datagrams.address)
        assert listener.address == datagrams.address
        with pytest.raises(OSError):  # noqa: PT011 (the kernel's words differ)
            await network.open_datagram(datagrams.address)
        datagrams.close()
        await listener.aclose()


async def test_streams_carry_bytes_and_half_close() -> None:
    network = RealNetwork()
    listener = await network.listen_stream(("127.0.0.1", 0))
    near = await network.open_stream(listener.address)
    far, peer = await listener.accept()
    assert peer[0] == "127.0.0.1"
    await near.send_all(b"hello")
    await near.send_eof()
    assert await far.receive_some() == b"hello"
    assert await far.receive_some() == b""
    await far.send_all(b"bye")
    assert await near.receive_some() == b"bye"
    for thing in (near, far, listener):
        await thing.aclose()
    with pytest.raises(OSError):  # noqa: PT011
        await network.open_stream(listener.address)


async def test_what_can_not_be_sent_is_lost_and_the_socket_lives() -> None:
    network = RealNetwork()
    socket = await network.open_datagram(("127.0.0.1", 0))
    other = await network.open_datagram(("127.0.0.1", 0))
    with trio.fail_after(30):
        await socket.send_to(bytes(70_000), other.address)
        await socket.send_to(b"x", ("127.0.0.1", 0))
        await socket.send_to(b"x", ("127.0.0.1", 99_999))
        await socket.send_to(b"x", ("not..a..host", 1))
        assert socket.send_failures == 4
        await socket.send_to(b"x", ("127.0.0.1", 9))  # nobody there: an ICMP error may follow
        await socket.send_to(b"hello", other.address)
        assert await other.receive_from() == (b"hello", socket.address)
    socket.close()
    with pytest.raises(trio.ClosedResourceError):
        await socket.receive_from()
    with pytest.raises(trio.ClosedResourceError):
        await socket.send_to(b"x", other.address)
    other.close()


@pytest.mark.real
async def test_a_process_that_was_stopped_does_not_blame_the_others() -> None:
    """As by SIGSTOP or a long garbage collection: all its waits end late, with the answers already there."""
    async with trio.open_nursery() as nursery:
        grid = loopback_grid(nursery)
        await grid.start_all(3)
        await grid.complete(5)
        contacts = grid.nodes[0].contacts()
        async with trio.open_nursery() as asking:
            for _ in range(4):
                for contact in contacts:
                    asking.start_soon(grid.nodes[0].ask_info, contact, 30.0)
            for _ in range(8):
                await trio.lowlevel.checkpoint()
                time.sleep(0.8)  # noqa: ASYNC251 (the process stands still)
        assert all(grid.knows(n) == 2 for n in grid.nodes)
        assert not any(protocol.is_missing(c) for protocol in [grid.nodes[0]._protocol] for c in contacts)
        nursery.cancel_scope.cancel()


@pytest.mark.real
async def test_three_nodes_on_loopback_know_each_other_within_five_seconds() -> None:
    async with trio.open_nursery() as nursery:
        grid = loopback_grid(nursery)
        await grid.start_all(3)
        await grid.complete(5)
        assert await grid.nodes[1].publish("test", bytes(20), b"v", 60) == 2
        assert len(await grid.nodes[2].lookup(bytes(20))) == 1
        grid.stop(1)
        with trio.fail_after(5):
            while grid.knows(0) != 1:  # noqa: ASYNC110
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
