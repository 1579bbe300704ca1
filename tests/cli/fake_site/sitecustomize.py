"""On the path of the commands under test: `grid.peer` and `grid.pack` are the fakes beside this file."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

FAKES = {"grid.peer": "fake_peer.py", "grid.pack": "fake_pack.py"}


class Finder:
    """Finds the fakes before the real modules."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        file = FAKES.get(name)
        return importlib.util.spec_from_file_location(name, Path(__file__).with_name(file)) if file else None


sys.meta_path.insert(0, Finder())
