"""`python -m benchmarks rivals|limits|scale|shapes`; the other programs have modules of their own (README.md)."""

from __future__ import annotations

import importlib
import sys

PROGRAMS = {
    "rivals": "benchmarks.rivals.program",
    "limits": "benchmarks.limits",
    "scale": "benchmarks.scale",
    "shapes": "benchmarks.shapes",
}


def main() -> None:
    """Entry point."""
    name, words = sys.argv[1:2], sys.argv[2:]
    if not name or name[0] not in PROGRAMS:
        raise SystemExit(f"usage: python -m benchmarks {'|'.join(PROGRAMS)} [--help]")
    importlib.import_module(PROGRAMS[name[0]]).main(words)


if __name__ == "__main__":
    main()
