"""Time that counts suspend: what leases are checked with (DESIGN, section 6).

trio's clock stands still while a laptop sleeps (CLOCK_MONOTONIC), so a lease measured by it would outlive the sleep. Rules:
never goes back, seconds, its zero means nothing. Where the system has no such clock (not Linux) the monotonic one must do.
"""

from __future__ import annotations

import time
from typing import Final

_CLOCK: Final = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def now_s() -> float:
    """CLOCK_BOOTTIME, clock_gettime(2)."""
    return time.clock_gettime(_CLOCK)
