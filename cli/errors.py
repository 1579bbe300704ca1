"""What went wrong, as an exit status.

`submit`, `wait` and `result` end with the driver's own status, so their failures are kept apart from it: 125 where other
commands say 1 (failed) or 3 (no peer to talk to). 2 is wrong use everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grid.api.client import ControlError

FAILED = 1
WRONG_USE = 2
NO_PEER = 3
TIMED_OUT = 124
GRID_FAILED = 125
DETACHED = 130

JOB_COMMANDS = frozenset({"submit", "wait", "result"})


class Failure(ControlError):
    """A failure of a command whose exit status isn't the usual one for its kind."""

    def __init__(self, code: str, message: str, hint: str = "", *, status: int) -> None:
        super().__init__(code, message, hint)
        self.status = status


class UsageError(Failure):
    """What was typed can't be meant."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__("usage", message, hint, status=WRONG_USE)


def status_of(error: ControlError, command: str) -> int:
    """Return the exit status of `command` after this error."""
    if isinstance(error, Failure):
        return error.status
    if error.code == "usage":
        return WRONG_USE
    if command in JOB_COMMANDS:
        return GRID_FAILED
    return NO_PEER if error.code in ("no-peer", "peer-lost") else FAILED


def status_of_outcome(outcome: Mapping[str, Any]) -> int:
    """Return the exit status that a job's outcome {state, exit_code, signal, error} stands for."""
    error = outcome.get("error") or {}
    if error.get("code") == "timeout":
        return TIMED_OUT
    if outcome.get("state") == "cancelled":
        return DETACHED
    if outcome.get("signal"):
        return 128 + int(outcome["signal"])
    if outcome.get("exit_code") is not None:
        return int(outcome["exit_code"]) & 0xFF
    return 0 if outcome.get("state") == "finished" and not error else GRID_FAILED
