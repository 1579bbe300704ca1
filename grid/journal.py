"""The ledger's journal: one job's Raft state on one peer, on the disk before anyone is told.

Rules:
- a call that returned is on the disk, whatever fails after; a call that raised, or was cancelled, may or may not be;
- calls take effect in the order in which they were made. Appends that wait for the disk together share one write and one fsync;
- nothing here decides: votes, terms and entries are Raft's. Only what no Raft server does is refused (ValueError): a second
  vote in a term, an entry of a term beyond the stored one, a gap;
- no task of its own: whoever waits does the disk's work for those before it, shielded from cancellation for one step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import trio

from grid.blobs.disk import Disk
from grid.core.journal_frames import OVERHEAD_BYTES
from grid.core.journal_log import Outline
from grid.core.journal_records import DATA_BYTES_MAX, VOTE_BYTES_MAX, Cut, Entry, HardState, Record, Snapshot
from grid.journal_errors import (
    JournalBusy,
    JournalClosed,
    JournalDamaged,
    JournalError,
    JournalFailed,
    JournalFull,
    Recovered,
)
from grid.journal_files import STATE_BYTES, FaultHook, JournalFiles, destroy, no_fault

BATCH_BYTES_MAX: Final = 8 << 20
"""Of data that share one fsync: more would make the first wait for the last."""
WAITING_BYTES_MAX: Final = 64 << 20
"""Of data that wait for a slow disk; beyond it appends are refused. A single larger one is taken when nothing waits."""
COMPACT_BYTES_MIN: Final = 1 << 20
"""Of log after the last rewrite: below it a snapshot is not worth its fsyncs."""


class _Step:
    """One piece of work for the disk, and those who wait for it."""

    def __init__(self, work: Callable[[], None], apply: Callable[[Outline], None]) -> None:
        self.work = work
        self.apply = apply  # what it does to the log, once it is done
        self.lot = trio.lowlevel.ParkingLot()
        self.data_bytes = 0
        self.settled = False
        self.error: JournalError | None = None

    def settle(self, error: JournalError | None) -> None:
        self.settled, self.error = True, error
        self.lot.unpark_all()


class _Append(_Step):
    """Records of one or several calls: one batch."""

    def __init__(self, files: JournalFiles) -> None:
        self.records: list[Record] = []
        super().__init__(lambda: files.append(self.records), self._apply)

    def _apply(self, outline: Outline) -> None:
        for record in self.records:
            outline.apply(record)


class Journal:
    """Made by `create` and `open`. Any number of tasks may call it at once."""

    def __init__(self, files: JournalFiles, disk: Disk, outline: Outline) -> None:
        self._files = files
        self._disk = disk
        self._stored = outline  # what is on the disk
        self._staged = outline.copy()  # what will be there when all that waits is done
        self._hard = self._staged_hard = files.hard
        self._queue: deque[_Step] = deque()
        self._working = False
        self._dead: JournalError | None = None

    @classmethod
    async def create(
        cls, folder: Path, job: bytes, disk: Disk, *, incarnation: int, at: FaultHook = no_fault
    ) -> tuple[Journal, Recovered]:
        """A new, empty journal. JournalExists, JournalFull, JournalFailed; what a crash left is JournalMissing for `open`.

        incarnation: of this replica; a journal that replaces a lost or damaged one must have a new one.
        """
        with trio.CancelScope(shield=True):
            files = await disk.run(JournalFiles.create, folder, job, disk, incarnation, at)
        return cls(files, disk, Outline()), Recovered(incarnation)

    @classmethod
    async def open(cls, folder: Path, job: bytes, disk: Disk, *, at: FaultHook = no_fault) -> tuple[Journal, Recovered]:
        """Read, verify and rewrite a journal. JournalDamaged (and JournalMissing), JournalFull, JournalFailed."""
        with trio.CancelScope(shield=True):
            files, recovered = await disk.run(JournalFiles.open, folder, job, disk, at)
        outline = Outline()
        if recovered.snapshot:
            outline.rebase(recovered.snapshot.index, recovered.snapshot.term)
        for entry in recovered.entries:
            outline.apply(entry)
        return cls(files, disk, outline), recovered

    @staticmethod
    async def destroy(folder: Path, disk: Disk) -> None:
        """Forget the journal in `folder`, which nobody has open. OSError if the disk won't."""
        await disk.run(destroy, folder, disk)

    @property
    def hard_state(self) -> HardState:
        """What is on the disk."""
        return self._hard

    @property
    def last_index(self) -> int:
        """Of the newest entry on the disk, or of the snapshot."""
        return self._stored.last_index

    @property
    def bytes_used(self) -> int:
        """On the disk."""
        return self._files.log_bytes + STATE_BYTES

    @property
    def wants_compact(self) -> bool:
        """Has the log grown by so much that a snapshot pays? A rewrite then costs no more than the appends before it."""
        return self._files.log_bytes - self._files.base_bytes >= max(COMPACT_BYTES_MIN, self._files.base_bytes)

    async def append(self, records: Sequence[Record]) -> None:
        """Entries, and cuts of conflicting suffixes, in this order: all on the disk, or none.

        ValueError if one doesn't follow; JournalBusy, JournalFull, JournalFailed.
        """
        self._check_alive()
        if not records:
            return
        data_bytes = sum(OVERHEAD_BYTES + len(record.data) if isinstance(record, Entry) else OVERHEAD_BYTES for record in records)
        waiting_bytes = sum(step.data_bytes for step in self._queue)
        if waiting_bytes and waiting_bytes + data_bytes > WAITING_BYTES_MAX:
            raise JournalBusy("too much waits for this machine's disk")
        staged = self._staged.copy()
        for record in records:
            if isinstance(record, Entry):
                self._check_storable(record)
            staged.apply(record)
        self._staged = staged
        await self._do(self._batch(records, data_bytes))

    async def truncate(self, index: int) -> None:
        """Drop the entry at `index` and all after it. Errors as of `append`."""
        await self.append([Cut(index)])

    async def set_hard_state(self, term: int, vote: bytes | None) -> None:
        """Store both copies. ValueError for an older term or another vote in the same one; JournalFull, JournalFailed."""
        self._check_alive()
        old, new = self._staged_hard, HardState(term, vote)
        if term < old.term or (term == old.term and old.vote not in (None, vote)):
            raise ValueError(f"term {term} with this vote can't follow term {old.term}")
        if vote is not None and not 0 < len(vote) <= VOTE_BYTES_MAX:
            raise ValueError("not a peer's id")
        if new == self._hard and new == old:
            return
        self._staged_hard = new
        await self._do(self._enqueue(_Step(lambda: self._files.store(new), lambda _: None)))

    async def install_snapshot(self, index: int, term: int, data: bytes) -> None:
        """Put a leader's snapshot in the log's place; entries after it stay where the log has that entry with that term.

        ValueError if it is no newer than the last one; JournalFull (the old log stands), JournalFailed, JournalDamaged.
        """
        self._check_alive()
        snapshot = Snapshot(index, term, data)
        self._check_storable(snapshot)
        self._staged.rebase(index, term)
        step = _Step(lambda: self._files.snapshot(snapshot), lambda outline: outline.rebase(index, term))
        await self._do(self._enqueue(step))

    async def compact(self, index: int, data: bytes) -> None:
        """Let `data` stand for all entries up to `index`, which were applied. Errors as of `install_snapshot`."""
        self._check_alive()
        term = self._staged.term_at(index)
        if term is None:
            raise ValueError(f"no entry {index} to compact to")
        await self.install_snapshot(index, term, data)

    async def close(self) -> None:
        """Do what waits, then close the files. Always closes them; later calls raise JournalClosed."""
        with trio.CancelScope(shield=True):
            if self._dead is None:
                step = self._enqueue(_Step(lambda: self._files.close(sync=True), lambda _: None))
                self._dead = JournalClosed("the journal was closed")
                await self._until(step)
            elif not self._working:
                await self._disk.run(self._files.close)

    # ---- one step at a time --------------------------------------------------------------------------------------------------

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise _again(self._dead)

    def _check_storable(self, record: Entry | Snapshot) -> None:
        if record.term > self._staged_hard.term:
            raise ValueError(f"entry {record.index} is of term {record.term}, which was not stored")
        if len(record.data) > DATA_BYTES_MAX:
            raise ValueError(f"entry {record.index} has {len(record.data)} bytes, a journal takes {DATA_BYTES_MAX}")

    def _batch(self, records: Sequence[Record], data_bytes: int) -> _Step:
        """The batch that waits last, if these records fit; else a new one."""
        step = self._queue[-1] if self._queue else None
        if not isinstance(step, _Append) or step.data_bytes + data_bytes > BATCH_BYTES_MAX:
            step = _Append(self._files)
            self._enqueue(step)
        step.records += records
        step.data_bytes += data_bytes
        return step

    def _enqueue(self, step: _Step) -> _Step:
        self._queue.append(step)
        return step

    async def _do(self, step: _Step) -> None:
        await self._until(step)
        if step.error is not None:
            raise _again(step.error)

    async def _until(self, step: _Step) -> None:
        while not step.settled:
            if self._working:
                await step.lot.park()
            else:
                await self._work()

    async def _work(self) -> None:
        """Do the first step that waits, then wake someone to do the next."""
        step = self._queue.popleft()
        self._working = True
        try:
            with trio.CancelScope(shield=True):
                await self._disk.run(step.work)
        except JournalFull as error:
            step.settle(error)
            self._drop_waiting(error)
        except (JournalFailed, JournalDamaged) as error:
            step.settle(error)
            self._die(error)
        except BaseException:
            broken = JournalFailed("the journal's work was broken off")
            step.settle(broken)
            self._die(broken)
            raise
        else:
            step.apply(self._stored)
            self._hard = self._files.hard
            step.settle(None)
        finally:
            self._working = False
            self._wake()

    def _wake(self) -> None:
        """Those of the first step may have been cancelled: any task that waits for a later one will do it."""
        for step in self._queue:
            if step.lot.unpark():
                return

    def _drop_waiting(self, error: JournalError) -> None:
        """What waits was to follow what failed."""
        closing = self._queue.pop() if isinstance(self._dead, JournalClosed) and self._queue else None
        while self._queue:
            self._queue.popleft().settle(error)
        if closing is not None:
            self._queue.append(closing)
        self._staged = self._stored.copy()
        self._staged_hard = self._hard

    def _die(self, error: JournalError) -> None:
        if not isinstance(self._dead, JournalClosed):
            self._dead = error
        self._drop_waiting(error)


def _again(error: JournalError) -> JournalError:
    """The same news for one more task: an exception raised twice would gather both tracebacks."""
    if isinstance(error, JournalDamaged):
        return JournalDamaged(error.why, error.salvaged)
    return type(error)(str(error), error.hint)
