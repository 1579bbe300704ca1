"""A driver's output when the script is run anew by a later leader: what was shown already is not shown again.

Rules (DESIGN, section 6): released bytes never change; a replay's output is swallowed up to their length and compared with them;
if it differs, that is said once, and output goes on at the next line after them. No I/O: released bytes come by a function.
"""

from __future__ import annotations

from collections.abc import Callable


class Replayed:
    """One stream of one replay. `released(at, size)`: bytes shown before; fewer where they are not to be had."""

    def __init__(self, length: int, released: Callable[[int, int], bytes]) -> None:
        """length: bytes that were shown."""
        self.length = length
        self.at = 0
        self.differs = False
        self._released = released
        self._seeking = False

    def feed(self, data: bytes) -> bytes:
        """The part of the driver's next bytes that is new."""
        if self.at < self.length:
            old, data = data[: self.length - self.at], data[self.length - self.at :]
            known = self._released(self.at, len(old))
            if known != old[: len(known)]:
                self.differs = True
            self.at += len(old)
            if self.at == self.length and self.differs:
                self._seeking = old[-1:] != b"\n"
        self.at += len(data)
        if self._seeking and data:
            end = data.find(b"\n")
            if end < 0:
                return b""
            self._seeking = False
            tail = self._released(self.length - 1, 1)
            return (b"\n" if tail not in (b"\n", b"") else b"") + data[end + 1 :]
        return data

    def end(self) -> None:
        """The stream has ended."""
        if self.at < self.length:
            self.differs = True
