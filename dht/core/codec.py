"""The one canonical encoding: msgpack by msgspec, structs as arrays, map keys sorted.

Rules this file keeps:

- one value has one encoding, so what is signed is what is sent;
- signatures and ids are always taken over `encode(value)`, never over bytes as they came: a sloppy encoding of the
  same value gains a forger nothing;
- a field's place is its name on the wire: fields are only ever added at the end, with a default. Fields beyond those
  known are ignored;
- whatever is wrong with the input, `decode` raises `CodecError` and nothing else.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, Any, TypeVar

import msgspec

T = TypeVar("T")

Bytes20 = Annotated[bytes, msgspec.Meta(min_length=20, max_length=20)]
"""A peer id or a DHT key."""
Bytes32 = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
"""An ed25519 public key or seed."""
Bytes64 = Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]
"""An ed25519 signature."""
Seconds = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]
"""Unix time in whole seconds; the bound keeps arithmetic on hostile values exact in a float."""

_encoder = msgspec.msgpack.Encoder(order="sorted")


class CodecError(ValueError):
    """The bytes are not a value of the type asked for."""


class Struct(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Base of everything that is signed or sent: an immutable array on the wire."""


def encode(value: Any) -> bytes:
    """The canonical bytes of `value`. Raises `TypeError` for what msgpack has no form of: a fault of the caller."""
    return _encoder.encode(value)


@lru_cache(maxsize=256)
def _decoder(type_: Any) -> msgspec.msgpack.Decoder[Any]:
    return msgspec.msgpack.Decoder(type_)


def decode(data: bytes | bytearray | memoryview, type_: type[T]) -> T:
    """The value of `type_` that `data` holds. Raises `CodecError` for anything else, whatever is wrong with it."""
    decoder = _decoder(type_)  # type: ignore[arg-type]  # a type that can't be decoded is the caller's fault
    try:
        value: T = decoder.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError, OverflowError, MemoryError) as error:
        raise CodecError(f"not a {getattr(type_, '__name__', type_)}: {error}") from None
    return value
