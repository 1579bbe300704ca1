"""The list of a job's input files, as it came with the job: JSON `[[name, size, pack, offset], …]`.

A pack is a blob (64 hex digits) that holds one file or many, one after the other; it ends with its last file. Rules this
file keeps: nothing of a manifest is believed. Names stay below the folder they are extracted to, no file is also a folder,
numbers are in bounds; else ValueError, with one line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from grid.blobs.blob import BLOB_BYTES_MAX, BlobId, blob_id_from_hex

MANIFEST_BYTES_MAX = 256 << 20
"""Over two million files with names of a hundred characters."""
FILES_MAX = 1 << 21
NAME_BYTES_MAX = 4000
"""With the folder's path in front it must stay under Linux's PATH_MAX of 4096, or opening fails with a plain error."""
PART_BYTES_MAX = 255


class _Row(msgspec.Struct, array_like=True, frozen=True, gc=False):
    name: str
    size: int
    pack: str
    offset: int


@dataclass(frozen=True, slots=True)
class InputFile:
    """One input file and where its bytes are."""

    name: str
    size: int
    pack: BlobId
    offset: int


class Pack:
    """A blob with files, by offset."""

    def __init__(self, blob: BlobId, files: list[InputFile]) -> None:
        self.blob = blob
        self.files = sorted(files, key=lambda file: (file.offset, file.size, file.name))
        self.positions = {file.name: position for position, file in enumerate(self.files)}
        self.size = max(file.offset + file.size for file in files)

    @property
    def is_one_file(self) -> bool:
        """The pack is just this file."""
        return len(self.files) == 1 and self.files[0].offset == 0


class Manifest:
    """Files by name, packs by blob."""

    def __init__(self, files: Iterable[InputFile]) -> None:
        self.files: dict[str, InputFile] = {}
        by_pack: dict[BlobId, list[InputFile]] = {}
        for file in files:
            if file.name in self.files:
                raise ValueError(f"input file {file.name!r} is listed twice")
            self.files[file.name] = file
            by_pack.setdefault(file.pack, []).append(file)
        self.packs = {blob: Pack(blob, found) for blob, found in by_pack.items()}
        for name in self.files:
            folder = name
            while "/" in folder:
                folder = folder.rpartition("/")[0]
                if folder in self.files:
                    raise ValueError(f"input {folder!r} is listed as a file and as a folder")

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read and check a manifest. Raises ValueError, OSError. Blocks: half a second for 100,000 files."""
        with path.open("rb") as file:
            text = file.read(MANIFEST_BYTES_MAX + 1)
        if len(text) > MANIFEST_BYTES_MAX:
            raise ValueError(f"the list of input files is longer than {MANIFEST_BYTES_MAX} bytes")
        try:
            rows = msgspec.convert(json.loads(text), list[_Row])
        except (ValueError, RecursionError, msgspec.ValidationError) as error:
            raise ValueError(f"the list of input files can't be read: {error}") from None
        if len(rows) > FILES_MAX:
            raise ValueError(f"{len(rows)} input files are listed, at most {FILES_MAX} are allowed")
        return cls(map(_checked, rows))


def _checked(row: _Row) -> InputFile:
    try:
        name_bytes = os.fsencode(row.name)
    except UnicodeEncodeError:
        raise ValueError(f"{row.name!r} is no name for an input file") from None
    parts = name_bytes.split(b"/")
    if (
        len(name_bytes) > NAME_BYTES_MAX
        or b"\0" in name_bytes
        or any(part in (b"", b".", b"..") or len(part) > PART_BYTES_MAX for part in parts)
    ):
        raise ValueError(f"{row.name[:200]!r} is no name for an input file")
    if not (0 <= row.size <= BLOB_BYTES_MAX and 0 <= row.offset <= BLOB_BYTES_MAX - row.size):
        raise ValueError(f"input file {row.name!r} has an absurd size or offset")
    return InputFile(row.name, row.size, blob_id_from_hex(row.pack), row.offset)
