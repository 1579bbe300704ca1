"""Address tokens: the proof that a sender receives at the address it writes from (as QUIC's Retry, RFC 9000 section 8.1).

A token is a keyed hash of (sender's key, its address, time slot), so the giver stores nothing. Rules this file keeps:

- a token is worth nothing to another key, from another address, at another peer, or after two slots: that is what keeps
  recorded requests from being replayed and small questions from being turned into large answers for a third party;
- the secret is drawn from the caller's generator and never leaves.
"""

from __future__ import annotations

import hashlib
import hmac
import random

from dht.core.codec import encode
from dht.core.datagram import TOKEN_BYTES

SLOT_S = 60.0
"""A token lives one to two slots: long enough that it is rarely fetched anew, short enough for changing addresses."""


class Tokens:
    """Gives and checks tokens. `now_s` is monotonic."""

    def __init__(self, rng: random.Random) -> None:
        self._secret = rng.randbytes(32)

    def _token(self, key: bytes, address: tuple[str, int], slot: int) -> bytes:
        name = encode((key, address[0], address[1], slot))
        return hashlib.blake2b(name, digest_size=TOKEN_BYTES, key=self._secret).digest()

    def give(self, key: bytes, address: tuple[str, int], now_s: float) -> bytes:
        """The token for `key` at `address` now."""
        return self._token(key, address, int(now_s / SLOT_S))

    def check(self, token: bytes, key: bytes, address: tuple[str, int], now_s: float) -> bool:
        """Whether this token was given to `key` at `address` in this slot or the one before."""
        slot = int(now_s / SLOT_S)
        return any(hmac.compare_digest(token, self._token(key, address, s)) for s in (slot, slot - 1))
