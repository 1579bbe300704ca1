"""A replica on the disk: who it is (a record), and its journal in the consensus core's terms.

Rules:
- the record is written, whole and synced, after the journal it speaks of and before anybody is told of the replica: where one of
  the two is missing or names another incarnation, there is no replica;
- effects that the core wants on the disk are there, in order, when `write` returns: a full disk and a failed one are tried again
  for as long as it takes, and nothing else happens meanwhile (such a leader's lease runs out); a damaged journal is told;
- entries that stand together share one write and one fsync.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

import trio
from blake3 import blake3

from dht.core import codec
from dht.core.codec import CodecError
from grid.blobs.disk import READ_BYTES, Disk, sync_folder, unlink_quietly, write_file
from grid.core import journal_records
from grid.core.job import SignedSpec
from grid.core.journal_records import Cut
from grid.core.mandate import Branch
from grid.core.raft_effects import Persist
from grid.core.raft_log import Durable, InvariantError
from grid.core.raft_messages import Appended, Config, Entry, HardState, Kind, NodeId, Record, Snapshot
from grid.journal import Journal
from grid.journal_errors import JournalBusy, JournalClosed, JournalDamaged, JournalError, JournalFailed, JournalFull, Recovered
from grid.journal_files import FaultHook, no_fault

RETRY_S: Final = 1.0
"""Between tries on a disk that is full or fails: a replica that can't write is silent, and the others go on without it."""
RECORD_NAME: Final = "replica"
RECORD_FORMAT: Final = 1
CHECK_BYTES: Final = 16
log = logging.getLogger(__name__)


class Journals(Protocol):
    """What of `Journal` is needed to have one: a simulation may hand in a class of its own."""

    async def create(
        self, folder: Path, job: bytes, disk: Disk, *, incarnation: int, at: FaultHook = ...
    ) -> tuple[Journal, Recovered]: ...

    async def open(self, folder: Path, job: bytes, disk: Disk, *, at: FaultHook = ...) -> tuple[Journal, Recovered]: ...

    async def destroy(self, folder: Path, disk: Disk) -> None: ...


class Seat(codec.Struct, frozen=True):
    """Who a replica is: a member of a branch of a job's group. blobs: (blob, size) that the job needs wherever it is led."""

    job: bytes
    branch: Branch
    node: NodeId
    signed: SignedSpec
    blobs: tuple[tuple[bytes, int], ...] = ()
    format: int = RECORD_FORMAT


@dataclass(frozen=True)
class Shelf:
    """Where a peer's replicas are: a folder a job, in it one a branch. at: see `grid.replica`."""

    folder: Path
    disk: Disk
    journals: Journals = Journal
    at: FaultHook = no_fault

    def place(self, job: bytes, branch: bytes) -> Path:
        """The folder of one replica."""
        return self.folder / job.hex() / f"raft-{branch.hex() or 'root'}"

    def places(self) -> list[Path]:
        """The folders of all, whole or not."""
        return sorted(self.folder.glob("*/raft-*"))

    async def create(self, seat: Seat) -> Book:
        """A new replica in place of what was there: on the disk when this returns. JournalError, OSError."""
        place = self.place(seat.job, seat.branch.name)
        await self.destroy(place)
        journal, recovered = await self.journals.create(place, seat.job, self.disk, incarnation=seat.node.incarnation, at=self.at)
        try:
            await self.disk.run(_write_record, self.disk, place, seat)
        except BaseException:
            with trio.CancelScope(shield=True):
                await journal.close()
            raise
        return Book(self, seat, journal, to_durable(recovered))

    async def open(self, place: Path) -> Book:
        """The replica in this folder. JournalDamaged: there is none (any more); JournalFull, JournalFailed, OSError: not now."""
        seat = await self.disk.run(_read_record, self.disk, place)
        if seat is None or self.place(seat.job, seat.branch.name) != place:
            raise JournalDamaged("its record is missing or bad")
        journal, recovered = await self.journals.open(place, seat.job, self.disk, at=self.at)
        try:
            if recovered.incarnation != seat.node.incarnation:
                raise JournalDamaged("it is of another incarnation than its record")
            durable = to_durable(recovered)
        except BaseException:
            with trio.CancelScope(shield=True):
                await journal.close()
            raise
        return Book(self, seat, journal, durable)

    async def destroy(self, place: Path) -> None:
        """Forget what is in this folder, which nobody has open. OSError."""
        await self.disk.run(_unlink_record, self.disk, place)
        await self.journals.destroy(place, self.disk)


# ---- the record --------------------------------------------------------------------------------------------------------


def _write_record(disk: Disk, place: Path, seat: Seat) -> None:
    payload = codec.encode(seat)
    new = place / f"{RECORD_NAME}.new"
    unlink_quietly(disk, new)
    write_file(disk, new, (blake3(payload).digest(CHECK_BYTES), payload), sync=True)
    disk.replace(new, place / RECORD_NAME)
    sync_folder(disk, place)
    sync_folder(disk, place.parent)


def _read_record(disk: Disk, place: Path) -> Seat | None:
    """None: missing, cut or altered."""
    try:
        fd = disk.open(place / RECORD_NAME, os.O_RDONLY)
    except FileNotFoundError:
        return None
    data = bytearray()
    try:
        while part := disk.pread(fd, READ_BYTES, len(data)):
            data += part
    finally:
        disk.close(fd)
    check, payload = bytes(data[:CHECK_BYTES]), bytes(data[CHECK_BYTES:])
    if blake3(payload).digest(CHECK_BYTES) != check:
        return None
    try:
        seat = codec.decode(payload, Seat)
    except CodecError:
        return None
    return seat if seat.format == RECORD_FORMAT else None


def _unlink_record(disk: Disk, place: Path) -> None:
    for name in (RECORD_NAME, f"{RECORD_NAME}.new"):
        with suppress(FileNotFoundError):
            disk.unlink(place / name)


# ---- the journal in the core's terms -------------------------------------------------------------------------------------


def to_durable(recovered: Recovered) -> Durable:
    """What a journal said, folded. Raises JournalDamaged: its bytes are whole, but no member of a group wrote them."""
    try:
        vote = codec.decode(recovered.hard_state.vote, NodeId) if recovered.hard_state.vote is not None else None
        records: list[Record] = [HardState(recovered.hard_state.term, vote)]
        if recovered.snapshot is not None:
            config, data = codec.decode(recovered.snapshot.data, tuple[Config, bytes])
            records.append(Snapshot(recovered.snapshot.index, recovered.snapshot.term, config, data))
        if recovered.entries:
            records.append(Appended(tuple(map(_from_journal, recovered.entries))))
    except CodecError as error:
        raise JournalDamaged(str(error)) from error
    return Durable(records)


def _from_journal(entry: journal_records.Entry) -> Entry:
    kind, data = codec.decode(entry.data, tuple[Kind, bytes])
    return Entry(entry.index, entry.term, kind, data)


def _to_journal(entry: Entry) -> journal_records.Entry:
    return journal_records.Entry(entry.index, entry.term, codec.encode((entry.kind, entry.data)))


@dataclass
class _Write:
    """One call of the journal. before, after: points at its two sides."""

    record: HardState | Snapshot | list[Entry]
    before: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)


def _plan(persists: Sequence[Persist]) -> list[_Write]:
    """The calls that these effects need, in order; appends that stand together are one."""
    writes: list[_Write] = []
    for effect in persists:
        first = len(writes)
        for record in effect.records:
            last = writes[-1] if writes else None
            if not isinstance(record, Appended):
                writes.append(_Write(record))
            elif last is not None and isinstance(last.record, list) and last.record[-1].index + 1 == record.entries[0].index:
                last.record += record.entries
            else:
                writes.append(_Write(list(record.entries)))
        writes[min(first, len(writes) - 1)].before.append(effect.point)
        writes[-1].after.append(effect.point)
    return writes


class Book:
    """One replica's journal, open. `durable`: what it held when it was opened."""

    def __init__(self, shelf: Shelf, seat: Seat, journal: Journal, durable: Durable) -> None:
        self.seat = seat
        self.durable = durable
        self.stuck = False
        """The disk takes nothing now."""
        self._shelf = shelf
        self._journal = journal
        self._snapshot_index = durable.snapshot.index

    @property
    def place(self) -> Path:
        """Its folder."""
        return self._shelf.place(self.seat.job, self.seat.branch.name)

    async def write(self, persists: Sequence[Persist]) -> None:
        """All on the disk. Raises JournalDamaged; InvariantError for what no member may write (a second vote in a term)."""
        for write in _plan(persists):
            for point in write.before:
                self._shelf.at(f"before {point}")
            await self._insist(write)
            for point in write.after:
                self._shelf.at(f"after {point}")

    async def _insist(self, write: _Write) -> None:
        """Try until it is written."""
        while True:
            try:
                await self._write(write)
            except JournalDamaged:
                raise
            except ValueError as error:
                raise InvariantError(f"the journal refuses: {error}") from error
            except (JournalFull, JournalBusy) as error:
                self._complain(error)
            except (JournalFailed, JournalClosed) as error:
                self._complain(error)
                await self._reopen()
                continue
            else:
                self.stuck = False
                return
            await trio.sleep(RETRY_S)

    def _complain(self, error: JournalError) -> None:
        if not self.stuck:
            log.warning("job %s: its replica here stands still: %s", self.seat.job.hex()[:8], error)
        self.stuck = True

    async def _write(self, write: _Write) -> None:
        journal, record = self._journal, write.record
        if isinstance(record, HardState):
            await journal.set_hard_state(record.term, codec.encode(record.vote) if record.vote is not None else None)
        elif isinstance(record, Snapshot):
            if record.index > self._snapshot_index:
                data = codec.encode((record.config, record.data))
                await journal.install_snapshot(record.index, record.term, data)
                self._snapshot_index = record.index
        else:
            cut = [Cut(record[0].index)] if record[0].index <= journal.last_index else []
            await journal.append([*cut, *map(_to_journal, record)])

    async def _reopen(self) -> None:
        """After the disk failed: read anew what is on it. Raises JournalDamaged."""
        await self._journal.close()
        while True:
            try:
                self._journal, recovered = await self._shelf.journals.open(
                    self.place, self.seat.job, self._shelf.disk, at=self._shelf.at
                )
            except JournalDamaged:
                raise
            except JournalError:
                await trio.sleep(RETRY_S)
            else:
                self._snapshot_index = recovered.snapshot.index if recovered.snapshot else 0
                return

    async def close(self) -> None:
        """Close the files; what was written stays."""
        await self._journal.close()
