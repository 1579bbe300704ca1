"""Measures one machine's worker processes: start, calls a second by bundle size, memory. `python benchmarks/workers.py`.

Prints a table; nothing is asserted. Figures of shared machines scatter: compare only within one run.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trio

sys.path.insert(0, str(Path(__file__).parents[1]))

from grid.api import serialize, wire
from grid.worker.pool import Child, JobProcesses, WorkerPool

SEGMENT_BYTES = 64 << 10
DEPTH = 2
"""Runs that a worker has at once."""


def setup(folder: str) -> wire.Setup:
    """Of a job that does nothing else."""
    return wire.Setup("worker", "00" * 16, "benchmark", "", 1, f"{folder}/job.py", (), folder, folder)


def pss_kib(pid: int) -> int:
    """Proportional set size of a process."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1])
    return 0


def median_ms(times_s: list[float]) -> str:
    """Median and worst."""
    return f"{1e3 * statistics.median(times_s):.1f} ms (worst {1e3 * max(times_s):.1f})"


async def starts(pool: WorkerPool, folder: str, rounds: int) -> None:
    """How long jobs and workers take to start."""
    opens, workers, firsts = [], [], []
    for _ in range(rounds):
        await trio.sleep(0.3)  # a spare server is there again
        began = time.perf_counter()
        job = await pool.open_job(setup=setup(folder))
        opens.append(time.perf_counter() - began)
        child = await job.start_worker()
        workers.append(time.perf_counter() - began - opens[-1])
        await child.send(wire.Function(0), serialize.dump_function(abs))
        await calls(child, 1, 1)
        firsts.append(time.perf_counter() - began)
        await job.aclose()
    print(f"open a job with a spare server   {median_ms(opens)}")
    print(f"start a worker                   {median_ms(workers)}")
    print(f"open, start, first result        {median_ms(firsts)}")


async def calls(child: Child, bundle: int, bundles: int) -> float:
    """Feed `bundles` bundles of `bundle` calls; return the seconds it took."""
    parts, _ = serialize.dump_segment(range(bundle))
    body = b"".join(parts)
    began = time.perf_counter()
    sent = done = 0
    while sent < min(DEPTH, bundles):
        await child.send(wire.Run(sent, 0, 0, 0, 0, bundle), body)
        sent += 1
    async for message, _ in child.frames:
        if isinstance(message, wire.Failed):
            raise SystemExit(message.traceback)
        if isinstance(message, wire.Done) and message.final:
            done += 1
            if sent < bundles:
                await child.send(wire.Run(sent, 0, 0, 0, 0, bundle), body)
                sent += 1
            if done == bundles:
                break
    return time.perf_counter() - began


async def throughput(job: JobProcesses, functions: dict[str, Callable[..., Any]], budget_s: float) -> None:
    """Calls a second by bundle size, and the round trip of one call."""
    for name, function in functions.items():
        child = await job.start_worker()
        await child.send(wire.Function(0), serialize.dump_function(function))
        await calls(child, 1, 200)
        trips = [await calls(child, 1, 1) for _ in range(500)]
        row = [f"round trip {1e6 * statistics.median(trips):.0f} µs"]
        for bundle in (1, 10, 100, 1_000, 10_000):
            rate = bundle * 50 / await calls(child, bundle, 50)
            bundles = max(50, min(20_000, math.ceil(budget_s * rate / bundle)))
            rate = bundle * bundles / await calls(child, bundle, bundles)
            row.append(f"{bundle}: {rate:,.0f}/s")
        print(f"{name:<32} {'  '.join(row)}")
        child.kill()


def increment(x: int) -> int:
    """The trivial task."""
    return x + 1


def pair(x: int) -> tuple[int, int]:
    """A result that is pickled by itself."""
    return x, x


def with_random(x: int) -> int:
    """In a process where `random` is imported: each task is seeded."""
    import random

    assert random
    return x + 1


async def memory(job: JobProcesses) -> None:
    """What idle processes take."""
    children = [await job.start_worker() for _ in range(4)]
    sizes = [pss_kib(child.pid) / 1024 for child in children]
    print(f"idle worker (1 of 4), PSS        {statistics.median(sizes):.1f} MB")
    for pid in fork_servers():
        print(f"a fork server, PSS               {pss_kib(pid) / 1024:.1f} MB")
    for child in children:
        child.kill()


def fork_servers() -> list[int]:
    """Their pids: the children of this process."""
    pid = os.getpid()
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


async def main(budget_s: float, rounds: int) -> None:
    """Run all."""
    pool = WorkerPool()
    with tempfile.TemporaryDirectory() as folder:
        async with trio.open_nursery() as nursery:
            await nursery.start(pool.run)
            await starts(pool, folder, rounds)
            job = await pool.open_job(setup=setup(folder))
            await memory(job)
            functions = {"x + 1": increment, "(x, x)": pair, "x + 1, random imported": with_random}
            await throughput(job, functions, budget_s)
            nursery.cancel_scope.cancel()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="per figure")
    parser.add_argument("--rounds", type=int, default=10, help="starts measured")
    options = parser.parse_args()
    trio.run(main, options.seconds, options.rounds)
