"""Blobs that arrive in chunks."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from grid.blobs.blob import (
    CHUNK_BYTES,
    BadBlob,
    StoreFull,
    blob_id,
)
from grid.blobs.disk import allocated
from grid.blobs.store import PARTIAL_AGE_S_MAX, BlobStore
from tests.blobs.faulty import FaultyDisk
from tests.blobs.helpers import bytes_of, content, leftovers


async def test_writer_is_taken_up_after_a_crash(make: Callable[..., BlobStore], disk: FaultyDisk) -> None:
    data = bytes_of(3 * CHUNK_BYTES + 100)
    hashes = [blob_id(data[i : i + CHUNK_BYTES]) for i in range(0, len(data), CHUNK_BYTES)]
    blob = blob_id(data)
    store = make()
    writer = store.open_writer(blob, len(data))
    await writer.recheck(b"".join(hashes))
    assert await writer.write(0, data[:CHUNK_BYTES], hashes[0])
    assert await writer.write(3, data[3 * CHUNK_BYTES :], hashes[3])
    assert not await writer.write(1, data[:CHUNK_BYTES], hashes[1])
    assert not await writer.write(1, data[:5], blob_id(data[:5]))
    with pytest.raises(RuntimeError):
        store.open_writer(blob, len(data))
    store = make()  # no close: the process died
    assert store.used_bytes == allocated(len(data))
    writer = store.open_writer(blob, len(data))
    await writer.recheck(b"".join(hashes))
    assert list(writer.have) == [(0, 1), (3, 4)]
    for index in (1, 2):
        assert await writer.write(index, data[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES], hashes[index])
    assert writer.complete
    await writer.publish(durable=True)
    assert await content(store, blob) == data
    assert leftovers(store) == []
    assert store.used_bytes == allocated(len(data))
    disk.lose_power()
    assert await content(make(), blob) == data


async def test_writer_publishes_nothing_wrong(make: Callable[..., BlobStore]) -> None:
    store = make()
    data = bytes_of(2 * CHUNK_BYTES)
    lie = [blob_id(data[:CHUNK_BYTES]), blob_id(data[:CHUNK_BYTES])]
    writer = store.open_writer(blob_id(data), len(data))
    for index in range(2):
        assert await writer.write(index, data[:CHUNK_BYTES], lie[index])
    with pytest.raises(BadBlob):
        await writer.publish()
    assert not writer.complete
    writer.close()
    assert leftovers(store) == []
    assert store.used_bytes == 0
    assert not store.has(blob_id(data))


async def test_abandoned_fetches_make_room_and_expire(make: Callable[..., BlobStore]) -> None:
    data = bytes_of(2 * CHUNK_BYTES)
    store = make(quota_bytes=3 * CHUNK_BYTES)
    writer = store.open_writer(blob_id(data), len(data))
    with pytest.raises(StoreFull):
        store.open_writer(blob_id(b"other"), len(data))
    assert await writer.write(0, data[:CHUNK_BYTES], blob_id(data[:CHUNK_BYTES]))
    writer.close()
    writer.close()
    assert len(leftovers(store)) == 1
    other = store.open_writer(blob_id(b"other"), len(data))
    assert len(leftovers(store)) == 1
    assert await other.write(0, data[:CHUNK_BYTES], blob_id(data[:CHUNK_BYTES]))
    other.close()
    now_s = time.time()
    assert len(leftovers(make(clock=lambda: now_s + PARTIAL_AGE_S_MAX - 60))) == 1
    assert leftovers(make(clock=lambda: now_s + PARTIAL_AGE_S_MAX + 60)) == []
