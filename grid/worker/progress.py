"""The progress cell's layout: wire.PROGRESS (index of the running task or -1, its start), then the ticket and the last index."""

from __future__ import annotations

import struct

from grid.api import wire

CELL = struct.Struct("<qqqq")
CELL_BYTES = 4096
"""A page: what can be mapped."""

assert CELL.format.startswith(wire.PROGRESS.format)
