"""Bringing a job's files home: `submit --output` and `result -o`.

- A file that this program did not write is never written over, unless told to; which ones it wrote is kept, with size
  and time, in a small record in the folder.
- Names come from another machine: one that leads out of the folder, or through a symbolic link, is refused.
- A file appears whole: it is written under a temporary name and moved.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from cli.console import clean, console, format_size
from cli.errors import GRID_FAILED, Failure
from grid.api.client import Client
from grid.config import read_json, write_file

RECORD_NAME = ".grid-files.json"
OUTPUT_PREFIX = "output/"
NAMED_MAX = 3


class Folder:
    """A folder that receives files, and the record of those it received before."""

    def __init__(self, path: Path, *, overwrite: bool) -> None:
        self._path = path
        self._overwrite = overwrite
        self._record_path = path / RECORD_NAME
        self._record: dict[str, Any] = read_json(self._record_path)
        self.refused: list[str] = []

    def target(self, name: str) -> Path | None:
        """Return where the file of this name may be written; None (and a note in `refused`) if it may not."""
        parts = PurePosixPath(name).parts
        safe = bool(parts) and not name.startswith("/") and not any(part in ("..", "") or "\0" in part for part in parts)
        path = self._path.joinpath(*parts) if safe else self._path
        if not safe or name == RECORD_NAME or self._through_link(parts):
            self.refused.append(f"{clean(name)} (leads out of the folder)")
            return None
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            found = path.lstat()
            ours = self._record.get(name) == [found.st_size, found.st_mtime_ns]
            if not (ours or self._overwrite) or path.is_dir():
                self.refused.append(clean(str(path)))
                return None
        return path

    def _through_link(self, parts: tuple[str, ...]) -> bool:
        return any(self._path.joinpath(*parts[:depth]).is_symlink() for depth in range(1, len(parts)))

    def write(self, name: str, path: Path, bodies: Iterable[bytes]) -> None:
        """Write a file whole and remember it as ours. Raises OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=".grid-", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                for body in bodies:
                    file.write(body)
                os.fchmod(file.fileno(), 0o666 & ~_umask())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        found = path.stat()
        self._record[name] = [found.st_size, found.st_mtime_ns]

    def close(self) -> None:
        """Save the record."""
        if self._record and self._path.is_dir():
            write_file(self._record_path, json.dumps(self._record).encode())


def fetch(client: Client, job: str, files: list[Mapping[str, Any]], into: Path, *, overwrite: bool, prefix: str = "") -> int:
    """Fetch the files whose name starts with `prefix` (which is cut off) into a folder; return how many.

    Raises Failure after fetching all that may be: some stand in the way, or a name is hostile.
    """
    wanted = [file for file in files if str(file["name"]).startswith(prefix) and file["name"] != prefix]
    if not wanted:
        return 0
    folder = Folder(into, overwrite=overwrite)
    size = 0
    count = 0
    try:
        for file in wanted:
            name = str(file["name"])[len(prefix) :]
            if (path := folder.target(name)) is not None:
                stream = client.stream("result_file", job=job, name=file["name"])
                folder.write(name, path, (body for _, _, body in stream))
                size += int(file.get("size") or 0)
                count += 1
    except OSError as error:
        message = f"can't write {error.filename or into}: {error.strerror}"
        raise Failure(
            "output", message, f"fetch the files again with: grid result {job[:8]} -o DIR", status=GRID_FAILED
        ) from None
    finally:
        with contextlib.suppress(OSError):
            folder.close()
    if count:
        console.say(f"{count} file{'s' * (count != 1)} ({format_size(size)}) in {into}", "dim")
    if folder.refused:
        raise _in_the_way(folder.refused, job)
    return count


def _in_the_way(refused: list[str], job: str) -> Failure:
    names = ", ".join(refused[:NAMED_MAX]) + (f" and {len(refused) - NAMED_MAX} more" if len(refused) > NAMED_MAX else "")
    return Failure(
        "output",
        f"not written over: {names}",
        f"get them with: grid result {job[:8]} -o DIR, or with --overwrite",
        status=GRID_FAILED,
    )


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
