"""The Noise XX handshake (Noise Protocol Framework, revision 34) as a machine without I/O.

Two ends exchange three messages; afterwards each knows the other's static key and both hold a pair of cipher states.
Rules this file keeps:

- no I/O, no clock and no randomness: private keys, the ephemeral one too, are arguments (fresh for each handshake);
- a call out of order raises `NoiseError`; after any error the handshake is dead and only raises;
- names and steps are those of the specification, sections 4 and 5; checked against published vectors.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Callable
from typing import Any, Final, Literal, TypeAlias

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

Buffer: TypeAlias = bytes | bytearray | memoryview
Cipher: TypeAlias = Literal["AESGCM", "ChaChaPoly"]
Hash: TypeAlias = Literal["SHA256", "SHA512", "BLAKE2s", "BLAKE2b"]

KEY_BYTES: Final = 32
TAG_BYTES: Final = 16
MESSAGE_BYTES_MAX: Final = 65535
"""Section 3: no handshake message is longer."""
NONCE_MAX: Final = 2**64 - 1
"""Section 5.1: reserved for rekeying; a cipher state that arrives there is used up."""

_MESSAGES: Final = (("e",), ("e", "ee", "s", "es"), ("s", "se"))
"""The XX pattern, section 7.5; the initiator writes the first and the last."""
_AEADS: Final[dict[str, Any]] = {"AESGCM": AESGCM, "ChaChaPoly": ChaCha20Poly1305}
_HAS_INTO: Final = hasattr(AESGCM, "encrypt_into")
"""`cryptography` before 47 lacks it; a copy more is the only loss."""
_NONCES: Final = {"AESGCM": struct.Struct(">4xQ"), "ChaChaPoly": struct.Struct("<4xQ")}
_HASHES: Final[dict[str, Callable[[bytes], Any]]] = {
    "SHA256": hashlib.sha256,
    "SHA512": hashlib.sha512,
    "BLAKE2s": hashlib.blake2s,
    "BLAKE2b": hashlib.blake2b,
}


class NoiseError(Exception):
    """The message is not what this handshake or cipher state expects, or the call came out of order."""


def public_key(private: bytes) -> bytes:
    """The X25519 public key (32 bytes) of a private one (any 32 random bytes)."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


class CipherState:
    """Section 5.1: one direction's key and message counter. Encrypts with associated data; 16 bytes longer each."""

    def __init__(self, cipher: Cipher, key: bytes) -> None:
        self._cipher: Cipher = cipher
        self._pack = _NONCES[cipher].pack
        self._aead = _AEADS[cipher](key)
        self.n = 0

    def _nonce(self) -> bytes:
        if self.n >= NONCE_MAX:
            raise NoiseError("this key has encrypted all the messages it may: open a new connection")
        return self._pack(self.n)

    def encrypt(self, ad: Buffer, plaintext: Buffer) -> bytes:
        sealed: bytes = self._aead.encrypt(self._nonce(), plaintext, ad)
        self.n += 1
        return sealed

    def encrypt_into(self, ad: Buffer, plaintext: Buffer, out: memoryview) -> None:
        """Like `encrypt`, into `out`, which has exactly len(plaintext) + TAG_BYTES bytes: no copy of a large record."""
        if _HAS_INTO:
            self._aead.encrypt_into(self._nonce(), plaintext, ad, out)
            self.n += 1
        else:
            out[:] = self.encrypt(ad, plaintext)

    def decrypt(self, ad: Buffer, sealed: Buffer) -> bytes:
        """Raises NoiseError when `sealed` is not the next message under this key, whole and unaltered."""
        try:
            plaintext: bytes = self._aead.decrypt(self._nonce(), sealed, ad)
        except (InvalidTag, ValueError):
            raise NoiseError("a message was altered on the way, repeated or left out") from None
        self.n += 1
        return plaintext

    def rekey(self) -> None:
        """Section 4.2, REKEY: both ends do it after the same message; n goes on."""
        sealed = self._aead.encrypt(self._pack(NONCE_MAX), bytes(KEY_BYTES), b"")
        self._aead = _AEADS[self._cipher](sealed[:KEY_BYTES])


class _SymmetricState:
    """Section 5.2: chaining key ck, transcript hash h, and a cipher state once there is a key."""

    def __init__(self, cipher: Cipher, hash_name: Hash) -> None:
        self._cipher: Cipher = cipher
        self._hash = _HASHES[hash_name]
        name = f"Noise_XX_25519_{cipher}_{hash_name}".encode()
        size = self._hash(b"").digest_size
        self.h: bytes = name.ljust(size, b"\0") if len(name) <= size else self._hash(name).digest()
        self._ck = self.h
        self._state: CipherState | None = None

    @property
    def has_key(self) -> bool:
        return self._state is not None

    def _hkdf(self, material: bytes) -> tuple[bytes, bytes]:
        def mac(key: bytes, data: bytes) -> bytes:
            return hmac.digest(key, data, self._hash)  # type: ignore[arg-type]  # typeshed wants a named constructor

        temp = mac(self._ck, material)
        first = mac(temp, b"\x01")
        return first, mac(temp, first + b"\x02")

    def mix_key(self, material: bytes) -> None:
        self._ck, key = self._hkdf(material)
        self._state = CipherState(self._cipher, key[:KEY_BYTES])

    def mix_hash(self, data: bytes) -> None:
        self.h = self._hash(self.h + data).digest()

    def encrypt_and_hash(self, plaintext: bytes) -> bytes:
        sealed = plaintext if self._state is None else self._state.encrypt(self.h, plaintext)
        self.mix_hash(sealed)
        return sealed

    def decrypt_and_hash(self, sealed: bytes) -> bytes:
        plaintext = sealed if self._state is None else self._state.decrypt(self.h, sealed)
        self.mix_hash(sealed)
        return plaintext

    def split(self) -> tuple[CipherState, CipherState]:
        first, second = self._hkdf(b"")
        return CipherState(self._cipher, first[:KEY_BYTES]), CipherState(self._cipher, second[:KEY_BYTES])


class HandshakeState:
    """Section 5.3, pattern XX. Call write_message and read_message in turn, the initiator writes first; then split."""

    def __init__(
        self,
        *,
        initiator: bool,
        prologue: bytes,
        static: bytes,
        ephemeral: bytes,
        cipher: Cipher = "AESGCM",
        hash_name: Hash = "SHA256",
    ) -> None:
        """static, ephemeral: private keys of 32 bytes; the ephemeral one must serve this handshake only."""
        self._initiator = initiator
        self._s = X25519PrivateKey.from_private_bytes(static)
        self._e = X25519PrivateKey.from_private_bytes(ephemeral)
        self._re = b""
        self._rs = b""
        self._next = 0
        self._dead = False
        self._symmetric = _SymmetricState(cipher, hash_name)
        self._symmetric.mix_hash(prologue)

    @property
    def finished(self) -> bool:
        return not self._dead and self._next == len(_MESSAGES)

    @property
    def remote_static(self) -> bytes:
        """The other end's static public key: the responder's is proven by message 2, the initiator's by 3."""
        if not self._rs:
            raise NoiseError("the other end's static key is not known yet")
        return self._rs

    @property
    def handshake_hash(self) -> bytes:
        """Names this handshake uniquely (section 11.2); only when finished."""
        if not self.finished:
            raise NoiseError("the handshake is not finished")
        return self._symmetric.h

    def write_message(self, payload: bytes = b"") -> bytes:
        parts = []
        for token in self._tokens(writing=True):
            if token == "e":
                key = self._e.public_key().public_bytes_raw()
                self._symmetric.mix_hash(key)
                parts.append(key)
            elif token == "s":
                parts.append(self._symmetric.encrypt_and_hash(self._s.public_key().public_bytes_raw()))
            else:
                self._mix_dh(token)
        parts.append(self._symmetric.encrypt_and_hash(payload))
        message = b"".join(parts)
        if len(message) > MESSAGE_BYTES_MAX:
            self._dead = True
            raise NoiseError(f"a handshake message of {len(message)} bytes: at most {MESSAGE_BYTES_MAX} are allowed")
        self._next += 1
        return message

    def read_message(self, message: bytes) -> bytes:
        """The payload. Raises NoiseError, after which this handshake is dead."""
        tokens = self._tokens(writing=False)
        self._dead = True
        if len(message) > MESSAGE_BYTES_MAX:
            raise NoiseError("a handshake message is too long")
        for token in tokens:
            if token == "e":
                self._re, message = self._take(message, KEY_BYTES)
                self._symmetric.mix_hash(self._re)
            elif token == "s":
                sealed, message = self._take(message, KEY_BYTES + (TAG_BYTES if self._symmetric.has_key else 0))
                self._rs = self._symmetric.decrypt_and_hash(sealed)
            else:
                self._mix_dh(token)
        payload = self._symmetric.decrypt_and_hash(message)
        self._dead = False
        self._next += 1
        return payload

    def split(self) -> tuple[CipherState, CipherState]:
        """(for sending, for receiving); once, after the third message."""
        if not self.finished:
            raise NoiseError("the handshake is not finished")
        self._dead = True
        first, second = self._symmetric.split()
        return (first, second) if self._initiator else (second, first)

    def _tokens(self, *, writing: bool) -> tuple[str, ...]:
        if self._dead or self._next >= len(_MESSAGES):
            raise NoiseError("this handshake is over")
        if writing != ((self._next % 2 == 0) == self._initiator):
            raise NoiseError("it is the other end's turn")
        return _MESSAGES[self._next]

    def _mix_dh(self, token: str) -> None:
        """First letter: the initiator's key of the pair, second the responder's."""
        mine, theirs = (token[0], token[1]) if self._initiator else (token[1], token[0])
        private = self._e if mine == "e" else self._s
        try:
            remote = X25519PublicKey.from_public_bytes(self._re if theirs == "e" else self._rs)
            self._symmetric.mix_key(private.exchange(remote))
        except ValueError:  # a point of low order: the shared key would be known to everyone
            self._dead = True
            raise NoiseError("the other end sent an unusable key") from None

    @staticmethod
    def _take(message: bytes, size: int) -> tuple[bytes, bytes]:
        if len(message) < size:
            raise NoiseError("a handshake message is cut short")
        return message[:size], message[size:]
