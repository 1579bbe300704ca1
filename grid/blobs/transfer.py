"""One blob's way here from several holders at once, none of whom is believed.

- A blob of up to one chunk is its own proof: ask one holder after the other.
- A larger one needs a list of chunk hashes; one holder (the *giver*) is asked for it. Chunks come from all holders, faster
  ones get more to do. A holder whose chunk contradicts the list is dropped, its chunk fetched elsewhere.
- When all chunks are there and the whole still has the wrong hash, or when nobody's chunks fit the list, the list was a
  lie: the giver is dropped, verdicts based on its list are void, and it begins anew with what matches the next list.
- A holder that fails is asked again after a pause, FAILURES_MAX times; one that says it has no such blob is not.
- Towards the end idle holders ask again for chunks that others have been owing for OVERDUE_S: a stalled holder delays
  nobody for long.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeAlias

import trio

from dht.core.identity import PeerId
from grid.blobs.blob import (
    BLOB_ID_BYTES,
    CHUNK_BYTES,
    HASH_LIST_CHUNKS_MAX,
    BadBlob,
    BlobId,
    BlobMissing,
    BlobUnavailable,
    blob_id,
    chunk_count,
    chunk_span,
    hash_list_name,
)
from grid.blobs.store import BlobStore
from grid.blobs.writer import Writer
from grid.transport import errors as transport

Read: TypeAlias = Callable[[PeerId, bytes, int, int], Awaitable[bytes]]
"""(peer, name, offset, length) → the bytes. Raises anything; BlobMissing (ours or the transport's) means: not held."""

HOLDERS_AT_ONCE = 6
"""More sources than this rarely make it faster; the others are reserves."""
CHUNKS_PER_HOLDER = 4
"""In flight from one holder: covers a round trip of 30 ms at 1 Gbit/s."""
READ_S = 5.0
"""Patience with one read, whatever its length; and for each byte of it:"""
READ_S_PER_BYTE = 25e-6
"""A megabyte that takes over half a minute (40 kB/s) counts as a failure."""
OVERDUE_S = 1.0
"""When an idle holder may be asked for what another one owes."""
FAILURES_MAX = 3
"""In a row; then a holder is dropped for this transfer."""
PAUSE_S = 0.2
"""Before a holder that failed is asked again, times its failures."""
MORE_HOLDERS_ROUNDS_MAX = 3
"""How often further holders are asked for."""

NOT_HELD = (BlobMissing, transport.BlobMissing)


class _Holder:
    """One peer in one transfer. doubt: why its chunks are not believed under the current list."""

    def __init__(self, peer: PeerId) -> None:
        self.peer = peer
        self.failures = 0
        self.failed_s = -math.inf
        self.gone = ""  # why it is dropped for good
        self.doubt = ""

    @property
    def usable(self) -> bool:
        return not self.gone and not self.doubt

    @property
    def pause_s(self) -> float:
        return PAUSE_S * self.failures if self.usable else 0.0

    def fail(self, asked_s: float, why: str) -> None:
        """A connection that breaks fails everything asked for before; that counts once."""
        if asked_s > self.failed_s:
            self.failures += 1
            self.failed_s = trio.current_time()
        if self.failures >= FAILURES_MAX:
            self.gone = why


class _Ask:
    """A chunk on its way from one holder."""

    def __init__(self, holder: _Holder) -> None:
        self.holder = holder
        self.since_s = trio.current_time()
        self.scope = trio.CancelScope()


class Transfer:
    """Brings one blob into the store. Not reusable."""

    def __init__(
        self,
        store: BlobStore,
        read: Read,
        places: trio.Semaphore,
        blob: BlobId,
        size: int,
        holders: Sequence[PeerId],
        more_holders: Callable[[BlobId], Awaitable[Sequence[PeerId]]] | None,
        owner: str,
    ) -> None:
        self._store = store
        self._read = read
        self.places = places
        self.blob = blob
        self.size = size
        self._holders = {peer: _Holder(peer) for peer in holders}
        self._more_holders = more_holders
        self._more_rounds = 0
        self._owner = owner

    async def run(self) -> None:
        """Raises BlobUnavailable, StoreFull, OSError; chunks that came stay on disk for the next attempt."""
        if self.size <= CHUNK_BYTES:
            await self._run_single()
            return
        writer = self._store.open_writer(self.blob, self.size)
        try:
            while not await self._attempt(writer):
                pass
        finally:
            writer.close()

    # ---- holders ----

    async def _usable(self) -> list[_Holder]:
        """Holders that may be asked, best first; more are looked for when there are none. Raises BlobUnavailable."""
        while True:
            usable = [holder for holder in self._holders.values() if holder.usable]
            if usable:
                return sorted(usable, key=lambda holder: holder.failures)
            if self._more_holders is None or self._more_rounds >= MORE_HOLDERS_ROUNDS_MAX:
                raise BlobUnavailable(self.blob, {h.peer: h.gone or h.doubt for h in self._holders.values()})
            self._more_rounds += 1
            for peer in await self._more_holders(self.blob):
                self._holders.setdefault(peer, _Holder(peer))

    async def _best(self) -> _Holder:
        """The next one to ask, after a pause if all have failed lately. Raises BlobUnavailable."""
        best = (await self._usable())[0]
        await trio.sleep(best.pause_s)
        return best

    async def ask(self, holder: _Holder, name: bytes, offset: int, length: int) -> bytes | None:
        """One read; None if it failed, which the holder's account shows then."""
        asked_s = trio.current_time()
        error = ""
        try:
            with trio.move_on_after(READ_S + length * READ_S_PER_BYTE) as patience:
                data = await self._read(holder.peer, name, offset, length)
                if len(data) == length:
                    holder.failures = 0
                    return data
                error = f"sent {len(data)} bytes instead of {length}"
            if patience.cancelled_caught:
                error = f"took over {trio.current_time() - asked_s:.0f} s"
        except NOT_HELD:
            holder.gone = "does not hold it"
            return None
        except Exception as failure:  # whatever the network may raise: this holder's, and nobody else's, failure
            error = f"{type(failure).__name__}: {failure}".splitlines()[0]
        holder.fail(asked_s, error)
        return None

    # ---- one chunk ----

    async def _run_single(self) -> None:
        while True:
            holder = await self._best()
            async with self.places:
                data = await self.ask(holder, self.blob, 0, self.size) if self.size else b""
                if data is not None:
                    if blob_id(data) == self.blob:
                        await self._store.put(data, owner=self._owner)
                        return
                    holder.gone = "sent other bytes than those of the blob"

    # ---- many chunks ----

    async def _attempt(self, writer: Writer) -> bool:
        """One list, and what can be had under it; whether the blob is published. Raises BlobUnavailable, StoreFull."""
        giver, hashes = await self._list()
        await writer.recheck(hashes)
        while not writer.complete:
            try:
                holders = await self._usable()
            except BlobUnavailable:
                if not any(holder.doubt for holder in self._holders.values()):
                    raise
                self._retract(giver, "gave a list of chunk hashes nobody's chunks match")
                return False
            await _Swarm(self, writer, hashes, holders).run()
        try:
            await writer.publish(owner=self._owner)
        except BadBlob:
            self._retract(giver, "gave a false list of chunk hashes")
            return False
        return True

    async def _list(self) -> tuple[_Holder, bytes]:
        """The list of chunk hashes, and whom it is from."""
        total = chunk_count(self.size) * BLOB_ID_BYTES
        page = HASH_LIST_CHUNKS_MAX * BLOB_ID_BYTES
        while True:
            giver = await self._best()
            hashes = bytearray()
            while len(hashes) < total:
                part = await self.ask(giver, hash_list_name(self.blob), len(hashes), min(page, total - len(hashes)))
                if part is None:
                    break
                hashes += part
            else:
                return giver, bytes(hashes)

    def _retract(self, giver: _Holder, why: str) -> None:
        giver.gone = why
        for holder in self._holders.values():
            holder.doubt = ""


class _Swarm:
    """Fetches the missing chunks from some holders until all are there or no holder is usable."""

    def __init__(self, transfer: Transfer, writer: Writer, hashes: bytes, holders: list[_Holder]) -> None:
        self._transfer = transfer
        self._writer = writer
        self._hashes = hashes
        self._reserves = deque(holders)
        self._pending = deque(i for lo, hi in writer.have.gaps(0, writer.chunks) for i in range(lo, hi))
        self._asks: dict[int, list[_Ask]] = {}
        self._changed = trio.Event()
        self._complete = trio.Event()
        self._broken: Exception | None = None

    async def run(self) -> None:
        """Raises StoreFull (what was written is discarded), OSError."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            for _ in range(HOLDERS_AT_ONCE):
                self._start_holder()
        if self._broken is not None:
            self._writer.discard()
            raise self._broken

    def _start_holder(self) -> None:
        if self._reserves:
            self._nursery.start_soon(self._work_holder, self._reserves.popleft())

    async def _work_holder(self, holder: _Holder) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(min(CHUNKS_PER_HOLDER, self._writer.chunks)):
                nursery.start_soon(self._work, holder)
        if not holder.usable:
            self._start_holder()

    async def _work(self, holder: _Holder) -> None:
        while holder.usable and not self._writer.complete:
            changed = self._changed
            index = self._next(holder)
            if index is None:
                with trio.move_on_after(OVERDUE_S):
                    await changed.wait()
                continue
            ask = _Ask(holder)
            self._asks.setdefault(index, []).append(ask)
            try:
                with ask.scope:
                    await self._chunk(holder, index)
            except Exception as error:
                self._broken = error
                self._nursery.cancel_scope.cancel()
            finally:
                self._settle(index, ask)
            if holder.pause_s:
                with trio.move_on_after(holder.pause_s):
                    await self._complete.wait()

    def _next(self, holder: _Holder) -> int | None:
        if self._pending:
            return self._pending.popleft()
        overdue_s = trio.current_time() - OVERDUE_S
        for index, asks in self._asks.items():
            if asks[-1].since_s <= overdue_s and all(ask.holder is not holder for ask in asks):
                return index
        return None

    async def _chunk(self, holder: _Holder, index: int) -> None:
        offset, length = chunk_span(self._transfer.size, index)
        at = index * BLOB_ID_BYTES
        async with self._transfer.places:
            data = await self._transfer.ask(holder, self._transfer.blob, offset, length)
            if data is None:
                return
            if not await self._writer.write(index, data, self._hashes[at : at + BLOB_ID_BYTES]):
                holder.doubt = f"sent other bytes than those of chunk {index}"

    def _settle(self, index: int, ask: _Ask) -> None:
        """A chunk came, or didn't: whoever waits may look again."""
        asks = self._asks[index]
        asks.remove(ask)
        if index in self._writer.have:
            for other in asks:
                other.scope.cancel()
        elif not asks:
            self._pending.appendleft(index)
        if not asks:
            del self._asks[index]
        self._changed.set()
        self._changed = trio.Event()
        if self._writer.complete:
            self._complete.set()
