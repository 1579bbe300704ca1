"""The first code in a zygote, run by its path: `PYTHON -S -s -P -X utf8 bootstrap.py KEY=VALUE...` (see fork_server.py).

It decides what the job's processes can import, before anything else is imported:

- the bare standard library, and then either the job's environment (`site=`, `prefix=`) or the caller's path (`path=`);
- `grid`, always and first, from the peer's own installation (`grid=` names the folder that holds the package);
- `cloudpickle` and `msgspec` from the peer's copies, last: an environment's own copies win (`fallback=NAME=FOLDER`).

Nothing else of the peer's site-packages is visible. The interpreter runs with -S, so what `site` does for a program is
done here by hand.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


class FolderFinder:
    """Finds the top-level packages it was given, each in its folder; anything else in there stays invisible."""

    def __init__(self, folders: dict[str, str]) -> None:
        self._folders = folders

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Part of the import protocol."""
        folder = self._folders.get(name)
        return None if folder is None else PathFinder.find_spec(name, [folder], target)


def prepare(arguments: list[str]) -> int:
    """Set up importing as the arguments say and return the file descriptor of the control socket."""
    control = -1
    own: dict[str, str] = {}
    fallback: dict[str, str] = {}
    path: list[str] = []
    sites: list[str] = []
    prefix = ""
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key == "control":
            control = int(value)
        elif key == "grid":
            own["grid"] = value
        elif key == "fallback":
            name, _, folder = value.partition("=")
            fallback[name] = folder
        elif key == "path":
            path.append(value)
        elif key == "site":
            sites.append(value)
        elif key == "prefix":
            prefix = value
    sys.meta_path.insert(0, FolderFinder(own))
    sys.meta_path.append(FolderFinder(fallback))
    if prefix:
        sys.prefix = sys.exec_prefix = prefix
    if path:
        sys.path[:] = path

    import site  # with -S this defines functions and does nothing

    site.setquit()
    site.setcopyright()
    site.sethelper()
    known = set(sys.path)
    for folder in sites:
        site.addsitedir(folder, known)
    return control


def main() -> None:
    """Become a zygote; in a forked child, become that child."""
    control = prepare(sys.argv[1:])
    sys.argv[:] = [""]

    from grid.worker import zygote

    become = zygote.serve(control)
    sys.exit(become())  # at the bottom of the stack: a child ends as any Python program does


if __name__ == "__main__":
    main()
