"""What packing a job can find wrong."""

from __future__ import annotations


class PackError(Exception):
    """`message` is one line that says what is wrong, `hint` what to do (or "")."""

    code = "pack"

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
