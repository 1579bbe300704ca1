"""A stand-in for packing: the script's text and what it was asked with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec


class PackError(Exception):
    """As the real one."""

    code = "pack"

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class Submission(msgspec.Struct):
    """What the fake peer runs."""

    plan: str
    argv: list[str]
    options: dict[str, Any]
    staging: str
    notes: list[str]


def pack(script: Path, args: Sequence[str], options: Mapping[str, Any], staging: Path) -> Submission:
    if not script.is_file():
        raise PackError(f"no such script: {script}")
    assert staging.is_dir()
    notes = ["2 dotfiles were left out"] if "notes" in options.get("with", ()) else []
    return Submission(script.read_text(), list(args), dict(options), str(staging), notes)
