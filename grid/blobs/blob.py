"""What a blob is: bytes named by their BLAKE3 hash, moved in chunks of 1 MiB; and the errors all of grid/blobs raises."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NewType, TypeAlias

from blake3 import blake3

BlobId = NewType("BlobId", bytes)
"""32 bytes: BLAKE3 of the content."""
Buffer: TypeAlias = bytes | bytearray | memoryview

BLOB_ID_BYTES = 32
CHUNK_BYTES = 1 << 20
"""What one read moves and what one holder can be blamed for."""
BLOB_BYTES_MAX = 1 << 40
"""A terabyte: its list of chunk hashes is 32 MB. Nothing larger is accepted from others."""
SMALL_BYTES_MAX = 64 << 10
"""Blobs up to this size may live in memory and, spilled, many to a file. The size at which drivers cut segments."""
HASH_LIST_SUFFIX = b"#"
"""A read of this name, a blob's id and the suffix, reads the BLAKE3 hashes of its chunks, 32 bytes each."""
HASH_LIST_CHUNKS_MAX = 8192
"""Chunk hashes in one such read: 256 KiB."""
PARALLEL_HASH_BYTES_MIN = 1 << 20
"""Below this, waking more threads costs more than the hash."""


class BlobMissing(Exception):
    """The blob isn't here (any more)."""


class BadBlob(Exception):
    """Bytes do not hash to the name they came under."""


class StoreFull(Exception):
    """No room for a blob: quota reached with everything in use, or the disk is full. The text names folder and bytes."""

    def __init__(self, folder: Path, wanted_bytes: int, reason: str) -> None:
        super().__init__(f"no room in {folder} for {wanted_bytes} bytes: {reason}")


class BlobUnavailable(Exception):
    """No peer that was asked could give the blob. `tried` maps each to the reason, one line."""

    def __init__(self, blob: BlobId, tried: Mapping[bytes, str]) -> None:
        self.blob = blob
        self.tried = dict(tried)
        reasons = "; ".join(f"{peer.hex()[:12]}: {why}" for peer, why in self.tried.items())
        super().__init__(f"blob {blob.hex()[:12]} is nowhere to be had ({reasons or 'no holder is known'})")


def blob_id(*buffers: Buffer) -> BlobId:
    """Name of the concatenation of `buffers`."""
    hasher = blake3(max_threads=blake3.AUTO if total_bytes(buffers) >= PARALLEL_HASH_BYTES_MIN else 1)
    for buffer in buffers:
        hasher.update(buffer)
    return BlobId(hasher.digest())


def blob_id_from_hex(text: str) -> BlobId:
    """Parse 64 lower-case hex digits; ValueError otherwise."""
    if len(text) != 2 * BLOB_ID_BYTES or text.strip("0123456789abcdef"):
        raise ValueError(f"{text[:80]!r} is no blob name")
    return BlobId(bytes.fromhex(text))


def total_bytes(buffers: tuple[Buffer, ...]) -> int:
    return sum(b.nbytes if isinstance(b, memoryview) else len(b) for b in buffers)


def hash_list_name(blob: BlobId) -> bytes:
    """What to read for the list of a blob's chunk hashes."""
    return blob + HASH_LIST_SUFFIX


def chunk_count(size: int) -> int:
    """Number of chunks of a blob; an empty blob has none."""
    return -(-size // CHUNK_BYTES)


def chunk_span(size: int, index: int) -> tuple[int, int]:
    """(offset, length) of a chunk."""
    offset = index * CHUNK_BYTES
    return offset, min(CHUNK_BYTES, size - offset)
