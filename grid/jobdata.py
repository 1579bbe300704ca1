"""The bytes a job needs on one peer: blobs its children ask for, its input files.

Every blob is pinned for the job while the job is here. Rules: a child names blobs by hash and size only; what is fetched
is verified before its path is told; an error becomes one line for the child's caller.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from dht.core.identity import PeerId
from grid.api import wire
from grid.blobs.blob import BadBlob, BlobMissing, BlobUnavailable, StoreFull
from grid.core.errors import BlobLostError
from grid.core.job import BlobRef, JobId

if TYPE_CHECKING:
    from grid.blobs.blob import BlobId
    from grid.blobs.fetch import Fetcher
    from grid.blobs.inputs import InputTree
    from grid.blobs.store import BlobStore

BLOB_ERRORS = (BlobUnavailable, BlobMissing, BadBlob, StoreFull)
FindHolders = Callable[[bytes], Awaitable[Sequence[PeerId]]]


async def nobody(blob: bytes) -> Sequence[PeerId]:
    """There are no other peers."""
    return ()


class JobData:
    """One job's blobs and inputs here. `inputs` is set once the manifest is here."""

    def __init__(self, job: JobId, store: BlobStore, fetcher: Fetcher | None = None, find: FindHolders = nobody) -> None:
        self.job = job
        self.owner = job.hex()
        self.store = store
        self.inputs: InputTree | None = None
        self.manifest: Path | None = None
        self.local_inputs: Path | None = None
        self.fetched: list[bytes] = []
        self.stored: Callable[[bytes], None] = lambda blob: None  # told what children put, before they may name it
        self._fetcher = fetcher
        self._find = find

    async def path(self, blob: bytes, size: int, holders: Sequence[PeerId] = ()) -> Path:
        """A file with the blob's content. Raises GridError or OSError when it is not to be had."""
        name: BlobId = blob  # type: ignore[assignment]
        self.store.pin(self.owner, name)
        path = await self.store.path(name)
        if path is not None:
            return path
        if self._fetcher is None:
            raise FileNotFoundError(f"no peer holds blob {blob.hex()[:12]}")
        known = list(holders) or list(await self._find(blob))
        try:
            path = await self._fetcher.fetch(name, size, known, more_holders=self._find)
        except BLOB_ERRORS as error:
            raise BlobLostError(str(error)) from error
        self.fetched.append(blob)
        return path

    async def read(self, ref: BlobRef, holders: Sequence[PeerId] = ()) -> bytes:
        """All bytes of a blob."""
        return await trio.Path(await self.path(ref.id, ref.size, holders)).read_bytes()

    async def put(self, path: str, data: bytes, durable: bool = False) -> bytes:
        """Store a child's bytes (or the file it wrote); returns the blob's name. Raises GridError or OSError."""
        try:
            if path:
                return bytes(await self.store.adopt(Path(path), durable=durable, owner=self.owner))
            return bytes(await self.store.put(data, durable=durable, owner=self.owner))
        except StoreFull as error:
            raise BlobLostError(str(error)) from error

    async def serve(self, post: Callable[[wire.ToChild], None], message: wire.Message, data: bytes) -> None:
        """Answer one request of a child."""
        assert isinstance(message, wire.Put | wire.Fetch | wire.OpenInput | wire.ListInputs)
        reply = wire.Reply(message.id)
        try:
            match message:
                case wire.Put(id_, path):
                    blob = await self.put(path, data)
                    self.stored(blob)
                    reply = wire.Reply(id_, text=blob.hex())
                case wire.Fetch(id_, ref, size):
                    reply = wire.Reply(id_, path=str(await self.path(bytes.fromhex(ref), size)))
                case wire.OpenInput(id_, name):
                    reply = wire.Reply(id_, path=str(await self._input(name)))
                case wire.ListInputs(id_):
                    reply = wire.Reply(id_, path=str(self.manifest) if self.manifest else "")
        except Exception as error:  # whatever it was, it is the child's one line, never the peer's end
            reply = wire.Reply(message.id, error=f"{error}" or type(error).__name__)
        post(reply)

    async def _input(self, name: str) -> Path:
        if self.inputs is None:
            raise FileNotFoundError(f"the job was submitted without input files: add --file {name}")
        return await self.inputs.materialize(name)

    def close(self) -> None:
        """The job is over here: its blobs may be evicted."""
        self.store.unpin(self.owner)
