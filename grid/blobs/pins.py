"""Who needs which blob: owners (jobs) pin names, whether the blobs are here yet or not."""

from __future__ import annotations

from grid.blobs.blob import BlobId


class Pins:
    """Blobs by owner, in order (so that what follows is the same in each run), counted by blob."""

    def __init__(self) -> None:
        self._owners: dict[str, dict[BlobId, None]] = {}
        self._counts: dict[BlobId, int] = {}

    def __contains__(self, blob: BlobId) -> bool:
        return blob in self._counts

    def add(self, owner: str, blob: BlobId) -> None:
        """Idempotent."""
        pins = self._owners.setdefault(owner, {})
        if blob not in pins:
            pins[blob] = None
            self._counts[blob] = self._counts.get(blob, 0) + 1

    def drop(self, owner: str, blob: BlobId | None = None) -> list[BlobId]:
        """Drop one pin of `owner`, or all; return the blobs nobody pins any more."""
        pins = self._owners.get(owner, {})
        dropped = list(pins) if blob is None else [blob] if blob in pins else []
        for each in dropped:
            del pins[each]
        if not pins:
            self._owners.pop(owner, None)
        freed = []
        for each in dropped:
            self._counts[each] -= 1
            if not self._counts[each]:
                del self._counts[each]
                freed.append(each)
        return freed
