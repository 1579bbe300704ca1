"""What can go wrong with a journal, and what each means for the replica that keeps it."""

from __future__ import annotations

from dataclasses import dataclass, field

from grid.core.errors import GridError
from grid.core.journal_records import NEVER_VOTED, Entry, HardState, Snapshot


@dataclass(slots=True)
class Recovered:
    """What a journal held: all that was acknowledged, and at most the one write that was under way.

    cut_bytes: length of a torn tail that was left out. repaired: one line for people on each flaw that was mended.
    """

    incarnation: int
    hard_state: HardState = NEVER_VOTED
    snapshot: Snapshot | None = None
    entries: list[Entry] = field(default_factory=list)
    cut_bytes: int = 0
    repaired: tuple[str, ...] = ()


class JournalError(GridError):
    """Base of all of these."""

    code = "journal"


class JournalExists(JournalError):
    """`create` found a journal: open it, or `destroy` it first and come back under a new incarnation."""


class JournalFull(JournalError):
    """No room. Nothing of this call is acknowledged, nor of those that waited behind it; all before is safe. Try again later."""

    code = "no_space"


class JournalBusy(JournalError):
    """More waits for the disk than may: nothing of the call was taken. Try again when an earlier one returned."""


class JournalFailed(JournalError):
    """The disk failed: what was acknowledged is safe, what this call asked for may or may not be. Close it; `open` reads anew."""


class JournalClosed(JournalError):
    """It was closed."""


class JournalDamaged(JournalError):
    """What was acknowledged may be lost, or the vote: the replica must not vote until it is re-added under a new incarnation.

    salvaged: entries before the damage, true but maybe not all; its hard state is not to be trusted.
    """

    code = "journal_damaged"

    def __init__(self, why: str, salvaged: Recovered | None = None) -> None:
        super().__init__(f"this replica's journal is damaged: {why}")
        self.why = why
        self.salvaged = salvaged


class JournalMissing(JournalDamaged):
    """There is none, or its creation was never finished."""

    code = "journal_missing"

    def __init__(self) -> None:
        super().__init__("a file of it is missing")
