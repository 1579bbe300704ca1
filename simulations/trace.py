"""What happened in a world, line by line with virtual times: messages, fsyncs, releases. Hashed always, shown on demand."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import trio


class Trace:
    """`show`: gets each line as it happens."""

    def __init__(self, show: Callable[[str], None] | None = None) -> None:
        self.lines = 0
        self._hash = hashlib.blake2b(digest_size=16)
        self._show = show

    def add(self, kind: str, *what: object) -> None:
        """One event."""
        line = f"{trio.current_time():.6f} {kind} {' '.join(map(str, what))}\n"
        self.lines += 1
        self._hash.update(line.encode())
        if self._show is not None:
            self._show(line[:-1])

    @property
    def digest(self) -> str:
        """Of all lines."""
        return self._hash.hexdigest()


def digest(data: bytes) -> str:
    """A short name for bytes."""
    return hashlib.blake2b(data, digest_size=4).hexdigest()
