"""The disk that loses power is the simulated world's."""

from __future__ import annotations

from simulations.disk import SECTOR_BYTES, Inode, MemoryDisk, overlay, sectors

__all__ = ["SECTOR_BYTES", "Inode", "MemoryDisk", "overlay", "sectors"]
