"""The children's end of the local channel."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grid.api import wire
from grid.api.channel import Channel, ChannelClosed

Pair = tuple[Channel, Channel]


@pytest.fixture
def pair() -> Iterator[Pair]:
    one, two = socket.socketpair()
    child, peer = Channel(one), Channel(two, wire.from_child_decoder)
    yield child, peer
    child.close()
    peer.close()


@given(st.lists(st.tuples(st.integers(0, 200_000), st.integers(1, 3)), min_size=1, max_size=15))
def test_frames_of_any_size_arrive_whole(sizes: list[tuple[int, int]]) -> None:
    one, two = socket.socketpair()
    child, peer = Channel(one), Channel(two, wire.from_child_decoder)
    bodies = [bytes([n % 251]) * size for n, (size, _) in enumerate(sizes)]

    def send() -> None:
        for n, (body, (_, parts)) in enumerate(zip(bodies, sizes, strict=True)):
            step = len(body) // parts + 1
            child.send(wire.Consumed(n, len(body)), *(body[at : at + step] for at in range(0, len(body), step)))

    thread = threading.Thread(target=send)
    thread.start()
    for n, body in enumerate(bodies):
        message, received = peer.receive()
        assert message == wire.Consumed(n, len(body))
        assert received == body
    thread.join()
    child.close()
    with pytest.raises(ChannelClosed):
        peer.receive()
    peer.close()


def test_many_parts_and_threads(pair: Pair) -> None:
    child, peer = pair
    parts = [b"ab"] * 2000

    def send() -> None:
        for _ in range(20):
            child.send(wire.Waiting(True), *parts)

    threads = [threading.Thread(target=send) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(80):
        assert peer.receive() == (wire.Waiting(True), b"ab" * 2000)
    for thread in threads:
        thread.join()
    assert not peer.ready()


def test_a_large_body_is_writable_in_place(pair: Pair) -> None:
    child, peer = pair
    thread = threading.Thread(target=child.send, args=(wire.Waiting(False), memoryview(bytes(1 << 20))))
    thread.start()
    _, body = peer.receive()
    thread.join()
    assert isinstance(body, bytearray)


@pytest.mark.parametrize(
    "frame", [struct.pack("<II", 1 << 30, 0), struct.pack("<II", 0, 1 << 30), struct.pack("<II", 3, 0) + b"\xff\xff\xff"]
)
def test_garbage_is_a_wire_error(pair: Pair, frame: bytes) -> None:
    child, peer = pair
    child._socket.sendall(frame)
    with pytest.raises(wire.WireError):
        peer.receive()


def test_a_body_over_the_bound_is_refused_by_the_sender(pair: Pair) -> None:
    with pytest.raises(wire.WireError, match="over the bound"):
        pair[0].send(wire.Waiting(True), bytes(wire.BODY_BYTES_MAX + 1))


def test_sending_to_a_peer_that_is_gone(pair: Pair) -> None:
    child, peer = pair
    peer.close()
    with pytest.raises(ChannelClosed):
        child.send(wire.Waiting(True), bytes(4_000_000))
    assert child.ready()
