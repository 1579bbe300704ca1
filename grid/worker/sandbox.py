"""Where confinement goes: a sandbox turns the command line of a zygote into one that runs confined.

Everything a zygote forks is inside the same sandbox. What a sandbox can't give, it must refuse: it fails closed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Bind:
    """A folder or file that the processes may see, at the same path."""

    path: str
    writable: bool = False


class Sandbox(Protocol):
    """How a zygote is started."""

    def wrap(self, argv: Sequence[str], env: Mapping[str, str], fds: Sequence[int], binds: Sequence[Bind]) -> list[str]:
        """Return the command that runs `argv` with exactly `env`, the descriptors `fds` and `binds`. OSError: it can't."""
        ...


class NoSandbox:
    """Runs processes as they are, with all rights of the peer's user."""

    def wrap(self, argv: Sequence[str], env: Mapping[str, str], fds: Sequence[int], binds: Sequence[Bind]) -> list[str]:
        """Return `argv`."""
        return list(argv)
