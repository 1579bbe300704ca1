"""Many tasks: how fast, and how much memory the hungriest process takes.

    python -m benchmarks.tasks             # 100,000 tasks through submit, 1,000,000 through map over a generator
    python -m benchmarks.tasks --peers 3   # the same on a throwaway grid of three peers

Prints a table a job: seconds, tasks a second, the peak resident memory of each process that took part (VmHWM, MB).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SUBMIT = """
import grid
def square(x): return x * x
futures = [grid.submit(square, i) for i in range({n})]
assert sum(future.result() for future in futures) == sum(i * i for i in range({n}))
"""
MAP = """
import grid
def square(x): return x * x
def numbers():
    for i in range({n}):
        yield i
assert sum(grid.map(square, numbers())) == sum(i * i for i in range({n}))
"""
PAYLOAD = """
import grid
def echo(x): return x[::-1]
def blocks():
    for i in range({n}):
        yield i.to_bytes(4, "big") * (256 << 10)
total = 0
for result in grid.map(echo, blocks()):
    total += len(result)
assert total == {n} << 20
"""
POLL_S = 0.02


def descendants(pid: int) -> list[int]:
    """The process and all below it."""
    found, queue = [], [pid]
    while queue:
        each = queue.pop()
        found.append(each)
        try:
            for task in os.listdir(f"/proc/{each}/task"):
                queue += map(int, Path(f"/proc/{each}/task/{task}/children").read_text().split())
        except OSError:
            continue
    return found


def peak_mb(pid: int) -> tuple[str, float] | None:
    """(what it is, VmHWM in MB)."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return None
    line = next((line for line in status.splitlines() if line.startswith("VmHWM")), "")
    if not line:
        return None
    text = b" ".join(words).decode(errors="replace")
    what = "peer" if "grid.embedded" in text or " join " in text else "child" if "zygote" in text or "-c" in text else "script"
    return what, int(line.split()[1]) / 1000


def measure(name: str, script: str, tasks: int, peers: int) -> float:
    """Run one script; print what it took; return the peak of the hungriest process in MB."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.py"
        path.write_text(script)
        command = [sys.executable, str(path)]
        if peers:
            command = [sys.executable, "-m", "cli", "submit", "--local", str(peers), str(path)]
        began_s = time.perf_counter()
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        peaks: dict[int, tuple[str, float]] = {}
        while process.poll() is None:
            for pid in descendants(process.pid):
                peak = peak_mb(pid)
                if peak is not None:
                    peaks[pid] = peak
            time.sleep(POLL_S)
        elapsed_s = time.perf_counter() - began_s
    if process.returncode != 0:
        raise SystemExit(f"{name}: exit status {process.returncode}")
    worst = max(mb for _, mb in peaks.values())
    shown = ", ".join(f"{what} {mb:.0f}" for what, mb in sorted(peaks.values(), key=lambda peak: -peak[1])[:6])
    print(f"{name:34} {elapsed_s:7.2f} s {tasks / elapsed_s:12,.0f} tasks/s   peak {worst:5.0f} MB   ({shown})")
    return worst


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=int, default=0, help="peers of a throwaway grid; 0: the embedded one")
    parser.add_argument("--scale", type=float, default=1.0, help="multiply the numbers of tasks")
    options = parser.parse_args()
    submits, maps, blocks = (int(n * options.scale) for n in (100_000, 1_000_000, 1_000))
    measure("submit, trivial", SUBMIT.format(n=submits), submits, options.peers)
    measure("map over a generator, trivial", MAP.format(n=maps), maps, options.peers)
    measure("map, 1 MiB there and back", PAYLOAD.format(n=blocks), blocks, options.peers)


if __name__ == "__main__":
    main()
