"""Paths that mean the same on every machine: below the script's folder, the working folder, or a folder of sys.path.

A job's code lies in another folder on each peer, and its Python may, too. Where such a path goes into a pickled function (its
file name, `__file__`, a captured `HERE = Path(__file__).parent`), it is written as a place, "{script}/data.txt", and becomes
a path of the process that loads it. So a function's bytes don't tell where they were made, and its paths lead somewhere.
"""

from __future__ import annotations

import functools
import os
import sys
from typing import Any

_SCRIPT, _WORK, _PATH = "{script}", "{work}", "{path}"
_roots: list[tuple[str, str]] = []
"""(folder, what stands for it), the longest first; behind links, too."""
_folders: dict[str, str] = {}
"""What a mark stands for."""


def set_places(script: str, work: str) -> None:
    """Say where this process has the script's folder and its working folder ("": it has none)."""
    given = [(folder.rstrip(os.sep), mark) for folder, mark in ((script, _SCRIPT), (work, _WORK)) if folder.strip(os.sep)]
    behind_links = [(os.path.realpath(folder), mark) for folder, mark in given]
    _roots[:] = sorted([*given, *behind_links], key=lambda root: -len(root[0]))
    _folders.clear()
    _folders.update({mark: folder for folder, mark in given})
    _of_file.cache_clear()
    find.cache_clear()


class Place:
    """Stands in a pickle for a path; loaded, it is the path, as text, in the process that loads it."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text

    def __reduce__(self) -> tuple[Any, ...]:
        return find, (self.text,)


def of_value(value: Any) -> Any:
    """The place of a text that is a path below the script's folder or the working folder; else the value itself."""
    if type(value) is str:
        for folder, mark in _roots:
            if value.startswith(folder) and (len(value) == len(folder) or value[len(folder)] == os.sep):
                return Place(mark + value[len(folder) :])
    return value


def of_file(path: Any) -> Any:
    """The place of a source file, in a job's process also of Python's own and of installed ones; else the value itself."""
    return _of_file(path, tuple(sys.path)) if _roots and type(path) is str and os.path.isabs(path) else path


@functools.lru_cache(maxsize=1024)
def _of_file(path: str, search: tuple[str, ...]) -> Any:
    place = of_value(path)
    if place is not path:
        return place
    for folder in sorted({entry.rstrip(os.sep) for entry in search if os.path.isabs(entry)}, key=len, reverse=True):
        if path.startswith(folder + os.sep):
            return Place(_PATH + path[len(folder) :])
    return path


@functools.lru_cache(maxsize=1024)
def find(text: str) -> str:
    """The path that a place's text stands for here; the text itself if there is no such folder or file here."""
    mark = text[: text.find("}") + 1]
    rest = text[len(mark) :]
    if mark in _folders:
        return _folders[mark] + rest
    if mark == _PATH:
        for entry in sys.path:
            path = entry.rstrip(os.sep) + rest
            if os.path.exists(path):
                return path
    return text
