"""An answer that is awaited: one task waits, the link's reader resolves."""

from __future__ import annotations

import trio

from grid.transport.errors import TransportError


class Pending:
    """One answer that is awaited."""

    def __init__(self) -> None:
        self._done = trio.Event()
        self._value: bytes = b""
        self._error: TransportError | None = None

    def resolve(self, value: bytes) -> None:
        self._value = value
        self._done.set()

    def fail(self, error: TransportError) -> None:
        self._error = error
        self._done.set()

    async def wait(self) -> bytes:
        await self._done.wait()
        if self._error is not None:
            raise self._error
        return self._value
