"""Measure the ledger's journal on this machine's disk.

    python benchmarks/journal.py [--folder DIR] [--seconds 2]

Each line is a number of writers (each waits for its append before the next) and a record's size: appends a second, what they
carry, how long one fsync took, and the appends that shared it. Next to it the same disk's plain `write` and `fsync`, one after
the other, as ratios travel better than figures.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import trio

from grid.blobs.disk import RealDisk
from grid.core.journal_records import Entry
from grid.journal import Journal

JOB = b"j" * 32
CASES = ((1, 200), (1, 64 << 10), (16, 200), (256, 200), (16, 64 << 10))
"""Writers, bytes of a record: one follower; a leader's batch; group commit, small and large."""


class TimedDisk(RealDisk):
    """Notes how long each fsync took, in seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.fsyncs_s: list[float] = []

    def fsync(self, fd: int) -> None:
        begun = time.perf_counter()
        super().fsync(fd)
        self.fsyncs_s.append(time.perf_counter() - begun)


def percentile_ms(times_s: list[float], percent: int) -> float:
    return statistics.quantiles(times_s, n=100, method="inclusive")[percent - 1] * 1000 if len(times_s) > 1 else times_s[0] * 1000


def plain(folder: Path, size: int, seconds: float) -> float:
    """Writes with an fsync each, a second."""
    data, count = bytes(size), 0
    fd = os.open(folder / "plain", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            os.pwrite(fd, data, count * size)
            os.fsync(fd)
            count += 1
    finally:
        os.close(fd)
    return count / seconds


async def measure(folder: Path, writers: int, size: int, seconds: float) -> tuple[float, list[float]]:
    """Appends a second, and the fsyncs' times."""
    disk = TimedDisk()
    journal, _ = await Journal.create(folder, JOB, disk, incarnation=1)
    await journal.set_hard_state(1, None)
    disk.fsyncs_s.clear()
    data, appended, next_index = os.urandom(size), 0, 1

    async def write() -> None:
        nonlocal appended, next_index
        while time.perf_counter() < end:
            entry = Entry(next_index, 1, data)
            next_index += 1
            await journal.append([entry])
            appended += 1

    begun = time.perf_counter()
    end = begun + seconds
    async with trio.open_nursery() as nursery:
        for _ in range(writers):
            nursery.start_soon(write)
    rate = appended / (time.perf_counter() - begun)
    fsyncs_s = list(disk.fsyncs_s)
    await journal.close()
    return rate, fsyncs_s


async def reopen(folder: Path) -> tuple[int, float]:
    """Bytes of a journal, and how long `open` takes to read, verify and rewrite it."""
    begun = time.perf_counter()
    journal, _ = await Journal.open(folder, JOB, RealDisk())
    took_s = time.perf_counter() - begun
    await journal.close()
    return journal.bytes_used, took_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="where to write (its disk is measured)")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each line")
    options = parser.parse_args()
    print("writers  record B  appends/s    MB/s  fsync ms p50  p99  appends/fsync  plain/s  ratio")
    with tempfile.TemporaryDirectory(dir=options.folder, prefix=".journal-") as name:
        for place, (writers, size) in enumerate(CASES):
            folder = Path(name) / str(place)
            before = plain(Path(name), size, options.seconds / 2)
            rate, fsyncs_s = trio.run(measure, folder, writers, size, options.seconds)
            base = (before + plain(Path(name), size, options.seconds / 2)) / 2
            p50, p99 = percentile_ms(fsyncs_s, 50), percentile_ms(fsyncs_s, 99)
            shared = rate * options.seconds / len(fsyncs_s)
            print(
                f"{writers:7}  {size:8}  {rate:9.0f}  {rate * size / 1e6:6.1f}  {p50:12.2f}  {p99:3.2f}"
                f"  {shared:13.1f}  {base:7.0f}  {rate / base:5.2f}"
            )
        size_bytes, took_s = trio.run(reopen, folder)
        print(f"open: {size_bytes / 1e6:.1f} MB read, verified and rewritten in {took_s * 1000:.0f} ms")


if __name__ == "__main__":
    main()
