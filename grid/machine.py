"""What a peer takes from the machine it runs on: time, entropy, disks, processes, the local socket.

The one seam between the composition root and what a simulated world replaces. Rules: no policy here; whoever replaces a
method keeps its contract.
"""

from __future__ import annotations

import os
import time
from typing import Any

from dht.node import Node
from grid.blobs.disk import Disk, RealDisk
from grid.config import Home
from grid.control import Control
from grid.worker.pool import WorkerPool


class Machine:
    """The real one."""

    def wall_s(self) -> float:
        """Unix time."""
        return time.time()

    def entropy(self, count: int) -> bytes:
        """Secret random bytes."""
        return os.urandom(count)

    def pool(self, spare_zygotes: int) -> WorkerPool:
        """Where the peer's child processes come from."""
        return WorkerPool(spare_zygotes=spare_zygotes)

    def control(self, home: Home) -> Control:
        """Where this machine's commands come in."""
        return Control(home)

    def node(self, **options: Any) -> Node:
        """The peer's place in the DHT; options are `Node`'s."""
        return Node(**options)

    def journal_disk(self) -> Disk:
        """Where replicas of jobs' ledgers are kept."""
        return RealDisk()

    def at(self, point: str) -> None:
        """Told of each named point of the ledger as it is passed: where a simulation kills the machine."""
