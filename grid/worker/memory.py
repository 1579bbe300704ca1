"""How much memory processes use, from /proc. All answers are 0 or empty where there is no /proc."""

from __future__ import annotations

import os
from collections.abc import Iterator

PROCESSES_MAX = 256
"""Of one tree: a fork bomb must not hold the peer up while it counts."""


def tree(pid: int) -> Iterator[int]:
    """The process and its descendants, as many as PROCESSES_MAX."""
    pending = [pid]
    for _ in range(PROCESSES_MAX):
        if not pending:
            return
        pid = pending.pop()
        yield pid
        try:
            threads = os.listdir(f"/proc/{pid}/task")
        except OSError:
            continue
        for thread in threads:
            try:
                with open(f"/proc/{pid}/task/{thread}/children", encoding="ascii") as file:
                    pending += map(int, file.read().split())
            except OSError:
                continue


def own_bytes(pid: int) -> int:
    """Anonymous and shared memory of one process in bytes: what it took itself, without the files that it maps."""
    total_kib = 0
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith(("RssAnon:", "RssShmem:")):
                    total_kib += int(line.split()[1])
    except (OSError, ValueError):
        return 0
    return total_kib << 10


def tree_bytes(pid: int) -> int:
    """`own_bytes` of a process and its descendants."""
    return sum(map(own_bytes, tree(pid)))


def machine_bytes() -> tuple[int, int]:
    """This machine's memory and how much of it is available, in bytes."""
    total = available = 0
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemTotal:"):
                    total = int(line.split()[1]) << 10
                elif line.startswith("MemAvailable:"):
                    available = int(line.split()[1]) << 10
    except OSError:
        pass
    return total, available
