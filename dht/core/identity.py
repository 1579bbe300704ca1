"""Keys and ids: a peer is an ed25519 key, its id 20 bytes of BLAKE2b of the public key.

Rules this file keeps:

- the id is the DHT id too, so nobody can choose a place or claim another's;
- every signed byte string begins with a domain, so that one signature can't serve as another.
"""

from __future__ import annotations

import hashlib
from typing import NewType

from nacl.bindings import crypto_sign_open
from nacl.exceptions import CryptoError
from nacl.signing import SigningKey

PeerId = NewType("PeerId", bytes)
"""20 bytes: BLAKE2b-160 of an ed25519 public key."""

ID_BYTES = 20
KEY_BYTES = 32
SIGNATURE_BYTES = 64


class BadSignature(Exception):
    """The signature is not of this key, domain and payload."""


def peer_id(public: bytes) -> PeerId:
    """The id of the peer with this public key."""
    return PeerId(hashlib.blake2b(public, digest_size=ID_BYTES).digest())


def _message(domain: str, payload: bytes) -> bytes:
    return domain.encode("ascii") + b"\0" + payload


class Identity:
    """An ed25519 key pair (RFC 8032). `seed` is the secret: 32 bytes, to be kept in a file of mode 600."""

    __slots__ = ("_key", "id", "public", "seed")

    def __init__(self, seed: bytes) -> None:
        if len(seed) != KEY_BYTES:
            raise ValueError(f"a seed has {KEY_BYTES} bytes, not {len(seed)}")
        self._key = SigningKey(seed)
        self.seed = bytes(seed)
        self.public: bytes = bytes(self._key.verify_key)
        self.id = peer_id(self.public)

    @classmethod
    def generate(cls) -> Identity:
        """A fresh key from the system's randomness."""
        return cls(bytes(SigningKey.generate()))

    @classmethod
    def from_seed(cls, seed: bytes) -> Identity:
        """The key of a saved seed. Raises `ValueError` when it doesn't have 32 bytes."""
        return cls(seed)

    def sign(self, domain: str, payload: bytes) -> bytes:
        """64 bytes of signature over `domain`, a zero byte, and `payload`."""
        return bytes(self._key.sign(_message(domain, payload)).signature)

    def __repr__(self) -> str:  # never the seed: reprs end in logs
        return f"Identity({self.id.hex()[:8]})"


def verify(public: bytes, domain: str, payload: bytes, signature: bytes) -> None:
    """Check `signature`. Raises `BadSignature` when it, the key or any length is wrong."""
    if len(signature) != SIGNATURE_BYTES or len(public) != KEY_BYTES:
        raise BadSignature("wrong length")
    try:
        crypto_sign_open(signature + _message(domain, payload), public)
    except (CryptoError, ValueError, TypeError):
        raise BadSignature("the signature does not fit key, domain and payload") from None
