"""Input files → packs and a manifest, streamed into the staging folder.

Small files share packs of about PACK_BYTES, in the order of their names, so that files which are read together travel
together. What is written is what was read: a file that changes meanwhile is consistent with its entry. Links are followed,
dotfiles never taken, what is no regular file is left out with a note. Names are `grid.api.files`'s.
"""

from __future__ import annotations

import json
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from grid.api import files
from grid.pack_errors import PackError

PACK_BYTES = 1 << 20
"""One chunk of a blob: a worker that reads one file fetches at most this much more."""
COPY_BYTES = 1 << 20
FILES_MAX = 1 << 21
NOTES_MAX = 5
"""Files left out that are named one by one."""


@dataclass
class Staged:
    """What was written."""

    manifest: Path
    packs: list[Path]


def stage(specs: Iterable[tuple[str, Path]], home: Path, staging: Path, notes: list[str]) -> Staged:
    """Stage what the specs name: (path, folder or pattern, folder that it is relative to). Raises PackError.

    `home`: the script's folder, which names are relative to.
    """
    found: dict[str, str] = {}
    for spec, base in specs:
        matched = False
        for path in expand(spec, base, notes):
            matched = True
            found[files.manifest_name(_plain_name(path, spec, home))] = path
            if len(found) > FILES_MAX:
                raise PackError(f"more than {FILES_MAX} input files", "put them into fewer, larger files")
        if not matched:
            raise PackError(f"no file matches --file {spec}", "a pattern or path is relative to the folder you are in")
    folder = staging / "packs"
    folder.mkdir(parents=True, exist_ok=True)
    writer = _PackWriter(folder)
    for name in sorted(found):
        writer.add(name, found[name])
    writer.finish()
    manifest = staging / "manifest.json"
    with manifest.open("w", encoding="ascii") as out:
        json.dump(writer.entries, out, separators=(",", ":"))
    return Staged(manifest, writer.packs)


def _plain_name(path: str, spec: str, home: Path) -> str:
    """The name of a file: relative to the script's folder, or absolute if it lies elsewhere and was given so."""
    if spec.startswith(files.STDLIB):
        return f"{files.STDLIB}/{os.path.relpath(path, sysconfig.get_path('stdlib'))}"
    relative = os.path.relpath(path, home)
    if relative.startswith("..") and os.path.isabs(os.path.expanduser(spec)):
        return path
    return relative


def expand(spec: str, base: Path, notes: list[str]) -> Iterator[str]:
    """Yield the absolute paths of the regular files that a path, folder or pattern names."""
    if spec == files.STDLIB or spec.startswith(files.STDLIB + "/"):
        yield from (entry.path for _, entry in files.library(spec))
        return
    spec = os.path.expanduser(spec)
    target = os.path.normpath(os.path.join(base.absolute(), spec))
    if os.path.isdir(target):
        yield from (os.path.join(target, relative) for relative, _ in files.walk(target, _noter(notes, target)))
    elif os.path.isfile(target):
        if os.path.basename(target).startswith("."):
            raise PackError(f"{spec} is a dotfile, and those never travel", "copy it to another name")
        yield target
    elif os.path.lexists(target) and not files.has_magic(spec):
        raise PackError(f"{spec} is not a regular file" if os.path.exists(target) else f"{spec} is a broken link")
    elif files.has_magic(spec):
        fixed = []
        parts = target.split("/")
        for part in parts:
            if files.has_magic(part):
                break
            fixed.append(part)
        root = "/".join(fixed) or "/"
        matches = files.matcher("/".join(parts[len(fixed) :]))
        for relative, _ in files.walk(root, _noter(notes, root)):
            if matches(relative):
                yield os.path.join(root, relative)


def _noter(notes: list[str], root: str) -> files.Skipped:
    def note(relative: str, why: str) -> None:
        if len(notes) < NOTES_MAX:
            notes.append(f"left out {os.path.join(root, relative)}: {why}")
        elif len(notes) == NOTES_MAX:
            notes.append("left out more files, for such reasons")

    return note


class _PackWriter:
    """Fills packs and lists what is where."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._parts: list[bytes] = []
        self._names: list[tuple[str, int, int]] = []
        self._size = 0
        self.packs: list[Path] = []
        self.entries: list[tuple[str, int, str, int]] = []
        self._known: set[str] = set()

    def add(self, name: str, path: str) -> None:
        """Add one file."""
        try:
            with open(path, "rb", buffering=0) as file:
                data = file.read(PACK_BYTES)
                if len(data) == PACK_BYTES or os.fstat(file.fileno()).st_size > len(data):
                    self._add_large(name, data, file)
                    return
        except OSError as error:
            raise PackError(f"the input {path} can't be packed: {error.strerror}") from None
        if self._size + len(data) > PACK_BYTES:
            self._flush()
        self._names.append((name, len(data), self._size))
        self._parts.append(data)
        self._size += len(data)

    def _add_large(self, name: str, data: bytes, file: object) -> None:
        path = self._next()
        digest = blake3()
        size = 0
        with path.open("wb") as out:
            while data:
                digest.update(data)
                out.write(data)
                size += len(data)
                data = file.read(COPY_BYTES)  # type: ignore[attr-defined]
        self._publish(path, digest.hexdigest(), [(name, size, 0)])

    def _flush(self) -> None:
        if not self._names:
            return
        data = b"".join(self._parts)
        path = self._next()
        try:
            path.write_bytes(data)
        except OSError as error:
            raise PackError(f"can't write to {self._folder}: {error.strerror}", "free some space on that disk") from None
        self._publish(path, blake3(data).hexdigest(), self._names)
        self._parts, self._names, self._size = [], [], 0

    def _next(self) -> Path:
        return self._folder / f"{len(self.packs):06}.pack"

    def _publish(self, path: Path, name: str, members: list[tuple[str, int, int]]) -> None:
        """List the members; a pack whose bytes are there already is not kept twice."""
        if name in self._known:
            path.unlink()
        else:
            self._known.add(name)
            self.packs.append(path)
        self.entries += [(member, size, name, offset) for member, size, offset in members]

    def finish(self) -> None:
        """Write what is left."""
        self._flush()
        self.entries.sort()
