"""Getting blobs from other peers: one transfer a blob however many ask for it, verified before anyone sees it.

Rules this file keeps:

- nothing enters the store that does not hash to its name;
- callers who want the same blob share one transfer: the first one's task runs it, the others wait; if it is cancelled
  the next one carries on with the chunks that are there;
- chunks in memory are bounded for all fetches together.

transfer.py has the protocol between several holders; here is who may ask.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import trio

from dht.core.identity import PeerId
from grid.blobs.blob import BLOB_BYTES_MAX, BlobId, BlobUnavailable
from grid.blobs.store import BlobStore
from grid.blobs.transfer import Read, Transfer

CHUNKS_IN_FLIGHT_MAX = 32
"""Chunks asked for at a time by all fetches of this peer: 32 MiB of memory."""
FETCHES_MAX = 16
"""Blobs of one batch fetched at a time: most are small, and latency is what there is to hide."""

MoreHolders: TypeAlias = Callable[[BlobId], Awaitable[Sequence[PeerId]]]


@dataclass(frozen=True, slots=True)
class Wanted:
    """A blob of a batch."""

    blob: BlobId
    size: int
    holders: Sequence[PeerId]


class _Shared:
    """Those who want one blob just now."""

    def __init__(self) -> None:
        self.lock = trio.Lock()
        self.users = 0
        self.failure: BlobUnavailable | None = None
        self.asked_for_more = False


class Fetcher:
    """`read(peer, name, offset, length)` gives exactly those bytes of a peer's blob or raises; see `BlobStore.serve`."""

    def __init__(self, store: BlobStore, read: Read, chunks_in_flight_max: int = CHUNKS_IN_FLIGHT_MAX) -> None:
        self.store = store
        self._read = read
        self._places = trio.Semaphore(chunks_in_flight_max)
        self._shared: dict[BlobId, _Shared] = {}

    async def fetch(
        self,
        blob: BlobId,
        size: int,
        holders: Sequence[PeerId],
        *,
        more_holders: MoreHolders | None = None,
        owner: str = "",
    ) -> Path:
        """A read-only file with the blob, fetched if it isn't here; pinned for `owner` if one is given.

        holders: whom to ask, best first; more_holders is awaited when none of them is left. Raises BlobUnavailable,
        StoreFull, OSError.
        """
        await self.ensure(blob, size, holders, more_holders=more_holders, owner=owner)
        path = await self.store.path(blob)
        if path is None:  # evicted or damaged since: unlikely enough to let the caller decide
            raise BlobUnavailable(blob, {})
        return path

    async def ensure(
        self,
        blob: BlobId,
        size: int,
        holders: Sequence[PeerId],
        *,
        more_holders: MoreHolders | None = None,
        owner: str = "",
    ) -> None:
        """Like `fetch`, but a small blob stays in memory: read it by `store.read`."""
        if not 0 <= size <= BLOB_BYTES_MAX:
            raise ValueError(f"no blob has {size} bytes")
        shared = self._shared.setdefault(blob, _Shared())
        shared.users += 1
        try:
            async with shared.lock:
                if not await self.store.intact(blob):
                    await self._transfer(shared, blob, size, holders, more_holders, owner)
                if owner:
                    self.store.pin(owner, blob)
        finally:
            shared.users -= 1
            if not shared.users:
                del self._shared[blob]

    async def fetch_many(
        self, wanted: Iterable[Wanted], *, more_holders: MoreHolders | None = None, owner: str = ""
    ) -> dict[BlobId, BlobUnavailable]:
        """`ensure` many, FETCHES_MAX at a time; return those that can't be had. Raises StoreFull, OSError."""
        queue = iter(wanted)
        missing: dict[BlobId, BlobUnavailable] = {}
        broken: list[Exception] = []

        async def work() -> None:
            for each in queue:
                try:
                    await self.ensure(each.blob, each.size, each.holders, more_holders=more_holders, owner=owner)
                except BlobUnavailable as error:
                    missing[each.blob] = error
                except Exception as error:
                    broken.append(error)
                    nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for _ in range(FETCHES_MAX):
                nursery.start_soon(work)
        if broken:
            raise broken[0]
        return missing

    async def _transfer(
        self,
        shared: _Shared,
        blob: BlobId,
        size: int,
        holders: Sequence[PeerId],
        more_holders: MoreHolders | None,
        owner: str,
    ) -> None:
        failure = shared.failure
        if failure and failure.tried.keys() >= set(holders) and (shared.asked_for_more or more_holders is None):
            raise BlobUnavailable(blob, failure.tried)  # whoever had the lock before asked the same peers just now
        transfer = Transfer(self.store, self._read, self._places, blob, size, holders, more_holders, owner)
        try:
            await transfer.run()
        except BlobUnavailable as error:
            shared.failure, shared.asked_for_more = error, more_holders is not None
            raise
