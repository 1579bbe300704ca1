"""grid.files and grid.File: the job's inputs.

Names are relative to the script's folder, with "/". Where the job was submitted, inputs are what `--file` named, listed in
the job's manifest; under plain `python job.py` they are the files themselves. A file outside the script's folder keeps
the path by which it was given, "../data/a.txt" or "/data/a.txt"; one of Python's own library is "{stdlib}/os.py" on every
machine. Dotfiles are never inputs.

In a manifest (JSON: [[name, size, blob, offset]...]) a name has no leading "/" and no ".."; see `manifest_name`. Small
files are packed several to a blob, so that opening ten thousand takes a hundred requests.
"""

from __future__ import annotations

import builtins
import io
import json
import os
import posixpath
import re
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import IO, Any, TypeAlias

from grid.api import serialize, wire
from grid.api.errors import GridError
from grid.api.session import Session, attached, current

PACKS_OPEN_MAX = 32
"""Packs kept mapped: files come in the manifest's order, a worker reads few packs at a time."""

STDLIB = "{stdlib}"
"""At the head of a pattern: the folder of the running Python's own library, wherever that is on this machine."""
PEER_HOME = frozenset({"identity", "machine.json"})
"""What tells a peer's home (see grid/config.py): its secret key never travels as an input."""
INSTALLED = ("site-packages/", "dist-packages/")


class File(os.PathLike[str]):
    """One input file: a path for whatever takes one; fetched where it is first opened."""

    __slots__ = ("_blob", "_blob_size", "_here", "_offset", "_path", "name", "size")

    def __init__(self, name: str, size: int, path: str = "", blob: str = "", blob_size: int = 0, offset: int = 0) -> None:
        self.name = name
        """Relative to the script's folder."""
        self.size = size
        """Bytes."""
        self._path = path
        self._here = path
        """Where it lies on this machine, once that is known. It stays here when the File travels."""
        self._blob = blob
        self._blob_size = blob_size
        self._offset = offset

    def __fspath__(self) -> str:
        if not self._here:
            name = manifest_name(self.name)
            self._here = current().request(lambda number: wire.OpenInput(number, name)).path
        return self._here

    def read_bytes(self) -> bytes:
        """Return the content. Raises GridError, OSError."""
        if self._here or not self._blob:
            with builtins.open(self, "rb") as file:
                return file.read()
        return bytes(_packs.get(self._blob, self._blob_size)[self._offset : self._offset + self.size])

    def read_text(self, encoding: str | None = None, errors: str | None = None, newline: str | None = None) -> str:
        """Return the content as text, UTF-8 unless `encoding` says otherwise."""
        with self.open("r", encoding=encoding, errors=errors, newline=newline) as file:
            text: str = file.read()
        return text

    def open(
        self, mode: str = "r", encoding: str | None = None, errors: str | None = None, newline: str | None = None
    ) -> IO[Any]:
        """Open for reading, "r" or "rb". Raises ValueError for another mode."""
        if mode not in ("r", "rt", "rb"):
            raise ValueError(f"an input file can only be read: mode {mode!r}")
        packed = self._blob and not self._here
        binary: IO[Any] = io.BytesIO(self.read_bytes()) if packed else builtins.open(self, "rb")  # noqa: SIM115
        if mode == "rb":
            return binary
        return io.TextIOWrapper(binary, encoding=encoding or "utf-8", errors=errors, newline=newline)

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"<grid.File {self.name}, {self.size} bytes>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, File) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.name)

    def __lt__(self, other: File) -> bool:
        return self.name < other.name

    def __reduce__(self) -> tuple[Any, ...]:
        if not self._blob:
            return File, (self.name, self.size, self._path)
        serialize.note_ref(self._blob)
        return File, (self.name, self.size, "", self._blob, self._blob_size, self._offset)


def files(pattern: str | os.PathLike[str] = "**") -> list[File]:
    """Return the input files that the pattern names, sorted by name.

    `*` and `?` stay within a folder, `**` spans folders, `[abc]` is one of a set; a folder's name means all files in it.
    Raises FileNotFoundError when nothing matches.
    """
    text = os.fspath(pattern)
    session = attached()
    submitted = session if session is not None and session.setup.inputs else None
    found = _local(_script_folder(session), text) if submitted is None else _listed(submitted, text)
    if not found:
        where = "" if submitted is None else " among the files submitted with this job"
        raise FileNotFoundError(f"no file matches {text!r}{where}: submit with --file {_shown(text)}")
    return found


def _shown(text: str) -> str:
    return f"'{text}'" if re.search(r"[^\w./-]", text) else text


# ---- names and patterns ----------------------------------------------------------------------------------------------


def manifest_name(name: str) -> str:
    """Return the form a name has in a manifest: below one folder, whatever it is. Inverse of `plain_name`."""
    if name.startswith("/"):
        return "@" + name
    parts = posixpath.normpath(name).split("/")
    ups = sum(1 for part in parts if part == "..")
    if ups:
        return "/".join([f"@up{ups}", *parts[ups:]])
    return "/".join(parts)


def plain_name(name: str) -> str:
    """Return what people call the file of this manifest name."""
    if name.startswith("@/"):
        return name[1:]
    match = re.match(r"@up(\d+)/", name)
    if match:
        return "../" * int(match[1]) + name[match.end() :]
    return name


def matcher(pattern: str) -> Callable[[str], bool]:
    """Return whether a (plain) name matches the pattern, or lies in a folder that does."""
    text = pattern if pattern.startswith("/") else posixpath.normpath(pattern)
    if text == ".":
        return lambda name: not name.startswith(("/", "../"))
    out = ""
    parts = text.split("/")
    for position, part in enumerate(parts):
        last = position == len(parts) - 1
        if part == "**":
            out += r"(?:[^/]+/)*" + ("[^/]+" if last else "")
        else:
            out += _translate(part) + ("" if last else "/")
    return re.compile(rf"(?s:{out})(?:/.*)?\Z").match  # type: ignore[return-value]


def _translate(part: str) -> str:
    """A regular expression for one part of a glob pattern."""
    out, position = "", 0
    while position < len(part):
        char = part[position]
        position += 1
        if char == "*":
            out += "[^/]*"
        elif char == "?":
            out += "[^/]"
        elif char == "[" and (end := part.find("]", position + 1)) > 0:
            inner = part[position:end].replace("\\", "\\\\")
            out += "(?!/)[" + ("^" + inner[1:] if inner[0] in "!^" else inner) + "]"
            position = end + 1
        else:
            out += re.escape(char)
    return out


def has_magic(text: str) -> bool:
    """Whether the text is a pattern rather than a path."""
    return any(char in text for char in "*?[")


Skipped: TypeAlias = Callable[[str, str], None]
"""Told of what a walk leaves out: relative path, reason."""


def walk(folder: str, skipped: Skipped | None = None) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Yield (path relative to the folder with "/", entry) of all regular files below it, links followed, no dotfiles.

    A folder met twice on the way down (a loop of links) is entered once.
    """
    skip = skipped or _ignore
    stack: list[tuple[str, str, frozenset[tuple[int, int]]]] = [(folder, "", _key(folder))]
    while stack:
        path, prefix, above = stack.pop()
        try:
            with os.scandir(path) as scan:
                entries = sorted(scan, key=lambda entry: entry.name)
        except OSError as error:
            skip(prefix, error.strerror or "it can't be read")
            continue
        if {entry.name for entry in entries} >= PEER_HOME:
            skip(prefix or path, "it is a peer's home, with its key")
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            try:
                if entry.is_dir():
                    key = _key(entry.path)
                    if key and key <= above:
                        skip(prefix + entry.name, "the link leads back up")
                    else:
                        stack.append((entry.path, f"{prefix}{entry.name}/", above | key))
                elif entry.is_file():
                    yield prefix + entry.name, entry
                else:
                    skip(prefix + entry.name, "not a regular file")
            except OSError as error:
                skip(prefix + entry.name, error.strerror or "it can't be read")


def _key(folder: str) -> frozenset[tuple[int, int]]:
    """A folder's identity, as a set of one."""
    try:
        stat = os.stat(folder)
    except OSError:
        return frozenset()
    return frozenset({(stat.st_dev, stat.st_ino)})


def _ignore(path: str, reason: str) -> None:
    pass


def library(pattern: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Yield (name, entry) of the files of Python's own library that a pattern under STDLIB names.

    What was installed into it is not of it.
    """
    import sysconfig

    folder = sysconfig.get_path("stdlib")
    matches = matcher(pattern)
    for relative, entry in walk(folder):
        if not relative.startswith(INSTALLED) and matches(f"{STDLIB}/{relative}"):
            yield f"{STDLIB}/{relative}", entry


def _local(folder: str, pattern: str) -> list[File]:
    """Match real files, relative to the folder."""
    if pattern == STDLIB or pattern.startswith(STDLIB + "/"):
        return sorted(File(name, entry.stat().st_size, entry.path) for name, entry in library(pattern))
    absolute = os.path.isabs(pattern)
    text = posixpath.normpath(pattern)
    fixed = []
    for part in text.split("/"):
        if has_magic(part):
            break
        fixed.append(part)
    start = "/".join(fixed) or ("/" if absolute else "")
    root = start if absolute else os.path.join(folder, start)
    if os.path.isfile(root):
        if os.path.basename(root).startswith("."):
            return []
        return [File(start, os.stat(root).st_size, os.path.abspath(root))]
    matches = matcher(pattern)
    prefix = "" if start in ("", ".") else start.rstrip("/") + "/"
    found = [
        File(prefix + relative, entry.stat().st_size, os.path.abspath(entry.path))
        for relative, entry in walk(root)
        if matches(prefix + relative)
    ]
    found.sort()
    return found


def _script_folder(session: Session | None) -> str:
    if session is not None and session.setup.script:
        return os.path.dirname(os.path.abspath(session.setup.script))
    main = getattr(sys.modules.get("__main__"), "__file__", None)
    return os.path.dirname(os.path.abspath(main)) if main else os.getcwd()


# ---- submitted inputs ------------------------------------------------------------------------------------------------

_manifests: dict[str, list[File]] = {}
_lock = threading.Lock()


def _listed(session: Session, pattern: str) -> list[File]:
    with _lock:
        listed = _manifests.get(session.setup.job)
        if listed is None:
            path = session.request(wire.ListInputs).path
            listed = _manifests[session.setup.job] = _read_manifest(path) if path else []
    matches = matcher(pattern)
    return [file for file in listed if matches(file.name)]


def _read_manifest(path: str) -> list[File]:
    with builtins.open(path, "rb") as manifest:
        rows = json.load(manifest)
    sizes: dict[str, int] = {}
    for row in rows:
        if len(row) > 3:
            sizes[row[2]] = max(sizes.get(row[2], 0), row[3] + row[1])
    listed = [
        File(plain_name(row[0]), row[1], "", row[2], sizes[row[2]], row[3]) if len(row) > 3 else File(plain_name(row[0]), row[1])
        for row in rows
    ]
    listed.sort()
    return listed


class _Packs:
    """Mapped packs, those used last."""

    def __init__(self) -> None:
        self._views: OrderedDict[str, memoryview] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, blob: str, size: int) -> memoryview:
        with self._lock:
            view = self._views.get(blob)
            if view is not None:
                self._views.move_to_end(blob)
                return view
        path = current().request(lambda number: wire.Fetch(number, blob, size)).path
        try:
            view = serialize.map_file(path, private=False)
        except OSError as error:
            raise GridError(f"an input file can't be read: {error}") from error
        with self._lock:
            self._views[blob] = view
            while len(self._views) > PACKS_OPEN_MAX:
                self._views.popitem(last=False)
        return view


_packs = _Packs()
