"""What processes take, read from /proc: proportional set size, resident peak, descendants, numbers inside namespaces."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

KIB_MB = 1024 / 1e6


def tree(root: int) -> list[int]:
    """A process and all that descend from it, whatever session they are in; no zombies."""
    parents: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
                if fields[0] not in "ZX":
                    parents.setdefault(int(fields[1]), []).append(int(name))
    found, left = [root], [root]
    while left:
        children = parents.get(left.pop(), [])
        found += children
        left += children
    return found


def _kib(path: str, field: str) -> int:
    with contextlib.suppress(OSError):
        for line in Path(path).read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1])
    return 0


def pss_mb(*pids: int) -> float:
    """Proportional set size: shared pages count in parts. MB of 10^6 bytes."""
    return sum(_kib(f"/proc/{pid}/smaps_rollup", "Pss:") for pid in pids) * KIB_MB


def peak_mb(pid: int) -> float:
    """Largest resident size since the start or `forget_peak`."""
    return _kib(f"/proc/{pid}/status", "VmHWM:") * KIB_MB


def forget_peak(pid: int) -> None:
    """Begin to count anew."""
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/clear_refs").write_text("5")


def outer_pid(root: int, inner: int) -> int | None:
    """The process below `root` that calls itself `inner` (in a sandbox a process has a number of its own)."""
    for pid in tree(root):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                if line.startswith("NSpid:") and int(line.split()[-1]) == inner:
                    return pid
    return None
