"""Planted bugs: each breaks a promise that no run without crashes shows, and random lives must find it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grid import journal_files
from grid.core import journal_frames
from grid.journal_errors import JournalError
from grid.journal_files import POINTS, JournalFiles
from tests.journal.disks import Inode, MemoryDisk
from tests.journal.world import torture

SEEDS_MAX = 400

Plant = Callable[[pytest.MonkeyPatch], None]


def skip_fsyncs_of(method: str) -> Plant:
    """Files, not folders, are not synced while this method runs."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        real: Callable[..., Any] = getattr(JournalFiles, method)
        sync = MemoryDisk.fsync

        def careless(self: JournalFiles, *arguments: Any) -> Any:
            with pytest.MonkeyPatch.context() as inner:
                inner.setattr(MemoryDisk, "fsync", lambda d, fd: None if isinstance(d.fds[fd], Inode) else sync(d, fd))
                return real(self, *arguments)

        patch.setattr(JournalFiles, method, careless)

    return plant


def skip_folder_fsync(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(journal_files, "sync_folder", lambda disk, folder: None)


def append_after_a_failed_write(patch: pytest.MonkeyPatch) -> None:
    """The old file goes on where the last acknowledged byte was, the failed write's rest behind it."""
    real = JournalFiles.append

    def append(self: JournalFiles, records: Any) -> None:
        self._must_rewrite = False
        real(self, records)

    patch.setattr(JournalFiles, "append", append)


def believe_the_page_cache(patch: pytest.MonkeyPatch) -> None:
    """`open` goes on with the file it read, if it was whole."""
    real = JournalFiles._rewrite

    def rewrite(self: JournalFiles, log: Any) -> None:
        if self._log_fd < 0 or self.log_bytes:
            return real(self, log)
        ending_bytes = self._disk.names[self._folder / "log"].seen  # type: ignore[attr-defined]
        reader, size = self._scan(None)
        if reader.finish().good_bytes != len(ending_bytes):
            return real(self, log)
        self.log_bytes = self.base_bytes = size
        self._must_rewrite = True
        return None

    patch.setattr(JournalFiles, "_rewrite", rewrite)


def forget_the_snapshot(patch: pytest.MonkeyPatch) -> None:
    real = JournalFiles._batches

    def batches(self: JournalFiles, writer: Any, log: Any) -> Any:
        log.snapshot = None
        return real(self, writer, log)

    patch.setattr(JournalFiles, "_batches", batches)


def keep_half_batches(patch: pytest.MonkeyPatch) -> None:
    real = journal_frames.FrameWriter.encode

    def encode(self: journal_frames.FrameWriter, frames: Any, *, more: bool = False) -> bytes:
        return b"".join(real(self, [frame], more=self._batch == 0 and (more or frame is not frames[-1])) for frame in frames)

    patch.setattr(journal_frames.FrameWriter, "encode", encode)


def take_torn_for_damaged(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(journal_frames.JournalReader, "_is_cut_short", lambda self: False)


def ignore_checksums(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(journal_frames._Chain, "link", lambda self, head, payload: bytes(16))
    patch.setattr(journal_frames._Chain, "advance", lambda self, value: None)


PLANTS: dict[str, Plant] = {
    "no fsync after an append": skip_fsyncs_of("append"),
    "no fsync after a vote": skip_fsyncs_of("store"),
    "no fsync of a rewritten log": skip_fsyncs_of("_write_log"),
    "no fsync of a new state file": skip_fsyncs_of("_create_state"),
    "no fsync of the folder": skip_folder_fsync,
    "append after a failed write": append_after_a_failed_write,
    "believe the page cache": believe_the_page_cache,
    "forget the snapshot": forget_the_snapshot,
    "half a batch counts": keep_half_batches,
    "torn is damaged": take_torn_for_damaged,
    "no checksums": ignore_checksums,
}


async def find(folder: Path) -> int | None:
    """The first seed whose life goes wrong."""
    for seed in range(SEEDS_MAX):
        try:
            await torture(seed, folder / str(seed), POINTS)
        except (AssertionError, JournalError, ValueError):
            return seed
    return None


@pytest.mark.parametrize("name", PLANTS)
async def test_random_lives_find_a_planted_bug(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    PLANTS[name](monkeypatch)
    assert await find(tmp_path) is not None, f"{name}: not found in {SEEDS_MAX} seeds"
