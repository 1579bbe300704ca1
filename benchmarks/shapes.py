"""Work of real shapes on several peers: how near stealing and placement come to the least time that the shape allows.

    python -m benchmarks shapes [--peers 4] [--slots 2] [--only SHAPE …] [--json FILE]

Tasks sleep, so that this machine's cores aren't the limit. The *bound* of a shape is the larger of its work over all workers and
of what can't be divided (the longest task, the pauses of its script); *efficiency* is the bound over the time it took, from the
script's first call to its last result. `blob`: so many tasks read one blob of 100 MB that the script put; beside it, what
crossed the loopback interface meanwhile, in blobs: one for each peer that lacked it is the least (the machine must be quiet).

Two roles, as benchmarks/rivals/work.py: a program, and the script that it submits (`grid submit shapes.py SHAPE JSON`).
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

UNIT_S = 0.02
BLOB_BYTES = 100_000_000
READS = 10_000
JOB_S = 300.0


def nap(seconds: float) -> float:
    """A task."""
    time.sleep(seconds)
    return seconds


# ---- shapes: each returns the least time, in seconds, that so many workers need; it raises where a result is wrong -------


def uniform(workers: int) -> float:
    """All alike."""
    import grid

    return sum(grid.map(nap, [UNIT_S] * 200 * workers)) / workers


def skewed(workers: int) -> float:
    """One takes a hundred times as long as the others, in the midst of them."""
    import grid

    lengths = [UNIT_S] * 150 * workers
    lengths[len(lengths) // 3] *= 100
    return max(sum(grid.map(nap, lengths)) / workers, max(lengths))


def decreasing(workers: int) -> float:
    """From 0.4 s down to 1 ms: who begins with as many tasks as it ends with starves the rest."""
    import grid

    lengths = [max(0.001, 0.4 * 0.985**i) for i in range(100 * workers)]
    return max(sum(grid.map(nap, lengths)) / workers, lengths[0])


def bursty(workers: int) -> float:
    """Ten bursts of submits; each is waited for, then nothing happens for a while."""
    import grid

    bound_s = 0.0
    for _ in range(10):
        bound_s += sum(future.result() for future in [grid.submit(nap, UNIT_S) for _ in range(20 * workers)]) / workers
        bound_s += nap(0.2)
    return bound_s


def nested(workers: int) -> float:
    """Tasks that map tasks of their own."""
    import grid

    def several(count: int) -> float:
        return sum(grid.map(nap, [UNIT_S] * count))

    return sum(grid.map(several, [20] * 10 * workers)) / workers


def fan_in(workers: int) -> float:
    """Half a megabyte from each of many tasks, all of it into one."""
    import grid

    def make(number: int) -> bytes:
        nap(UNIT_S)
        return number.to_bytes(4, "big") * (1 << 17)

    count = 50 * workers
    parts = list(grid.map(make, range(count)))
    if grid.submit(lambda parts: sum(map(len, parts)), parts).result() != count << 19:
        raise ValueError("not all of it came together")
    return count * UNIT_S / workers


def blob(workers: int) -> float:
    """Many readers of one blob."""
    import grid

    data = os.urandom(1 << 20) * (BLOB_BYTES >> 20)
    wanted = data[12_345]

    def read(number: int, data: bytes) -> int:
        nap(0.001)
        return data[12_345]

    ref = grid.put(data)
    if list(grid.map(read, range(READS), [ref] * READS)) != [wanted] * READS:
        raise ValueError("another blob was read")
    return READS * 0.001 / workers


SHAPES: dict[str, Callable[[int], float]] = {
    each.__name__: each for each in (uniform, skewed, decreasing, bursty, nested, fan_in, blob)
}


def script(name: str, workers: int) -> None:
    """The job: warm all workers, then time one shape."""
    import grid

    for _ in grid.map(nap, [UNIT_S] * 20 * workers):
        pass
    began_s = time.monotonic()
    bound_s = SHAPES[name](workers)
    print(json.dumps({"elapsed_s": time.monotonic() - began_s, "bound_s": bound_s}), flush=True)


# ---- the program -------------------------------------------------------------------------------------------------------


def loopback_bytes() -> int:
    """Received by the loopback interface since the machine started."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, fields = line.partition(":")
        if name.strip() == "lo":
            return int(fields.split()[0])
    return 0


def measured(peers: int, slots: int, names: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each shape on one grid, one after the other."""
    grids: Any = importlib.import_module("tests.e2e.grids")  # not by its name: that module is none of the job's
    with tempfile.TemporaryDirectory() as folder, grids.Grid(Path(folder)) as grid:
        first = grid.found(slots=slots)
        for _ in range(peers - 1):
            grid.join(first, slots=slots)
        grids.until(lambda: len(first.status()["peers"]) == peers, 60.0, "all peers know each other")
        for name in names:
            before = loopback_bytes()
            done = first("submit", __file__, name, str(peers * slots), within_s=JOB_S)
            if done.status:
                raise SystemExit(f"{name} failed: {done.err[-2000:]}")
            values: dict[str, Any] = json.loads(done.out)
            crossed = (loopback_bytes() - before) / BLOB_BYTES
            values |= {"efficiency": values["bound_s"] / values["elapsed_s"], "blobs_crossed": crossed}
            values["peers"] = {peer[:8]: counts["done"] for peer, counts in first.show("last")["peers"].items()}
            yield name, values


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks shapes", description=__doc__, formatter_class=form)
    parser.add_argument("--peers", type=int, default=4)
    parser.add_argument("--slots", type=int, default=2, help="of each peer")
    parser.add_argument("--only", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    found = {}
    print(f"{'shape':12}{'bound s':>9}{'took s':>9}{'efficiency':>12}{'crossed, x 100 MB':>20}   tasks by peer")
    for name, values in measured(options.peers, options.slots, options.only):
        found[name] = values
        figures = f"{values['bound_s']:9.2f}{values['elapsed_s']:9.2f}{values['efficiency']:12.3f}{values['blobs_crossed']:20.2f}"
        print(f"{name:12}{figures}   {' '.join(map(str, values['peers'].values()))}", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps({"schema": 1, "peers": options.peers, "slots": options.slots, "shapes": found}) + "\n")


if __name__ == "__main__":
    script(sys.argv[1], int(sys.argv[2]))
