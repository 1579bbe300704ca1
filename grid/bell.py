"""A bell that any number of tasks can wait for: each ring wakes all who wait at that moment."""

from __future__ import annotations

import trio


class Bell:
    """Rings cost nothing while nobody waits."""

    def __init__(self) -> None:
        self._event: trio.Event | None = None

    def ring(self) -> None:
        """Wake all who wait."""
        if self._event is not None:
            self._event.set()
            self._event = None

    async def wait(self) -> None:
        """Return after the next ring."""
        if self._event is None:
            self._event = trio.Event()
        await self._event.wait()
