"""A journal's files and every step on the disk: blocking, one call at a time, in a worker thread.

`log` is what is appended to: batches of frames, each one write and one fsync. `state` has the hard state in two slots, and a
mark of how much of `log` was synced. Rules:
- a slot is written only when the other, synced, holds the newest hard state that was acknowledged: a write cut short or a flip
  spoils one of two;
- what was read through the page cache after a crash or a failed fsync may not be on the disk, and a second fsync would not
  say so (Rebello et al., "Can Applications Recover from fsync Failures?", ATC 2020): so `open` writes all anew, and a log
  whose write or fsync failed is never appended to again but rewritten from its acknowledged prefix, verified;
- rewriting is the one way to drop anything: torn tails, what a snapshot covers. New name, fsync, rename, fsync of the folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from grid.blobs.disk import READ_BYTES, Disk, is_full, sync_folder, unlink_quietly, write_all
from grid.core.journal_frames import Frame, FrameWriter
from grid.core.journal_log import Log, LogReader
from grid.core.journal_records import (
    BLOCK_BYTES,
    BLOCK_STRIDE_BYTES,
    FIRST_SLOT,
    FORMAT,
    JOB_BYTES_MAX,
    MARK,
    NEVER_VOTED,
    SECOND_SLOT,
    Entry,
    HardState,
    Header,
    Mark,
    Record,
    Slot,
    Snapshot,
    from_block,
    to_block,
    to_frame,
)
from grid.journal_errors import JournalDamaged, JournalExists, JournalFailed, JournalFull, JournalMissing, Recovered

LOG_NAME: Final = "log"
STATE_NAME: Final = "state"
NEW_SUFFIX: Final = ".new"
PRIVATE_MODE: Final = 0o600
STATE_BYTES: Final = MARK * BLOCK_STRIDE_BYTES + BLOCK_BYTES
CHUNK_BYTES: Final = 1 << 20
"""Of a rewrite held encoded at once."""

FaultHook = Callable[[str], None]
"""Called at each point, in the disk's thread: where a simulation crashes, or a test kills the process."""

POINTS: Final = (
    "journal.create.begin",
    "journal.create.state_written",
    "journal.create.state_synced",
    "journal.create.state_renamed",
    "journal.create.folder_synced",
    "journal.open.read",
    "journal.append.begin",
    "journal.append.written",
    "journal.append.synced",
    "journal.append.marked",
    "journal.state.begin",
    "journal.state.first_written",
    "journal.state.first_synced",
    "journal.state.second_written",
    "journal.state.second_synced",
    "journal.rewrite.begin",
    "journal.rewrite.written",
    "journal.rewrite.synced",
    "journal.rewrite.renamed",
    "journal.rewrite.folder_synced",
)
"""Every point: stable names."""


def no_fault(point: str) -> None:
    """The hook of those who want none."""


@contextmanager
def _disk_errors(what: str, *, may_be_full: bool = True) -> Iterator[None]:
    """OSError becomes JournalFull, where trying again is sound, or JournalFailed."""
    try:
        yield
    except OSError as error:
        if may_be_full and is_full(error):
            raise JournalFull(f"the disk is full: {what} failed", "free some space on this machine") from error
        raise JournalFailed(f"{what} failed: {error.strerror or error}", "check this machine's disk") from error


class JournalFiles:
    """After JournalFailed or JournalDamaged only `close` may be called; after JournalFull all may."""

    def __init__(self, folder: Path, job: bytes, disk: Disk, incarnation: int, at: FaultHook) -> None:
        self.log_bytes = 0
        self.base_bytes = 0  # of log_bytes: what the last rewrite wrote
        self.hard = NEVER_VOTED
        self._folder = folder
        self._job = job
        self._disk = disk
        self._incarnation = incarnation
        self._at = at
        self._log_fd = -1
        self._state_fd = -1
        self._writer = FrameWriter()
        self._generation = 0
        self._seq = 0  # the last one tried
        self._synced_seq = 0  # the last one that is in both slots, on the disk
        self._next_slot = FIRST_SLOT  # the one not needed: to be written first
        self._must_rewrite = False

    # ---- beginning and end ----------------------------------------------------------------------------------------------

    @classmethod
    def create(cls, folder: Path, job: bytes, disk: Disk, incarnation: int, at: FaultHook) -> JournalFiles:
        """A new journal, on the disk when this returns. JournalExists if any file of one is there."""
        if not 0 < len(job) <= JOB_BYTES_MAX:
            raise ValueError("not a job's id")
        files = cls(folder, job, disk, incarnation, at)
        at("journal.create.begin")
        try:
            with _disk_errors("creating a journal"):
                folder.mkdir(parents=True, exist_ok=True)
                if any(_exists(disk, folder / name) for name in (LOG_NAME, STATE_NAME)):
                    raise JournalExists(f"there is a journal in {folder} already")
                files._create_state()
            files._rewrite(Log())
            with _disk_errors("creating a journal"):
                sync_folder(disk, folder.parent)
            at("journal.create.folder_synced")
        except BaseException:
            files.close()
            raise
        return files

    @classmethod
    def open(cls, folder: Path, job: bytes, disk: Disk, at: FaultHook) -> tuple[JournalFiles, Recovered]:
        """What survived, verified and written anew. Raises JournalDamaged, JournalFull, JournalFailed."""
        files = cls(folder, job, disk, 0, at)
        try:
            recovered, log = files._recover()
            at("journal.open.read")
            files.store(files.hard)
            files._rewrite(log)
        except BaseException:
            files.close()
            raise
        return files, recovered

    def close(self, *, sync: bool = False) -> None:
        """Close the files; with `sync` the mark too is made to last. Never raises."""
        for name in ("_state_fd", "_log_fd"):
            fd: int = getattr(self, name)
            setattr(self, name, -1)
            if fd >= 0:
                with suppress(OSError):
                    if sync and name == "_state_fd":
                        self._disk.fsync(fd)
                with suppress(OSError):
                    self._disk.close(fd)

    # ---- what is stored ----------------------------------------------------------------------------------------------------

    def append(self, records: Sequence[Record]) -> None:
        """One batch: one write, one fsync."""
        if self._must_rewrite:
            self._rewrite(self._read_back())
        self._at("journal.append.begin")
        data = self._writer.encode([to_frame(record) for record in records])
        self._must_rewrite = True
        with _disk_errors("appending to a journal"):
            write_all(self._disk, self._log_fd, data, self.log_bytes)
            self._at("journal.append.written")
            self._disk.fsync(self._log_fd)
        self._at("journal.append.synced")
        self._must_rewrite = False
        self.log_bytes += len(data)
        self._write_mark()
        self._at("journal.append.marked")

    def store(self, hard: HardState) -> None:
        """Both slots, one after the other."""
        self._at("journal.state.begin")
        self._seq += 1
        block = to_block(Slot(self._job, self._incarnation, self._seq, hard.term, hard.vote))
        for name, place in (("first", self._next_slot), ("second", SECOND_SLOT - self._next_slot)):
            self._next_slot = place
            with _disk_errors("storing a vote"):
                write_all(self._disk, self._state_fd, block, place * BLOCK_STRIDE_BYTES)
            self._at(f"journal.state.{name}_written")
            with _disk_errors("storing a vote", may_be_full=False):
                self._disk.fsync(self._state_fd)
            self._at(f"journal.state.{name}_synced")
        self._next_slot = FIRST_SLOT
        self._synced_seq = self._seq
        self.hard = hard

    def snapshot(self, snapshot: Snapshot) -> None:
        """Rewrite the log: the snapshot, then the entries that it leaves standing."""
        log = self._read_back()
        log.apply(snapshot)
        self._rewrite(log)

    # ---- reading -------------------------------------------------------------------------------------------------------------

    def _recover(self) -> tuple[Recovered, Log]:
        with _disk_errors("reading a journal"):
            try:
                self._state_fd = self._disk.open(self._folder / STATE_NAME, os.O_RDWR)
                self._log_fd = self._disk.open(self._folder / LOG_NAME, os.O_RDWR)
            except FileNotFoundError:
                raise JournalMissing from None
            slot, repaired = self._read_slots()
            mark = from_block(self._read_block(MARK), Mark)
            reader, size = self._scan(None)
        header = reader.header
        if header is not None and header.format > FORMAT:
            raise JournalFailed("a newer version of peergrid wrote this journal", "update peergrid on this machine")
        if header is not None and header.job != self._job:
            raise JournalDamaged("it belongs to another job")
        ending = reader.finish(mark)
        recovered = Recovered(header.incarnation if header else 0, NEVER_VOTED, reader.log.snapshot, reader.log.entries)
        if ending.verdict == "damaged" or header is None:
            raise JournalDamaged(ending.why, recovered)
        if slot is None:
            raise JournalDamaged("both copies of the vote are bad", recovered)
        if slot.job != self._job or slot.incarnation != header.incarnation:
            raise JournalDamaged("its files don't belong together", recovered)
        if slot.seq < header.state_seq or slot.term < reader.log.outline.last_term:
            raise JournalDamaged("the vote is older than the log", recovered)
        self._incarnation, self._generation, self._seq = slot.incarnation, header.generation, slot.seq
        self.hard = recovered.hard_state = HardState(slot.term, slot.vote)
        recovered.cut_bytes = size - ending.good_bytes
        recovered.repaired = repaired
        return recovered, reader.log

    def _read_slots(self) -> tuple[Slot | None, tuple[str, ...]]:
        """The newest slot that is whole; the other is to be written first."""
        slots = [from_block(self._read_block(place), Slot) for place in (FIRST_SLOT, SECOND_SLOT)]
        seqs = [-1 if slot is None else slot.seq for slot in slots]
        newest = FIRST_SLOT if seqs[FIRST_SLOT] > seqs[SECOND_SLOT] else SECOND_SLOT
        self._next_slot = SECOND_SLOT - newest
        bad = None in slots and slots != [None, None]
        return slots[newest], ("one of the two copies of the vote was bad",) if bad else ()

    def _read_block(self, place: int) -> bytes:
        return self._disk.pread(self._state_fd, BLOCK_BYTES, place * BLOCK_STRIDE_BYTES)

    def _scan(self, size: int | None) -> tuple[LogReader, int]:
        """The log read up to `size`, or to its end; and how much that was."""
        reader, offset = LogReader(), 0
        while size is None or offset < size:
            data = self._disk.pread(self._log_fd, READ_BYTES if size is None else min(READ_BYTES, size - offset), offset)
            if not data:
                break
            reader.feed(data)
            offset += len(data)
        return reader, offset

    def _read_back(self) -> Log:
        """What was acknowledged, read again: rot is found here and not copied."""
        with _disk_errors("reading a journal", may_be_full=False):
            reader, _ = self._scan(self.log_bytes)
        ending = reader.finish(Mark(self._generation, self.log_bytes))
        if ending.verdict != "clean":
            recovered = Recovered(self._incarnation, NEVER_VOTED, reader.log.snapshot, reader.log.entries)
            raise JournalDamaged(ending.why, recovered)
        return reader.log

    # ---- writing files -------------------------------------------------------------------------------------------------------

    def _create_state(self) -> None:
        path = self._folder / STATE_NAME
        new = path.with_name(path.name + NEW_SUFFIX)
        unlink_quietly(self._disk, new)
        fd = self._disk.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL, PRIVATE_MODE)
        try:
            slot = to_block(Slot(self._job, self._incarnation, self._seq, self.hard.term, self.hard.vote))
            pages = (slot.ljust(BLOCK_STRIDE_BYTES, b"\0") * 2).ljust(STATE_BYTES, b"\0")
            write_all(self._disk, fd, pages, 0)
            self._at("journal.create.state_written")
            self._disk.fsync(fd)
        finally:
            self._disk.close(fd)
        self._at("journal.create.state_synced")
        self._disk.replace(new, path)
        self._at("journal.create.state_renamed")
        self._state_fd = self._disk.open(path, os.O_RDWR)

    def _rewrite(self, log: Log) -> None:
        """A new file of all that `log` holds takes the old one's place. JournalFull leaves the old one as it was."""
        self._at("journal.rewrite.begin")
        path = self._folder / LOG_NAME
        new = path.with_name(path.name + NEW_SUFFIX)
        writer = FrameWriter()
        with _disk_errors("rewriting a journal"):
            unlink_quietly(self._disk, new)
            try:
                size = self._write_log(new, self._batches(writer, log))
                self._disk.replace(new, path)
            except OSError:
                unlink_quietly(self._disk, new)
                raise
        self._at("journal.rewrite.renamed")
        with _disk_errors("rewriting a journal", may_be_full=False):
            sync_folder(self._disk, self._folder)
            self._at("journal.rewrite.folder_synced")
            old, self._log_fd = self._log_fd, -1
            if old >= 0:
                self._disk.close(old)
            self._log_fd = self._disk.open(path, os.O_RDWR)
        self._generation += 1
        self._writer = writer
        self.log_bytes = self.base_bytes = size
        self._must_rewrite = False
        self._write_mark()

    def _write_log(self, new: Path, chunks: Iterator[bytes]) -> int:
        size = 0
        fd = self._disk.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL, PRIVATE_MODE)
        try:
            for chunk in chunks:
                size = write_all(self._disk, fd, chunk, size)
            self._at("journal.rewrite.written")
            self._disk.fsync(fd)
        finally:
            self._disk.close(fd)
        self._at("journal.rewrite.synced")
        return size

    def _batches(self, writer: FrameWriter, log: Log) -> Iterator[bytes]:
        """Batch 0 in pieces."""
        frames: list[Frame] = [to_frame(Header(FORMAT, self._job, self._incarnation, self._generation + 1, self._synced_seq))]
        held_bytes = 0
        records: list[Entry | Snapshot] = [log.snapshot] if log.snapshot else []
        for record in records + log.entries:
            if held_bytes >= CHUNK_BYTES:
                yield writer.encode(frames, more=True)
                frames, held_bytes = [], 0
            frames.append(to_frame(record))
            held_bytes += len(frames[-1].payload)
        yield writer.encode(frames)

    def _write_mark(self) -> None:
        """Best effort: a mark that is old says less, nothing wrong."""
        with suppress(OSError):
            block = to_block(Mark(self._generation, self.log_bytes))
            write_all(self._disk, self._state_fd, block, MARK * BLOCK_STRIDE_BYTES)


def destroy(folder: Path, disk: Disk) -> None:
    """Forget a journal, damaged or not; nothing if there is none. OSError if the disk won't."""
    for name in (LOG_NAME, STATE_NAME, LOG_NAME + NEW_SUFFIX, STATE_NAME + NEW_SUFFIX):
        with suppress(FileNotFoundError):
            disk.unlink(folder / name)
    with suppress(FileNotFoundError):
        sync_folder(disk, folder)
    with suppress(OSError):
        folder.rmdir()


def _exists(disk: Disk, path: Path) -> bool:
    try:
        fd = disk.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    disk.close(fd)
    return True
