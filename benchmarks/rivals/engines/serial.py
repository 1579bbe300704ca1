"""The serial Python program: what one core does without any engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

from benchmarks.rivals.engines.base import Engine


class Serial(Engine):
    """A plain loop."""

    name = "serial"
    rows: ClassVar[frozenset[str]] = frozenset({"words"})

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterable[Any]:
        return map(function, items)
