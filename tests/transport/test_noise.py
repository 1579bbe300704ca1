"""Noise XX against the published vectors, and its refusal of everything out of order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from grid.core.noise import NONCE_MAX, CipherState, HandshakeState, NoiseError, public_key

VECTORS = json.loads((Path(__file__).parent / "vectors" / "noise_xx.json").read_text())["vectors"]


def pair(**changes: Any) -> tuple[HandshakeState, HandshakeState]:
    initiator = HandshakeState(initiator=True, prologue=b"p", static=b"\x01" * 32, ephemeral=b"\x02" * 32)
    options = {"prologue": b"p", "static": b"\x03" * 32, "ephemeral": b"\x04" * 32} | changes
    return initiator, HandshakeState(initiator=False, **options)


def finish(initiator: HandshakeState, responder: HandshakeState) -> None:
    responder.read_message(initiator.write_message())
    initiator.read_message(responder.write_message())
    responder.read_message(initiator.write_message())


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["protocol_name"])
def test_published_vector(vector: dict[str, Any]) -> None:
    _, _, _, cipher, hash_name = vector["protocol_name"].split("_")
    ends = [
        HandshakeState(
            initiator=role == "init",
            prologue=bytes.fromhex(vector[f"{role}_prologue"]),
            static=bytes.fromhex(vector[f"{role}_static"]),
            ephemeral=bytes.fromhex(vector[f"{role}_ephemeral"]),
            cipher=cipher,
            hash_name=hash_name,
        )
        for role in ("init", "resp")
    ]
    messages = [(bytes.fromhex(m["payload"]), bytes.fromhex(m["ciphertext"])) for m in vector["messages"]]
    for turn, (payload, sealed) in enumerate(messages[:3]):
        writer, reader = ends[turn % 2], ends[(turn + 1) % 2]
        assert writer.write_message(payload) == sealed
        assert reader.read_message(sealed) == payload
    assert ends[0].handshake_hash == ends[1].handshake_hash == bytes.fromhex(vector["handshake_hash"])
    assert ends[0].remote_static == public_key(bytes.fromhex(vector["resp_static"]))
    assert ends[1].remote_static == public_key(bytes.fromhex(vector["init_static"]))
    states = [end.split() for end in ends]
    for turn, (payload, sealed) in enumerate(messages[3:], start=3):
        assert states[turn % 2][0].encrypt(b"", payload) == sealed
        assert states[(turn + 1) % 2][1].decrypt(b"", sealed) == payload


def test_encrypt_into_equals_encrypt() -> None:
    one, two = CipherState("AESGCM", b"k" * 32), CipherState("AESGCM", b"k" * 32)
    out = bytearray(5 + 16)
    one.encrypt_into(b"ad", b"hello", memoryview(out))
    assert bytes(out) == two.encrypt(b"ad", b"hello")
    assert one.n == two.n == 1


@pytest.mark.parametrize("cipher", ["AESGCM", "ChaChaPoly"])
def test_rekey_follows_the_specification(cipher: Any) -> None:
    state, other = CipherState(cipher, b"k" * 32), CipherState(cipher, b"k" * 32)
    reserved = CipherState(cipher, b"k" * 32)
    new_key = reserved._aead.encrypt(reserved._pack(NONCE_MAX), bytes(32), b"")[:32]
    state.encrypt(b"", b"one")
    state.rekey()
    expected = CipherState(cipher, new_key)
    expected.n = 1  # the counter goes on
    sealed = state.encrypt(b"", b"two")
    assert sealed == expected.encrypt(b"", b"two")
    other.n = 1
    with pytest.raises(NoiseError):
        other.decrypt(b"", sealed)


def test_counter_is_never_used_up_silently() -> None:
    state = CipherState("AESGCM", b"k" * 32)
    state.n = NONCE_MAX
    with pytest.raises(NoiseError, match="new connection"):
        state.encrypt(b"", b"x")


def test_failed_decrypt_leaves_the_counter() -> None:
    sender, receiver = CipherState("AESGCM", b"k" * 32), CipherState("AESGCM", b"k" * 32)
    sealed = sender.encrypt(b"", b"x")
    with pytest.raises(NoiseError):
        receiver.decrypt(b"", sealed[:-1] + bytes([sealed[-1] ^ 1]))
    with pytest.raises(NoiseError):
        receiver.decrypt(b"", b"short")
    assert receiver.decrypt(b"", sealed) == b"x"
    with pytest.raises(NoiseError):
        receiver.decrypt(b"", sealed)  # replayed


def test_wrong_order_raises() -> None:
    initiator, responder = pair()
    with pytest.raises(NoiseError, match="turn"):
        initiator.read_message(b"")
    with pytest.raises(NoiseError, match="turn"):
        responder.write_message()
    with pytest.raises(NoiseError, match="not finished"):
        initiator.split()
    with pytest.raises(NoiseError, match="not known"):
        _ = initiator.remote_static
    with pytest.raises(NoiseError, match="not finished"):
        _ = initiator.handshake_hash
    finish(initiator, responder)
    with pytest.raises(NoiseError, match="over"):
        initiator.write_message()
    initiator.split()
    with pytest.raises(NoiseError):
        initiator.split()


def test_other_prologue_fails_at_message_2() -> None:
    initiator, responder = pair(prologue=b"other")
    responder.read_message(initiator.write_message())
    with pytest.raises(NoiseError):
        initiator.read_message(responder.write_message())
    with pytest.raises(NoiseError, match="over"):
        initiator.write_message()


@pytest.mark.parametrize("position", [0, 31, 32, 79, 80, 95])
def test_altered_message_2_fails(position: int) -> None:
    initiator, responder = pair()
    responder.read_message(initiator.write_message())
    message = bytearray(responder.write_message())
    assert len(message) == 96
    message[position] ^= 0x40
    with pytest.raises(NoiseError):
        initiator.read_message(bytes(message))


@pytest.mark.parametrize("size", [0, 31, 32, 79, 80, 95])
def test_cut_message_2_fails(size: int) -> None:
    initiator, responder = pair()
    responder.read_message(initiator.write_message())
    with pytest.raises(NoiseError):
        initiator.read_message(responder.write_message()[:size])


def test_low_order_key_is_refused() -> None:
    _, responder = pair()
    responder.read_message(bytes(32))
    with pytest.raises(NoiseError, match="unusable key"):
        responder.write_message()


def test_message_too_long_is_refused() -> None:
    initiator, responder = pair()
    with pytest.raises(NoiseError, match="65535"):
        initiator.write_message(bytes(65535))
    with pytest.raises(NoiseError, match="too long"):
        responder.read_message(bytes(65536))
